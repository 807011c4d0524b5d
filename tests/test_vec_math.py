"""exp and tanh of csrc/cpu/vec_math.h over their whole range, against numpy in higher precision; and conversions of 16-bit
types, all of them."""

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from compiler import cxx
from processor import runs

from bnext._toolchain import ARITHMETIC

ROOT = Path(__file__).parent.parent
FLAGS = {"portable": [], "avx2": ["-mavx2", "-mfma", "-mf16c"]}
FLAGS["avx512"] = [*FLAGS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
FLAGS["avx512_bf16"] = [*FLAGS["avx512"], "-mavx512bf16", "-mavx512vbmi"]
#: In units in the last place: exp rounds a sum next to 1, which is nearly all of its error; tanh is a quotient of two
#: such sums, the smaller of which has lost a bit.
ULPS = {"exp": 1.1, "tanh": 2.5, "negative": 0.0}


@pytest.fixture(scope="module", params=FLAGS)
def vec_math(request, tmp_path_factory):
    compiler = cxx()
    isa = request.param
    library = tmp_path_factory.mktemp("vec_math") / f"{isa}.so"
    header = ROOT / "csrc" / "cpu" / f"isa_{isa}.h"
    command = [compiler, "-std=c++17", "-O2", "-shared", "-fPIC", *ARITHMETIC, f'-DISA="{header}"', *FLAGS[isa]]
    subprocess.run([*command, str(ROOT / "tests" / "vec_math.cpp"), "-o", str(library)], check=True)
    if not runs(isa):
        pytest.skip(f"compiles, but this processor does not have {isa}")

    functions = ctypes.CDLL(str(library))

    def call(name, x, to=None):
        padded = np.zeros(-(-x.size // 16) * 16, x.dtype)
        padded[: x.size] = x
        out = np.empty(padded.size, to or x.dtype)
        kind = "" if to else "_float" if x.dtype == np.float32 else "_double"
        pointers = [ctypes.c_void_p(a.ctypes.data) for a in (padded, out)]
        getattr(functions, f"{name}{kind}")(*pointers, ctypes.c_int64(padded.size))
        return out[: x.size]

    return call


def points(dtype):
    """Every magnitude of either sign, every value that exp takes, and what is special about them."""
    random = np.random.default_rng(0)
    bits = np.uint32 if dtype == np.float32 else np.uint64
    anything = random.integers(0, np.iinfo(bits).max, 200_000, dtype=bits, endpoint=True).view(dtype)
    reach = -np.log(np.finfo(dtype).smallest_subnormal) + 1
    inside = random.uniform(-reach, reach, 400_000).astype(dtype)
    near = random.uniform(-2, 2, 200_000).astype(dtype)
    small = (near * dtype(2) ** random.integers(-40, 0, near.size).astype(dtype)).astype(dtype)
    halves = (np.arange(-1200, 1200) * (np.log(2) / 2)).astype(dtype)
    limits = [np.log(float(v)) for v in (np.finfo(dtype).max, np.finfo(dtype).tiny, np.finfo(dtype).smallest_subnormal)]
    steps = np.arange(-200, 201) * np.finfo(dtype).eps * 64
    edges = np.concatenate([np.asarray(limit * (1 + steps)) for limit in limits]).astype(dtype)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1, -1], dtype)
    return np.concatenate([anything, inside, near, small, halves, edges, special])


def assert_close_in_ulps(actual, exact, allowed):
    dtype = actual.dtype
    with np.errstate(over="ignore", under="ignore"):
        rounded = exact.astype(dtype)
    same = (actual == rounded) | (np.isnan(actual) & np.isnan(rounded))
    finite = np.isfinite(actual) & np.isfinite(rounded)
    with np.errstate(invalid="ignore"):
        unit = np.spacing(np.minimum(np.abs(rounded), np.nextafter(np.finfo(dtype).max, dtype.type(0)))).astype(
            exact.dtype
        )
        off = np.abs(actual.astype(exact.dtype) - exact) / unit
    bad = ~same & ~(finite & (off <= allowed))
    assert not bad.any(), f"{bad.sum()} of {bad.size} are off, the first by {off[bad][0]} units: {actual[bad][0]!r}"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("function", ["exp", "tanh", "negative"])
def test_accuracy(vec_math, function, dtype):
    if dtype == np.float64 and np.finfo(np.longdouble).nmant <= np.finfo(np.float64).nmant:
        pytest.skip("nothing more precise than float64 to compare with")
    x = points(dtype)
    with np.errstate(all="ignore"):
        exact = getattr(np, function)(x.astype(np.longdouble if dtype == np.float64 else np.float64))
        actual = vec_math(function, x)
    assert_close_in_ulps(actual, exact, ULPS[function])
    if function == "tanh":
        assert (np.abs(actual[~np.isnan(actual)]) <= 1).all()
    if function != "exp":  # odd: the sign of 0 is kept
        number = ~np.isnan(x)
        assert (np.signbit(actual) == (np.signbit(x) ^ (function == "negative")))[number].all()


HALVES = {"bf16": torch.bfloat16, "f16": torch.float16}


@pytest.mark.parametrize("name", HALVES)
def test_every_number_of_16_bits_is_widened(vec_math, name):
    bits = np.arange(1 << 16, dtype=np.uint16)
    widened = vec_math(f"widen_{name}", bits, np.float32)
    exact = torch.from_numpy(bits.view(np.int16)).view(HALVES[name]).float().numpy()
    assert np.array_equal(widened, exact, equal_nan=True)
    number = ~np.isnan(exact)
    assert np.array_equal(widened.view(np.uint32)[number], exact.view(np.uint32)[number])  # zeros' signs


@pytest.mark.parametrize("name", HALVES)
def test_floats_are_rounded_to_the_nearest_number_of_16_bits(vec_math, name):
    """Next to each number of 16 bits, in the middle to the next, and next to that: with all that is subnormal or special,
    each by itself among others."""
    every = np.arange(1 << 16, dtype=np.uint32) << 16
    below = np.array([0, 1, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    x = (every[:, None] | below).reshape(-1).view(np.float32)
    x = np.random.default_rng(0).permutation(x)
    rounded = torch.from_numpy(vec_math(f"narrow_{name}", x, np.uint16).view(np.int16)).view(HALVES[name])
    exact = torch.from_numpy(x).to(HALVES[name])
    assert torch.equal(rounded.isnan(), exact.isnan())
    number = ~exact.isnan()
    assert torch.equal(rounded[number].view(torch.int16), exact[number].view(torch.int16))
