"""`python bench/gpu.py STEP`, or `make gpu-STEP`: what a first hour on a GPU is to settle, in steps of less than nine
minutes. `all` takes every step in order, and goes on after one that fails. --dry shows the commands, and how much each
of them has to do, also where there is no GPU.

Each step writes to the folder of results as it goes: its output, and what its commands measure. Commands that do not
end in the step's time are interrupted, so that they show what they have.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a script
    sys.path[0] = str(ROOT)

# Seconds that a step may take, the first look less; a command that is interrupted has GRACE to show what it has.
LIMIT, SMOKE, GRACE = 500, 110, 20


def limit_of(step: str) -> int:
    return SMOKE if step == "smoke" else LIMIT


@dataclass(frozen=True)
class Command:
    arguments: tuple[str, ...]  # {results} is the folder
    seconds: int = 0  # an estimate, for an H100 with 16 cores; 0: bench/run.py --dry tells
    environment: Mapping[str, str | None] = field(default_factory=dict)  # None: without that variable

    def argv(self, results: Path | str) -> list[str]:
        return [sys.executable if word == "python" else word.format(results=results) for word in self.arguments]

    def shown(self, results: Path | str) -> str:
        words = [f"-u {name}" if value is None else f"{name}={value}" for name, value in self.environment.items()]
        prefix = f"env {' '.join(words)} " if words else ""
        return prefix + shlex.join(["python" if word == sys.executable else word for word in self.argv(results)])


def bench(name: str, options: str, providers: str = "bnext,eager", seconds: str = "0.15") -> Command:
    options += f" --providers {providers} --seconds {seconds}"
    return Command(
        ("python", "bench/run.py", "--device", "cuda", *options.split(), "--json", f"{{results}}/{name}.json")
    )


def tests(selection: str, *what: str, workers: int, seconds: int, time_limit: int = 90) -> Command:
    """Processes share the GPU. Plugins are used where they are installed: one kernel that never ends should cost a
    test, not the step."""
    words = ["python", "-m", "pytest", "-q", "-m", "", "-k", selection, *what]
    if importlib.util.find_spec("xdist"):
        words += ["-n", str(workers), "--dist", "worksteal", "--max-worker-restart", "100"]
    if importlib.util.find_spec("pytest_timeout"):
        words += [f"--timeout={time_limit}", "--timeout-method=thread"]
    return Command((*words, "-o", f"faulthandler_timeout={time_limit - 30}"), seconds)


def sanitizer(tool: str, selection: str, cases: int) -> Command:
    """Watches our kernels alone, and takes memory straight from CUDA: in torch's cache, one tensor's end is the next
    one's start. A case takes about 3 s, Python's start 20 s."""
    words = ["compute-sanitizer", "--tool", tool, "--kernel-regex", "kns=bnext", "--report-api-errors", "no"]
    words += ["--error-exitcode", "9", "python", "-m", "pytest", "-q", "-m", "sanitize", "-p", "no:cacheprovider"]
    words += ["tests/test_reduced.py", "-k", f"cuda and {selection}"]
    return Command(tuple(words), 20 + 3 * cases, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


# Of the reduced suite, in four parts that run side by side: bfloat16 and float32, without and with everything fused.
PARTS = [f"torch.{dtype} and {fused}" for dtype in ("bfloat16", "float32") for fused in ("plain", "add_relu")]

# Commands of a list run side by side, lists one after the other: first what is wanted most.
STEPS: dict[str, list[list[Command]]] = {
    "build": [
        [Command(("nvidia-smi",), 2)],
        # For the visible GPU alone; with lines of source, for ncu and the sanitizer.
        [Command(("python", "setup.py", "-q", "build_ext", "--inplace"), 120,
                 {"TORCH_CUDA_ARCH_LIST": None, "NVCC_APPEND_FLAGS": "-lineinfo"})],
        [Command(("python", "-m", "bnext.doctor"), 10)],
    ],
    "smoke": [
        [tests("test_reduced and cuda or test_repeatability and (cuda or streams) or test_cuda_runtime", "tests",
               workers=8, seconds=80, time_limit=60)],
    ],
    "table": [
        [bench("gpu-table", "--phase forward,backward", "bnext,bnext:two_pass,eager,native", "0.3")],
        [bench("gpu-table-compile", "--phase forward,backward", "bnext,eager,compile")],
    ],
    "probe": [
        [Command(("python", "bench/probe.py", "--json", "{results}/gpu-probe.json"), 120)],
        [Command(("python", "bench/traffic.py", "--shapes", "64x256x56x56", "--providers", "bnext"), 160)],
        [Command(("python", "bench/traffic.py", "--shapes", "64x1024x14x14", "--providers", "bnext"), 160)],
    ],
    "tables": [
        [bench("gpu-host", "--phase host,host_eval,host_backward --epilogue none,add_relu")],
        [bench("gpu-dtypes", "--dtype float32,float16 --phase forward,backward")],
        [bench("gpu-batches", "--batch 32,256 --phase forward,backward")],
        [bench("gpu-eval", "--phase eval,frozen")],
        [bench("gpu-fused", "--epilogue relu,add_relu --phase forward,backward")],
        [bench("gpu-tiny", "--suite tiny --phase forward,backward")],
        [Command(("python", "bench/model.py", "--device", "cuda", "--networks", "resnet50,densenet121",
                  "--dtype", "bfloat16", "--layout", "channels_last", "--batch", "64", "--gib", "80",
                  "--steps", "3", "--json", "{results}/gpu-model.json"), 35)],
    ],
    "test": [[tests("cuda or gpu or streams or graph", "tests", workers=12, seconds=240, time_limit=120)]],
    "sanitize": [
        [sanitizer("memcheck", part, 18) for part in PARTS],
        [sanitizer("racecheck", f"resident and {part}", 6) for part in PARTS],
        [sanitizer(tool, PARTS[i], 18) for tool in ("synccheck", "initcheck") for i in (0, 3)],
        [sanitizer("racecheck", f"not resident and {part}", 12) for part in PARTS],
        [sanitizer("memcheck", f"torch.{dtype} and {fused}", cases) for dtype, fused, cases in
         (("float16", "(plain or add_relu)", 36), ("float64", "(plain or add_relu)", 36),
          ("bfloat16", "relu and not add_relu", 18), ("float32", "relu and not add_relu", 18))],
    ],
}  # fmt: skip


def interruptible() -> None:
    """In a child: a process group of its own, which an interrupt reaches. One that a shell started in the background
    ignores interrupts, and so would its children."""
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Running:
    """A command that runs, in a process group of its own; its output goes to a log, and to the screen."""

    def __init__(self, command: Command, results: Path, log):
        environment = {k: v for k, v in os.environ.items() if command.environment.get(k, "") is not None}
        environment |= {k: v for k, v in command.environment.items() if v is not None} | {"PYTHONUNBUFFERED": "1"}
        environment["PYTHONPATH"] = str(ROOT)
        environment["PATH"] += os.pathsep + str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin"))
        self.name, self.log, self.last = command.shown(results), log, ""
        self.start, self.end = time.monotonic(), math.nan
        self.say(f"$ {self.name}")
        argv = command.argv(results)
        if shutil.which(argv[0], path=environment["PATH"]) is None:
            argv = [sys.executable, "-c", f"raise SystemExit({argv[0] + ' is not installed'!r})"]
        self.process = subprocess.Popen(
            argv, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", preexec_fn=interruptible,
        )  # fmt: skip
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def say(self, line: str) -> None:
        for file in (self.log, sys.stdout):
            print(line, file=file, flush=True)

    def read(self) -> None:
        for line in self.process.stdout:
            self.say(line.rstrip("\n"))
            self.last = line.strip() or self.last
        self.end = time.monotonic()

    def signal(self, number: int) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)

    def wait(self, end: float) -> bool:
        """Whether it is over by then."""
        try:
            self.process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            return False
        self.reader.join(1)
        return True


def finish(running: Sequence[Running], end: float) -> list[tuple[Running, str]]:
    """Waits for all, interrupts at `end` what is not over, and kills what does not listen. What became of each."""
    try:
        late = [one for one in running if not one.wait(end)]
    except KeyboardInterrupt:
        for one in running:
            one.signal(signal.SIGINT)
        for one in running:
            if not one.wait(time.monotonic() + GRACE):
                one.signal(signal.SIGKILL)
        raise
    for one in late:
        one.signal(signal.SIGINT)
    end = time.monotonic() + GRACE
    for one in late:
        if not one.wait(end):
            one.signal(signal.SIGKILL)
            one.wait(time.monotonic() + 5)
    return [(one, "stopped" if one in late else "failed" if one.process.returncode else "ok") for one in running]


def take(step: str, results: Path, limit: float) -> bool:
    """Runs a step; whether all of it succeeded."""
    folder = ROOT / results
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + limit
    lines, good = [], True
    with (folder / f"gpu-{step}.log").open("w") as log:
        for commands in STEPS[step]:
            if time.monotonic() + 5 > end:
                lines += [f"gpu-{step}  not begun           {command.shown(results)}" for command in commands]
                good = False
                continue
            for one, outcome in finish([Running(command, results, log) for command in commands], end):
                lines += [
                    f"gpu-{step}  {outcome:8} {one.end - one.start:6.0f} s  {one.name}",
                    f"{'':12}{one.last[:160]}",
                ]
                good &= outcome == "ok"
    with (folder / "gpu-summary.txt").open("a") as summary:
        print(time.strftime("%Y-%m-%d %H:%M:%S"), *lines, sep="\n", file=summary)
    print("", "summary", *lines, sep="\n", flush=True)
    return good


def amount(command: Command) -> tuple[str, float]:
    """What a command has to do, in words, and about how many seconds it takes."""
    argv = command.argv("results")
    if "bench/run.py" in argv:
        from bench import run

        cases, rows, seconds = run.amount(argv[argv.index("bench/run.py") + 1 :])
        return f"{cases} cases, {rows} rows", seconds + 10  # for torch's own start
    if "pytest" in argv:
        import pytest

        output = io.StringIO()  # in this process: test modules are imported once for all commands
        with contextlib.redirect_stdout(output):
            pytest.main([*argv[argv.index("pytest") + 1 :], "--collect-only", "-p", "no:cacheprovider"])
        lines = output.getvalue().splitlines()
        found = next((line for line in lines[::-1] if "collected" in line), "cannot be collected")
        return re.sub(r" in [\d.]+s.*", "", found), command.seconds
    return "", command.seconds


def rehearse(step: str, results: Path) -> None:
    total = 0.0
    print(f"gpu-{step}")
    for commands in STEPS[step]:
        known = [amount(command) for command in commands]
        for command, (what, seconds) in zip(commands, known, strict=True):
            print(f"  $ {command.shown(results)}", f"      about {seconds:.0f} s  {what}".rstrip(), sep="\n")
        total += max(seconds for _, seconds in known)
    print(f"  about {total:.0f} s in all, cut off at {limit_of(step)} s", flush=True)


def main(argv: Sequence[str]) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("step", choices=[*STEPS, "all"])
    p.add_argument("--results", type=Path, default=Path("bench/results"), help="folder, of the checkout if relative")
    p.add_argument("--dry", action="store_true", help="only show what would run")
    args = p.parse_args(argv)
    steps = list(STEPS) if args.step == "all" else [args.step]
    if args.dry:
        for step in steps:
            rehearse(step, args.results)
        return 0
    import torch

    if not torch.cuda.is_available():
        p.error("torch sees no CUDA GPU; --dry (make gpu DRY=1) shows what would run")
    outcomes = [take(step, args.results, limit_of(step)) for step in steps]  # all of them, whatever becomes of one
    return 0 if all(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
