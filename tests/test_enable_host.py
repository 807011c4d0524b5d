"""The CUDA half of bnext.enable() without a GPU: on CPU tensors, with the CPU's kernels below it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compiler import cxx
from torch.utils import cpp_extension

TESTS = Path(__file__).parent


@pytest.mark.slow
def test_the_cuda_operators_keep_to_torchs_conventions(tmp_path):
    compiler = cxx()
    library = tmp_path / "enable_cuda.so"
    torch_folder = Path(torch.__file__).parent
    includes = [f"-I{folder}" for folder in cpp_extension.include_paths()]
    link = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"]
    # Symbols are its own, also where the process has torch's CUDA kernels under the same names.
    shared = ["-shared", "-fPIC", "-fopenmp", "-Wl,-Bsymbolic"]
    command = [compiler, "-std=c++20", "-O0", *shared, *includes, str(TESTS / "enable_cuda.cpp"), "-o", str(library)]
    subprocess.run([*command, *link], check=True)

    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    program = [sys.executable, str(TESTS / "enable_cuda.py"), str(library)]
    done = subprocess.run(program, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stdout + done.stderr
