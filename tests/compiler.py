"""What compiles the tests' own C++ programs, and how long programs may take."""

import shutil

import pytest

#: Seconds: a limit on what never ends, not on slowness. Several compilers may share the machine with the tests.
PATIENCE = 1500


def cxx() -> str:
    """The C++ compiler; without one the test is skipped."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    return compiler
