# SPDX-License-Identifier: Apache-2.0
"""The report that a stranger with a GPU sends back: every step is in it, and no path of theirs."""

from __future__ import annotations

import importlib.util
import pathlib
import platform
import sys
import zipfile
from types import SimpleNamespace

import gpu
import gpu_report
import jax
import pytest
from gpu_report import Step, without

from fa4_jax import _variants
from fa4_jax._variants import Arch

STEPS = (
    Step("doctor", (sys.executable, "-c", "import sys; print('found', sys.prefix)"), 60),
    Step(
        "tests",
        (sys.executable, "-c", "print('FAILED t.py::a - wrong'); print('= 1 failed ='); exit(1)"),
        60,
    ),
    Step(
        "long", (sys.executable, "-c", "print('begun', flush=True); import time; time.sleep(60)"), 2
    ),
    Step("sanitizer", (sys.executable, "-c", "1 / 0"), 60, program="no-such-program"),
    Step(
        "bench",
        (sys.executable, "-c", "import os; open('{out}/bench.csv', 'w').write(os.getcwd())"),
        60,
        {"SOME_VARIABLE": "1"},
    ),
)


@pytest.fixture
def report(monkeypatch, tmp_path: pathlib.Path, capsys) -> tuple[int, pathlib.Path, str]:
    """(exit status, folder, what was printed) of steps that pass, fail, hang and are skipped."""
    monkeypatch.setattr(gpu_report, "STEPS", STEPS)
    status = gpu_report.main(["--out", str(tmp_path / "report")])
    return status, tmp_path / "report", capsys.readouterr().out


def test_every_step_runs_and_is_reported(report) -> None:
    status, folder, printed = report
    assert status == 1
    states = {step.name: "passed" for step in STEPS}
    states |= {"tests": "FAILED", "long": "STOPPED", "sanitizer": "skipped"}
    text = (folder / "report.md").read_text()
    for name, state in states.items():
        assert f"| {name} | {state} | " in text
        assert f"{name} ... {state} in " in printed
    assert "1 failed" in text and "* `t.py::a - wrong`" in text
    assert "no-such-program isn't installed" in text
    assert (folder / "long.log").read_text() == "begun\n"
    with zipfile.ZipFile(f"{folder}.zip") as archive:
        assert {"report.md", "tests.log", "bench.csv"} <= set(archive.namelist())
        assert archive.read("report.md").decode() == text


def test_no_path_or_name_of_the_machine_is_in_it(report) -> None:
    _, folder, _ = report
    assert (folder / "doctor.log").read_text() == "found <python>\n"
    assert (folder / "bench.csv").read_text() == "<checkout>"
    for path in folder.iterdir():
        text = path.read_text()
        assert str(gpu_report.ROOT) not in text and sys.prefix not in text


def test_names_are_replaced_where_they_stand_alone() -> None:
    names = {"/home/me/venv": "<python>", "/home/me": "~", "box": "<host>"}
    text = "/home/me/venv/lib, /home/me/x, /home/melissa, box:1 mailbox sandbox-2 box"
    expected = "<python>/lib, ~/x, /home/melissa, <host>:1 mailbox sandbox-2 <host>"
    assert without(names, text) == expected
    assert platform.node() in gpu_report.private() or not platform.node()


def test_wrong_arguments_change_nothing(tmp_path: pathlib.Path, capsys) -> None:
    with pytest.raises(SystemExit):
        gpu_report.main(["--only", "doctor,dentist", "--out", str(tmp_path / "new")])
    assert "got dentist; choose from doctor, tests" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(SystemExit):
        gpu_report.main(["--out", str(tmp_path / "full")])
    assert "exists and isn't empty" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_steps_are_commands_that_exist() -> None:
    """Scripts and modules; what pytest is given, it looks for itself."""
    for step in gpu_report.STEPS:
        interpreter, *options = (part for part in step.command if part != "-P")
        assert interpreter == sys.executable
        if options[0] == "-m":
            assert importlib.util.find_spec(options[1])
        else:
            assert (gpu_report.ROOT / options[0]).is_file()
        assert step.seconds > 0


def test_the_gpu_tests_are_of_the_kernels_that_run_here(monkeypatch) -> None:
    """On a GPU that this process pretends to have: of every architecture that calls use."""
    assert gpu.skip_reason() == "needs a CUDA device" or jax.devices("cuda")
    here = SimpleNamespace(compute_capability="")
    monkeypatch.setattr(jax, "devices", lambda backend: [here])
    for module in (_variants, gpu):
        monkeypatch.setattr(module, "served_arches", lambda: tuple(Arch))
    for here.compute_capability, arch in (("9.0", Arch.sm90a), ("10.0", Arch.sm100a)):
        assert gpu.arch_here() is arch
        assert gpu.skip_reason() == ""
        assert {row.arch for row in gpu.forward_rows(arch)} == {arch}
    for here.compute_capability in ("10.3", "11.0", "12.0"):
        expected = f"compute capability {here.compute_capability} has no kernel"
        assert expected in gpu.skip_reason()
        assert gpu.arch_here() is Arch.sm90a
