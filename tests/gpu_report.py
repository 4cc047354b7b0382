# SPDX-License-Identifier: Apache-2.0
"""Everything that only a GPU can say, in one command, as a file to send back.

    python tests/gpu_report.py --out report    # in a checkout, with the package installed
    python tests/gpu_report.py --only doctor,bench --out report

Runs the doctor, all GPU tests (several processes share the GPU; long inputs by themselves),
NVIDIA's sanitizers where they are installed, and the benchmark beside JAX's own attention. Each
step has a time limit, and what comes after a failed one still runs. `report.zip` has what every
step printed and measured and `report.md`, its summary, without this machine's paths and names. The
exit status is 0 if every step passed.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import os
import pathlib
import platform
import re
import shutil
import signal
import site
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

ROOT = pathlib.Path(__file__).resolve().parent.parent
PYTHON = sys.executable
PYTEST = (PYTHON, "-m", "pytest", "-m", "gpu", "-v", "-p", "no:cacheprovider")
# Processes that share the GPU in the tests, each with so much of its memory.
WORKERS, SHARE = 8, "0.1"


@dataclasses.dataclass(frozen=True)
class Step:
    """A command, whose output is kept as `<name>.log`; `{out}` is the report's folder."""

    name: str
    command: Sequence[str]
    seconds: float
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    program: str = ""
    """Without which it is skipped."""


STEPS = (
    Step("doctor", (PYTHON, "-P", "-m", "fa4_jax.doctor"), 600),
    Step(
        "tests",
        (*PYTEST, "-n", str(WORKERS), "--dist", "worksteal", "--ignore=tests/test_gpu_long.py"),
        2400,
        {"XLA_PYTHON_CLIENT_MEM_FRACTION": SHARE},
    ),
    Step(
        "long",
        (*PYTEST, "tests/test_gpu_long.py"),
        600,
        {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"},
    ),
    Step(
        "sanitizer",
        (PYTHON, "tests/sanitize.py", "run", "--out", "{out}/sanitizer", "--seconds", "300"),
        420,
        program="compute-sanitizer",
    ),
    Step(
        "bench",
        (
            *(PYTHON, "-P", "-m", "fa4_jax.bench", "--impl", "fa4,cudnn", "--rounds", "5"),
            *("--csv", "{out}/bench.csv", "--json", "{out}/bench.json"),
        ),
        1800,
    ),
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a step went: passed, FAILED, STOPPED at its limit, or skipped."""

    step: Step
    state: str
    seconds: float = 0.0
    last: str = ""
    """Line of its output."""


def run(step: Step, folder: pathlib.Path) -> Outcome:
    """Run a step in a process group of its own, which is killed at the limit."""
    if step.program and not shutil.which(step.program):
        return Outcome(step, "skipped", last=f"{step.program} isn't installed")
    command = [part.replace("{out}", str(folder)) for part in step.command]
    log = folder / f"{step.name}.log"
    start = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **step.environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            state = "passed" if process.wait(step.seconds) == 0 else "FAILED"
        except subprocess.TimeoutExpired:
            # Not TERM, which a process that waits for the GPU doesn't hear.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            state = "STOPPED"
    lines = log.read_text(errors="replace").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "")
    return Outcome(step, state, time.monotonic() - start, last)


def private() -> dict[str, str]:
    """What a report says instead of this machine's paths and names; the longest first."""
    places = {str(pathlib.Path(path)): "<site-packages>" for path in site.getsitepackages()}
    places |= {str(ROOT): "<checkout>", sys.prefix: "<python>", str(pathlib.Path.home()): "~"}
    places[platform.node()] = "<host>"
    return {x: places[x] for x in sorted(filter(None, places), key=len, reverse=True)}


def without(names: Mapping[str, str], text: str) -> str:
    """The text with these names replaced where they stand alone or begin a path."""
    for name, instead in names.items():
        text = re.sub(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", instead, text)
    return text


def summary(outcomes: Sequence[Outcome], folder: pathlib.Path) -> str:
    """report.md: the steps, tests that failed, and what the doctor printed."""
    lines = ["# fa4_jax on a GPU", "", "| step | | seconds | last line |", "|---|---|---|---|"]
    for outcome in outcomes:
        last = outcome.last.strip("= ").replace("|", "\\|")[:160]
        lines.append(f"| {outcome.step.name} | {outcome.state} | {outcome.seconds:.0f} | {last} |")
    for log in sorted(folder.glob("*.log")):
        text = log.read_text(errors="replace")
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+::.*)$", text, re.MULTILINE)
        if failed:
            lines += ["", f"## {log.stem}: {len(failed)} failed", ""]
            lines += [f"* `{line[:300]}`" for line in failed[:50]]
    doctor = folder / "doctor.log"
    if doctor.is_file():
        lines += [
            "",
            "## The machine",
            "",
            "```",
            doctor.read_text(errors="replace").strip(),
            "```",
        ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [step.name for step in STEPS]
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("report"))
    parser.add_argument("--only", help=f"of {', '.join(names)}; default: all")
    options = parser.parse_args(arguments)
    wanted = options.only.split(",") if options.only else names
    if unknown := set(wanted) - set(names):
        parser.error(f"--only: got {', '.join(sorted(unknown))}; choose from {', '.join(names)}")
    folder = options.out.resolve()
    if folder.exists() and any(folder.iterdir()):
        parser.error(f"--out: {options.out} exists and isn't empty; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [step for step in STEPS if step.name in wanted]
    outcomes = []
    for number, step in enumerate(chosen, 1):
        print(f"[{number}/{len(chosen)}] {step.name} ...", end=" ", flush=True)
        outcomes.append(run(step, folder))
        print(f"{outcomes[-1].state} in {outcomes[-1].seconds:.0f} s", flush=True)
    names_here = private()
    (folder / "report.md").write_text(summary(outcomes, folder))
    for path in filter(pathlib.Path.is_file, folder.rglob("*")):
        if path.suffix in (".log", ".md", ".csv", ".json", ".calls"):
            path.write_text(without(names_here, path.read_text(errors="replace")))
    archive = shutil.make_archive(str(folder), "zip", folder)
    states = collections.Counter(outcome.state for outcome in outcomes)
    print(", ".join(f"{count} {state}" for state, count in states.items()))
    print(f"Please read {options.out / 'report.md'}, and send {archive} with an issue.")
    return 0 if set(states) <= {"passed", "skipped"} else 1


if __name__ == "__main__":
    sys.exit(main())
