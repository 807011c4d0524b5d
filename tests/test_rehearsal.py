"""`make gpu` rehearsed where there is no GPU: what it would run can be counted, compiled, interrupted and summed up."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu, probe
from bench.gpu import Command
from bnext import _toolchain
from tests.conftest import long_ones_first

ROOT = Path(__file__).resolve().parents[1]
STEPS = ["build", "smoke", "table", "probe", "tables", "test", "sanitize"]


@pytest.mark.slow
def test_the_dry_run_counts_all_that_each_step_would_do():
    command = ["make", "-s", "-C", ROOT, "gpu", "DRY=1", f"PYTHON={sys.executable}", "RESULTS=elsewhere"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "PYTEST_", "MFLAGS"))}
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    sections = re.split(r"^gpu-(\w+)\n", out, flags=re.MULTILINE)[1:]
    steps = dict(zip(sections[::2], sections[1::2], strict=True))
    assert list(steps) == STEPS
    for name, text in steps.items():
        total, limit = map(int, re.search(r"about (\d+) s in all, cut off at (\d+) s", text).groups())
        assert total <= limit and limit + gpu.GRACE < 540, name
        amounts = [
            line for line, said in re.findall(r"^  \$ (.*)\n +about \d+ s(.*)$", text, re.MULTILINE) if not said.strip()
        ]
        assert not [line for line in amounts if "pytest" in line or "bench/run.py" in line], "each has a number"
        assert not re.search(r"cannot be collected|no tests|\b0(/\d+)? (tests|cases|rows)", text), text
    assert "--json elsewhere/gpu-table.json" in steps["table"]
    tests = re.findall(r"--tool (\w+) .*\n.* (\d+)/\d+ tests", steps["sanitize"])
    assert tests[:4] == [("memcheck", "20")] * 4, "72 cases, and 8 that skip since (N, C) has one layout, come first"


def test_each_step_is_a_target():
    for step in STEPS:
        command = ["make", "-n", "-C", ROOT, f"gpu-{step}", "PYTHON=some-python"]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert f"some-python bench/gpu.py {step} --results 'bench/results'" in shown


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        gpu.main(["smoke"])
    assert stop.value.code == 2 and "torch sees no CUDA GPU" in capsys.readouterr().err.splitlines()[-1]


def code(text: str, **environment) -> Command:
    return Command(("python", "-c", text), environment=environment)


@pytest.fixture
def take(monkeypatch, tmp_path):
    """Takes a step of these commands; gives success, log and summary."""

    def take(*stages, limit: float = 60):
        monkeypatch.setitem(gpu.STEPS, "mine", list(stages))
        good = gpu.take("mine", tmp_path, limit)
        return good, (tmp_path / "gpu-mine.log").read_text(), (tmp_path / "gpu-summary.txt").read_text()

    return take


def outcomes(summary: str) -> list[str]:
    return re.findall(r"^gpu-mine  (not begun|\w+)", summary, re.MULTILINE)


def test_a_step_goes_on_after_a_failure_and_sums_up(take, capsys):
    good, log, summary = take(
        [code("print('first result'); raise SystemExit(3)")],
        [Command(("no-such-program", "--help"))],
        [code("import os; print(os.environ['SET'], os.environ.get('HOME'))", SET="set", HOME=None)],
    )
    assert not good and outcomes(summary) == ["failed", "failed", "ok"]
    assert "first result" in log and "no-such-program is not installed" in log and "set None" in log
    assert "set None" in summary, "the last line of each command"
    assert log.count("$ ") == 3 and log in capsys.readouterr().out, "what is logged is shown"
    assert take([code("print('well')")])[0]


@pytest.mark.slow
def test_late_commands_are_interrupted_and_may_save(take, monkeypatch, request):
    polite = "import time\ntry:\n  print('begun')\n  time.sleep(60)\nexcept KeyboardInterrupt:\n  print('saved')"
    deaf = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('deaf')\ntime.sleep(60)"
    start = time.monotonic()
    monkeypatch.setattr(gpu, "GRACE", 3)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as where a shell started this in the background
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    good, log, summary = take([code(polite), code(deaf), code("print('quick')")], [code("print('late')")], limit=12)
    assert time.monotonic() - start < 40
    assert not good and outcomes(summary) == ["stopped", "stopped", "ok", "not begun"]
    shown = log.splitlines()
    assert {"begun", "saved", "deaf", "quick"} <= set(shown) and "late" not in shown


def toolkit_or_skip():
    if _toolchain.find_toolkit()[0] is None:
        pytest.skip("needs nvcc")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_the_probe_compiles_without_a_warning(architecture, tmp_path):
    toolkit_or_skip()
    probe.compile_probe(architecture, tmp_path / "probe")
    used = subprocess.run([tmp_path / "probe"], capture_output=True, text=True)
    assert used.returncode == 2 and "usage: probe SECTION" in used.stderr


def test_every_key_of_the_probe_is_explained():
    source = probe.SOURCE.read_text()
    parts = re.split(r"^// ---- ([a-h]): .*$", source, flags=re.MULTILINE)[1:]
    found = dict(zip(parts[::2], parts[1::2], strict=True))
    assert list(found) == list(probe.SECTIONS)
    for letter, text in found.items():
        rows = "".join(re.findall(r"Row\(\)(.*?);", text, re.DOTALL))
        keys = set(re.findall(r'\(\s*"(\w+)",', rows))
        assert keys == set(probe.SECTIONS[letter].keys), letter
    plans = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda" / "planner").iterdir())
    named = set(re.findall(r"\bk[A-Z]\w+", " ".join(section.settles for section in probe.SECTIONS.values())))
    assert named and named == {name for name in named if re.search(rf"constexpr \w+ {name} =", plans)}


@pytest.mark.parametrize(
    ("program", "error"),
    [
        (
            "print('{\"us\": 1}', flush=True); raise SystemExit('cudaLaunch: illegal address')",
            "cudaLaunch: illegal address",
        ),
        ("import time; print('{\"us\": 1}\\n{\"us', end='', flush=True); time.sleep(60)", "not over in 2 s"),
        ("import os; print('{\"us\": 1}', flush=True); os.abort()", "ended with status -6"),
        ("print('{\"us\": 1}')", None),
    ],
)
def test_a_section_that_fails_keeps_its_rows(program, error):
    result = probe.measure([sys.executable, "-c", program], "a", 2)
    assert result["rows"] == [{"us": 1}] and result["error"] == error
    assert ("FAILED" in probe.shown("a", result)) == (error is not None)


def test_processes_begin_with_the_long_tests():
    """Parts as pytest-xdist cuts them: even ones, and in the last what is over."""
    assert "".join(long_ones_first(list("abCdeFGhijk"), str.isupper, 2)) == "CGabd" + "Fehijk"
    assert "".join(long_ones_first(list("ABCd"), str.isupper, 3)) == "A" + "B" + "Cd"
    assert long_ones_first([], str.isupper, 2) == []


@pytest.mark.slow
def test_a_broken_gpu_costs_one_test_not_its_process(tmp_path):
    """After an illegal access every call in that process fails: it ends, and xdist begins another."""
    (tmp_path / "conftest.py").write_text(
        f"exec(open({str(ROOT / 'tests' / 'conftest.py')!r}).read())\n"
        "broken = []\n"
        "torch.cuda.is_initialized = lambda: True\n"
        "torch.cuda.synchronize = lambda: [][0] if broken else None\n"
    )
    (tmp_path / "test_it.py").write_text(
        "import conftest\n"
        "def test_a(): assert not conftest.broken\n"
        "def test_b(): conftest.broken.append(1); raise RuntimeError('an illegal memory access')\n"
        "def test_c(): assert not conftest.broken\n"
        "def test_d(): assert False, 'fails, and breaks nothing'\n"
        "def test_e(): assert not conftest.broken\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-n", "1", "-p", "no:cacheprovider", tmp_path]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # torch would seed one that is there
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert "2 failed, 3 passed" in done.stdout, done.stdout
    assert (
        "test_b broke the GPU" in done.stderr + done.stdout and "an illegal memory access" in done.stderr + done.stdout
    )
