"""What compiles the tests' own C++ programs."""

import shutil

import pytest


def cxx() -> str:
    """The C++ compiler; without one the test is skipped."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    return compiler
