# SPDX-License-Identifier: Apache-2.0
"""`python -m fa4_jax.bench`: FLOPs, checks, differences and reports."""

import csv
import json

import jax
import pytest

from fa4_jax import bench

TINY = (
    "--head-dim 64 --seqlen 64 --tokens 128 --heads 4 --kv-heads 2 "
    "--rounds 3 --round-ms 1 --rest-ms 0 --settle-ms 0"
)


def run(tmp_path, extra):
    """(exit status, result rows by (pass, implementation)) of one run with one case."""
    path = tmp_path / "bench.json"
    status = bench.main([*TINY.split(), "--json", str(path), *extra.split()])
    rows = json.loads(path.read_text())["results"]
    found = {(row["pass"], row["implementation"]): row for row in rows}
    assert len(found) == len(rows)
    return status, found


# Two matrix products of 2 * 4096 * 4096 * 128 operations for each of 4 * 16 heads.
FULL_FORWARD = 2 * 2 * 4096 * 4096 * 128 * 4 * 16


@pytest.mark.parametrize(
    ("timed", "mask", "flops"),
    [
        ("fwd", "full", FULL_FORWARD),
        ("fwd", "causal", FULL_FORWARD / 2),
        ("bwd", "full", FULL_FORWARD * 2.5),
        ("bwd_direct", "causal", FULL_FORWARD * 1.25),
        ("fwd_bwd", "full", FULL_FORWARD * 3.5),
    ],
)
def test_flops(timed, mask, flops):
    case = bench.Case(batch=4, seqlen=4096, heads=16, kv_heads=2, head_dim=128, mask=mask)
    assert case.flops(timed) == flops


def test_flops_of_a_window_and_of_packed_sequences():
    sizes = dict(batch=2, seqlen=16384, heads=1, kv_heads=1, head_dim=64)
    window = bench.Case(**sizes, mask="window")
    # A triangle of 16,384, less one of the 12,288 queries behind the window.
    assert window.pairs == 2 * (16384**2 - 12288**2) / 2
    packed = bench.Case(**sizes, mask="packed")
    assert packed.lengths == (14000, 66, 6000, 1024, 5000, 258, 3400, 2000, 1020)
    assert packed.flops("fwd") == 4 * 64 * sum(n**2 for n in packed.lengths) / 2
    odd = bench.Case(batch=1, seqlen=1000, heads=1, kv_heads=1, head_dim=64, mask="packed")
    assert sum(odd.lengths) == 1000 and min(odd.lengths) > 0


def test_flops_and_bytes_where_v_has_its_own_head_dim():
    sizes = dict(batch=1, seqlen=64, heads=4, kv_heads=2, mask="full")
    case = bench.Case(**sizes, head_dim=192, value_dim=128)
    assert case.name == "d192v128-s64-b1-h4k2-full"
    # q k^T and p v; backward q k^T again, dq, dk; dp and dv.
    assert case.flops("fwd") == 2 * 4 * 64**2 * (192 + 128)
    assert case.flops("bwd") == 2 * 4 * 64**2 * (3 * 192 + 2 * 128)
    assert case.flops("fwd_bwd") == case.flops("fwd") + case.flops("bwd")
    q, k, v, dout = case.inputs(0)
    assert (q.shape[-1], k.shape[-1], v.shape[-1], dout.shape[-1]) == (192, 192, 128, 128)
    lse = 4 * 4 * 64
    assert case.bytes("fwd") == sum(x.nbytes for x in (q, k, v, dout)) + lse
    assert case.bytes("bwd") == 2 * sum(x.nbytes for x in (q, k, v, dout)) + lse


def test_presets_are_models(capsys):
    assert bench.main(["--list", "--preset", ",".join(bench.PRESETS)]) == 0
    names = capsys.readouterr().out.split()
    assert "gemma2-9b-d256-s8192-b2-h16k8-window4096-cap50" in names
    assert "deepseek-v3-d192v128-s4096-b1-h128-causal" in names
    assert len(names) == len(set(names)) == 8
    assert bench.main(["--list", "--preset", "gemma2-9b", "--cases", "*-causal-*"]) == 0
    assert capsys.readouterr().out.split() == ["gemma2-9b-d256-s8192-b2-h16k8-causal-cap50"]


def test_a_preset_is_timed(tmp_path, monkeypatch):
    """With its softcap and window, which XLA's function lacks, and its dims."""
    small = {"batch": 1, "seqlen": 48, "heads": 2, "kv_heads": 1, "head_dim": 16}
    limits = {"value_dim": 8, "mask": "window", "window": 16, "softcap": 2.0}
    monkeypatch.setitem(bench.PRESETS, "llama3-8b", ({**small, **limits},))
    status, rows = run(tmp_path, "--preset llama3-8b --impl reference,xla --pass fwd")
    assert status == 0
    assert rows["fwd", "reference"]["model"] == "llama3-8b"
    assert rows["fwd", "reference"]["tflops"] > 0
    assert "no softcap" in rows["fwd", "xla"]["reason"]
    plain, capped = (
        bench.attention("reference", bench.Case(**small, mask="window", window=16, softcap=cap))
        for cap in (None, 2.0)
    )
    q, k, v, _ = bench.Case(**small, mask="full").inputs(0)
    assert bench.relative_difference(plain(q, k, v), capped(q, k, v)) > 1e-2


def test_packed_sequences_and_windows_are_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "WINDOW", 24)
    status, rows = run(tmp_path, "--impl reference,xla --mask window --pass fwd,bwd_direct")
    assert status == 0
    # XLA's window, of a mask, is the reference's, of a band.
    assert 0 < rows["bwd_direct", "xla"]["difference"] < bench.MAX_DIFFERENCE
    status, rows = run(tmp_path, "--impl reference,xla --mask packed --pass fwd,bwd_direct")
    assert status == 0
    assert rows["bwd_direct", "reference"]["tflops"] > 0
    assert "packed" in rows["fwd", "xla"]["reason"]


def test_default_cases_keep_the_number_of_tokens(capsys):
    assert bench.main(["--list"]) == 0
    names = capsys.readouterr().out.split()
    assert len(names) == len(set(names)) == 18
    assert "d64-s1024-b16-h32-full" in names
    assert "d128-s16384-b1-h16-causal" in names
    assert bench.main(["--list", "--cases", "d128-s4096*causal"]) == 0
    assert capsys.readouterr().out.split() == ["d128-s4096-b4-h16-causal"]


def test_report_is_consistent(tmp_path, capsys):
    csv_path, plots = tmp_path / "bench.csv", [tmp_path / "bars.png", tmp_path / "roofline.png"]
    saved = f"--csv {csv_path} --plot {plots[0]} --roofline {plots[1]}"
    status, rows = run(tmp_path, f"--impl xla,reference --mask causal {saved}")
    assert status == 0
    passes = ("fwd", "bwd", "bwd_direct", "fwd_bwd")
    assert set(rows) == {(p, i) for p in passes for i in ("xla", "reference")}
    for row in rows.values():
        if row["pass"] == "bwd" and row["reason"].startswith("too noisy"):
            continue  # The difference of two times near 1 ms, on a busy machine.
        assert row["reason"] == ""
        assert row["milliseconds"] > 0
        assert row["tflops"] == pytest.approx(row["flops"] / row["milliseconds"] / 1e9)
        assert row["rounds"] == 3
    # The other implementation was compared, and isn't the same code.
    assert 0 < rows["fwd", "reference"]["difference"] < bench.MAX_DIFFERENCE
    assert 0 < rows["fwd_bwd", "reference"]["difference"] < bench.MAX_DIFFERENCE
    with csv_path.open(newline="") as file:
        assert {(r["pass"], r["implementation"]) for r in csv.DictReader(file)} == set(rows)
    for plot in plots:
        assert plot.read_bytes().startswith(b"\x89PNG")
    assert "d64-s64-b2-h4k2-causal" in capsys.readouterr().out


def test_a_run_that_is_cut_short_keeps_what_it_has_measured(tmp_path, monkeypatch):
    measure = bench.Harness.measure

    def until_the_second(harness, case):
        if case.mask == "causal":
            raise KeyboardInterrupt
        return measure(harness, case)

    monkeypatch.setattr(bench.Harness, "measure", until_the_second)
    csv_path = tmp_path / "out.csv"
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, f"--impl xla --pass fwd --csv {csv_path}")
    (row,) = json.loads((tmp_path / "bench.json").read_text())["results"]
    assert row["name"] == "d64-s64-b2-h4k2-full"
    with csv_path.open(newline="") as file:
        assert [r["name"] for r in csv.DictReader(file)] == [row["name"]]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="fa4 fails only without a GPU")
def test_a_failing_implementation_is_reported(tmp_path):
    status, rows = run(tmp_path, "--impl fa4,reference --pass fwd --mask full")
    assert status == 0
    assert "cpu" in rows["fwd", "fa4"]["reason"]
    assert rows["fwd", "fa4"]["tflops"] is None
    assert rows["fwd", "reference"]["tflops"] > 0


@pytest.mark.parametrize("factor", [1.1, float("nan")])
def test_wrong_results_are_not_timed(tmp_path, monkeypatch, factor):
    right = bench.attention

    def attention(implementation, case):
        attend = right(implementation, case)
        scale = factor if implementation == "reference" else 1
        return lambda q, k, v: scale * attend(q, k, v)

    monkeypatch.setattr(bench, "attention", attention)
    status, rows = run(tmp_path, "--impl xla,reference --mask full")
    assert status == 1
    for timed in ("fwd", "bwd", "bwd_direct", "fwd_bwd"):
        assert rows[timed, "reference"]["reason"].startswith("wrong result")
        if timed != "bwd":  # The difference of two times, which may be too noisy.
            assert rows[timed, "xla"]["tflops"] > 0


def test_a_first_implementation_of_nans_is_wrong_and_no_measure_for_others(tmp_path, monkeypatch):
    right = bench.attention

    def attention(implementation, case):
        attend = right(implementation, case)
        return (lambda q, k, v: q * float("nan")) if implementation == "xla" else attend

    monkeypatch.setattr(bench, "attention", attention)
    status, rows = run(tmp_path, "--impl xla,reference --pass fwd --mask full")
    assert status == 1
    assert rows["fwd", "xla"]["reason"].startswith("wrong result")
    assert rows["fwd", "reference"]["tflops"] > 0


def test_skips_have_reasons(tmp_path):
    status, rows = run(tmp_path, "--impl xla,reference --pass fwd --mask full --xla-max-gib 0")
    assert status == 0
    assert rows["fwd", "xla"]["reason"].startswith("skipped")
    status, rows = run(tmp_path, "--impl reference --pass fwd --mask full --max-seconds 0")
    assert status == 1
    assert "--max-seconds" in rows["fwd", "reference"]["reason"]


class FakeProgram(bench.Program):
    """Takes the times that a test wrote down, and writes down the order of calls."""

    order: list = []

    def __init__(self, name, times):
        self.name, self.times = name, times

    def __call__(self):
        return (
            (jax.numpy.ones(1), jax.numpy.ones(1)) if "fwd_bwd" in self.name else jax.numpy.ones(1)
        )

    def milliseconds(self, calls):
        if not isinstance(self.times, list):
            return self.times
        self.order.append(self.name)
        return self.times.pop(0)


def test_backward_is_the_difference_and_rounds_are_interleaved(tmp_path, monkeypatch):
    # Two warm-up calls, then three rounds. The clock drifts, the paired difference doesn't.
    times = {
        "fwd": [9, 9, 1.0, 2.0, 3.0],
        "fwd_bwd": [9, 9, 3.5, 4.5, 5.5],
        "bwd_direct": [9, 9, 2.0, 2.0, 2.0],
    }
    FakeProgram.order = []

    def build(timed, implementation, case, input_sets):
        return FakeProgram((timed, implementation), list(times[timed]))

    monkeypatch.setattr(bench, "build", build)
    options = bench.parser().parse_args([*TINY.split(), "--impl", "xla,reference"])
    harness = bench.Harness(options)
    measured = {(m.timed, m.implementation): m for m in harness.measure(bench.cases(options)[0])}
    for implementation in ("xla", "reference"):
        assert measured["fwd", implementation].milliseconds == 2.0
        assert measured["bwd", implementation].milliseconds == 2.5
        assert measured["bwd", implementation].spread == 0.0
        assert measured["fwd", implementation].spread == 1.0
    rounds = FakeProgram.order[-18:]
    assert rounds[:6] == rounds[6:12] == rounds[12:]
    assert len(set(rounds[:6])) == 6


def test_a_round_begins_with_what_does_not_count(monkeypatch):
    # Four times a round; each call takes as long as the calls asked for.
    asked = []

    class Program(FakeProgram):
        def milliseconds(self, calls):
            asked.append(calls)
            return 0.5

    monkeypatch.setattr(bench, "build", lambda *_: Program("fwd", []))
    arguments = [*TINY.split(), *"--impl reference --pass fwd --settle-ms 4".split()]
    options = bench.parser().parse_args(arguments)
    (measured,) = bench.Harness(options).measure(bench.cases(options)[0])
    assert asked == [2, 3] + 3 * [8, 2]
    assert measured.samples == 3 * [0.5]


def test_bad_options_are_refused(capsys):
    for arguments in ("--impl fa5", "--seqlen 0", "--pass sideways", "--dtype int8"):
        with pytest.raises(SystemExit) as error:
            bench.main(arguments.split())
        assert error.value.code == 2
    assert bench.main(["--cases", "no-such-case"]) == 1


def test_what_a_call_costs_the_host(tmp_path, capsys):
    path = tmp_path / "host.json"
    bench.main(["--host", "--impl", "xla", "--rounds", "1", "--json", str(path)])
    costs = json.loads(path.read_text())["host"]
    assert set(costs) == {"trivial", "forward", "eager"}
    # Compiling takes longer than calling what was compiled.
    assert all(c["first_seconds"] * 1e6 > 3 * c["microseconds"] > 0 for c in costs.values())
    assert "us more (limit 10)" in capsys.readouterr().out


@pytest.mark.parametrize(("microseconds", "seconds"), [(9, 0.09), (11, 0.09), (9, 0.11)])
def test_the_host_limits(microseconds, seconds):
    trivial = {"microseconds": 20.0, "first_seconds": 0.05}
    forward = {"microseconds": 20.0 + microseconds, "first_seconds": 0.05 + seconds}
    _, good = bench.host_report({"trivial": trivial, "forward": forward})
    assert good == (microseconds < 10 and seconds < 0.1)
