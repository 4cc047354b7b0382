# SPDX-License-Identifier: Apache-2.0
"""`sanitize.py`: which kernels its calls launch, and what it makes of the tools' logs."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import sanitize
from sanitize import Finding

from fa4_jax._variants import VARIANTS

KERNEL = "fa4_backward_sm90a_bf16_d192_128"

# In the form that compute-sanitizer's manual shows, written by hand.
MEMCHECK = f"""\
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 16 bytes
=========     at {KERNEL}_0+0x1a0
=========     by thread (32,0,0) in block (1,0,0)
=========     Access at 0x7f64c1a00e00 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f64c1a00000 of size 3,584 bytes
=========     Saved host backtrace up to driver entry point at kernel launch time
=========
========= Invalid __global__ read of size 16 bytes
=========     at {KERNEL}_0+0x1a0
=========     by thread (33,0,0) in block (1,0,0)
=========     Access at 0x7f64c1a00e10 is out of bounds
=========
========= Invalid __global__ read of size 4 bytes
=========     at fa4_planted_memcheck+0x60
=========     by thread (0,0,0) in block (0,0,0)
=========
========= Target application returned an error
========= ERROR SUMMARY: 3 errors
"""
RACECHECK = f"""\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at {KERNEL}_0+0x10
=========     and Read access at {KERNEL}_0+0x20 [512 hazards]
=========
========= Error: Race reported between Write access at fa4_planted_racecheck+0x70
=========     and Read access at fa4_planted_racecheck+0x90 [62 hazards]
=========
========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)
"""
INITCHECK = """\
========= COMPUTE-SANITIZER
========= Host API uninitialized memory access
=========     Uninitialized access at 0x7f5f3fa00000 on access by cuMemcpyDtoHAsync_v2 source
=========
========= Uninitialized __global__ memory read of size 4 bytes
=========     at fa4_planted_initcheck(float *, int)+0x50
=========     by thread (0,0,0) in block (0,0,0)
=========
========= ERROR SUMMARY: 2 errors
"""
CALLS = "1/1 2.5 s: bfloat16 (64, 64) 1x1x1x1x1\ncalls done, 0 with NaN\n"

LAUNCHED = """
import json, sanitize
cases = sanitize.cases()
print(json.dumps([len(cases), sorted(set(sanitize.launched(cases)))]))
"""


def test_the_calls_launch_every_row() -> None:
    """In a process of its own: the primitives of this one stay as they are."""
    folder = pathlib.Path(sanitize.__file__).parent
    path = os.pathsep.join([str(folder), *sys.path])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LAUNCHED],
        env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    number, keys = json.loads(done.stdout.splitlines()[-1])
    assert number >= 40
    assert keys == sorted({variant.key for variant in VARIANTS})


def test_findings_of_one_defect_are_one() -> None:
    found = sanitize.findings(MEMCHECK)
    assert found == {
        Finding("Invalid __global__ read of size 16 bytes", KERNEL, ("+0x1a0",)): 2,
        Finding("Invalid __global__ read of size 4 bytes", "fa4_planted_memcheck", ("+0x60",)): 1,
    }
    (race, planted) = sanitize.findings(RACECHECK)
    assert (race.kernel, race.places) == (KERNEL, ("+0x10", "+0x20"))
    assert planted.kernel == "fa4_planted_racecheck"
    (host, planted) = sanitize.findings(INITCHECK)
    assert host == Finding("Host API uninitialized memory access", "", ())
    assert (planted.kernel, planted.places) == ("fa4_planted_initcheck", ("+0x50",))


def write(folder: pathlib.Path, tool: str, log: str, calls: str = CALLS) -> list[str]:
    (folder / f"{tool}.log").write_text(log)
    (folder / f"{tool}.calls").write_text(calls)
    return ["report", str(folder)]


def test_a_finding_in_our_kernels_fails_and_the_hosts_does_not(tmp_path, capsys) -> None:
    assert sanitize.main(write(tmp_path, "initcheck", INITCHECK)) == 0
    assert "1 of the host's" in capsys.readouterr().out
    assert sanitize.main(write(tmp_path, "memcheck", MEMCHECK)) == 1
    assert f"2 x Invalid __global__ read of size 16 bytes: {KERNEL} +0x1a0" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("log", "calls"),
    [
        (INITCHECK.replace("fa4_planted", "xla"), CALLS),
        (INITCHECK, CALLS.replace("calls done", "")),
        (INITCHECK, CALLS.replace("0 with NaN", "1 with NaN")),
    ],
    ids=["blind", "unfinished", "nan"],
)
def test_a_tool_that_saw_nothing_or_stopped_fails(tmp_path, log: str, calls: str) -> None:
    assert sanitize.main(write(tmp_path, "initcheck", log, calls)) == 1


@pytest.mark.parametrize(("opcode", "status"), [("UBLKCP", 0), ("STS", 1)])
def test_only_the_allowed_races_are(tmp_path, monkeypatch, opcode: str, status: int) -> None:
    (tmp_path / f"{KERNEL}.cubin").touch()
    monkeypatch.setattr(sanitize, "instructions", lambda cubin: {0x10: opcode, 0x20: "LDS.64"})
    arguments = write(tmp_path, "racecheck", RACECHECK)
    assert sanitize.main([*arguments, "--cubins", str(tmp_path)]) == status
    assert sanitize.main(arguments) == 1  # without the instructions nothing is allowed
