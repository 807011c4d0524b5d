"""Host code of the CUDA backend that needs no GPU, in programs of its own: counters, and errors."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from compiler import PATIENCE, cxx

ROOT = Path(__file__).resolve().parents[1]


def run(folder: Path, source: str, *flags: str) -> str:
    compiler = cxx()
    program = folder / "program"
    warnings = ("-Wall", "-Wextra", "-Werror")
    command = [compiler, "-std=c++17", "-g", "-O1", *warnings, *flags, str(ROOT / "tests" / source), "-o", str(program)]
    subprocess.run(command, check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_counters_are_shared_by_launches_that_follow_each_other_alone(tmp_path, sanitizer):
    run(tmp_path, "counter_pool.cpp", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-pthread")


def test_a_failed_call_leaves_no_error_behind(tmp_path):
    failed = "bnext::batch_norm_forward: cudaErrorSome: some error"
    assert run(tmp_path, "cuda_error.cpp", f"-I{ROOT / 'tests' / 'fake_cuda'}").splitlines() == [
        "nothing",
        failed,
        f"{failed}; bnext was not compiled for this GPU, see `python -m bnext.doctor`",
        "kept",
    ]


#: Calls whose errors are not errors here: each with what becomes of them.
HANDLED = {
    "cudaGetLastError": "takes an error",
    "cudaGetErrorName": "of one",
    "cudaGetErrorString": "of one",
    "cudaThreadExchangeStreamCaptureMode": "checked; undone in a destructor, which cannot throw",
    "cudaMalloc": "checked, after a second try",
    "cudaFree": "on the way to raising another error",
    "cudaGraphRetainUserObject": "a graph may not keep objects",
}


def test_bindings_check_every_cuda_call():
    """By its return value, in the statement that makes it."""
    for path in sorted((ROOT / "csrc" / "bindings").glob("*")):
        code = re.sub(r"//.*", "", path.read_text())
        for statement in re.split(r"[;{}]", code):
            for call in re.findall(r"\b(cuda[A-Z]\w+)\(", statement):
                used = re.search(rf"(check\(\s*|error = |destroyed = |return ){call}\(", statement)
                assert used or call in HANDLED, f"{path.name}: {statement.strip()}"
