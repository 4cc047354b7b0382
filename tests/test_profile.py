# SPDX-License-Identifier: Apache-2.0
"""`python -m kernels.profile`: which launches, and what it makes of ncu's CSV."""

import json

from kernels import profile

STALLS = {"selected": 1.0, "gmma": 2.0, "long_scoreboard": 0.5, "wait": 0.4, "barrier": 0.1}
ONLY = ["forward_sm90a_bf16_d128", "backward_postprocess_sm90a_bf16_d192_128"]


def write(folder, kernels, local="0"):
    """ncu's raw page of these kernels, with what it prints around it."""
    values = {
        profile.TIME: "500000",
        profile.CLOCK: "1,755,000,000",
        profile.REGISTERS: "168",
        **dict.fromkeys(profile.LOCAL, local),
        **{metric: f"{10 + i}.2" for i, metric in enumerate(profile.SHARES.values())},
        **{name.join(profile.STALL): str(value) for name, value in STALLS.items()},
    }
    lines = ["==PROF== Connected to process 7", '"ID","Kernel Name",' + quoted(values)]
    lines.append('"","",' + quoted(["ns"] * len(values)))
    lines += [f'"{i}","{kernel}_0",' + quoted(values.values()) for i, kernel in enumerate(kernels)]
    (folder / "ncu.csv").write_text("\n".join([*lines, "==PROF== Disconnected"]))
    shapes = [(p.row.name, p.shape.text) for p in profile.launches(ONLY)]
    (folder / "launches.json").write_text(json.dumps(shapes))
    (folder / "launches.log").write_text("what the launches printed\n")


def quoted(cells):
    return ",".join(f'"{cell}"' for cell in cells)


KERNELS = ["fa4_forward_sm90a_bf16_d128"] * 2 + ["fa4_backward_postprocess_sm90a_bf16_d192_128"]


def test_every_kernel_and_head_dim_is_launched():
    found = [(p.row.kernel, p.row.head_dim, p.row.head_dim_v, p.mask) for p in profile.launches([])]
    assert len(found) == len(set(found)) == 6 * (2 + 2 + 1 + 1)


def test_the_table_has_a_line_a_launch(tmp_path, capsys):
    write(tmp_path, KERNELS)
    assert profile.main(["report", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(KERNELS)
    cells = [cell.strip() for cell in lines[3].strip("|").split("|")]
    # 2 products of 2 * 4 * 16 * 4096^2 * 128 operations, half of it, in 500 us.
    assert cells[:8] == ["forward", "128", "causal", "500", "550", "1755", "168", "0"]
    assert cells[8 : 8 + len(profile.SHARES)] == [str(10 + i) for i in range(len(profile.SHARES))]
    assert cells[-1] == "gmma 50%, long scoreboard 12%, wait 10%, barrier 2%"
    assert "| 192/128 |  | 500 |  |" in lines[4]


def test_local_memory_or_a_missing_launch_fails(tmp_path, capsys):
    write(tmp_path, KERNELS, local="3")
    assert profile.main(["report", str(tmp_path)]) == 1
    write(tmp_path, KERNELS[:2])
    assert profile.main(["report", str(tmp_path)]) == 1
    assert "2 of 3 launches profiled" in capsys.readouterr().out
    (tmp_path / "ncu.csv").unlink()
    assert profile.main(["report", str(tmp_path)]) == 1


def test_a_metric_that_ncu_lacks_leaves_its_cell_empty(tmp_path, capsys):
    write(tmp_path, KERNELS)
    file = tmp_path / "ncu.csv"
    file.write_text(file.read_text().replace(profile.SHARES["tensor"], "unknown"))
    assert profile.main(["report", str(tmp_path)]) == 0
    assert "| - | 11 |" in capsys.readouterr().out
