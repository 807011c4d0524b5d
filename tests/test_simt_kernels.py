"""Every CUDA kernel and plan of bnext, executed on the CPU from its own source against a float64 oracle.

tests/simt/driver.cpp runs the cases and says what it checks; here is which cases there are. In each of
the device's modes the same few executables run all of them: plain for the numbers, sanitize for bounds
and undefined behaviour, race for ordering, unwritten memory and alignment.
"""

import random
import re
import subprocess

import pytest

from tests.simt import build

pytestmark = pytest.mark.slow

KERNELS = sorted(build.ROOT.glob("csrc/cuda/plans/*.cu"))
HOST = [build.SIMT / "driver.cpp", *sorted(build.ROOT.glob("csrc/cuda/*.cpp"))]

PLANS = ["automatic", "cooperative", "resident", "two_pass"]  # where a shape does not allow one, it gets two_pass
FORWARD = ["stats", "normalize", "forward", "eval"]
BACKWARD = ["backward_reduce", "backward_input", "backward", "backward_eval"]
DTYPES = ["f32", "f64", "f16", "bf16"]
LAYOUTS = ["planar", "interleaved"]

# n, c, s, cooperative enough to run by the hundred: one element, one value a channel, one channel, three,
# planes of 5, 7x7 and 14x14 that are not whole vectors, one off a vector in c and in s, primes, more
# channels than a tile has, more rows than a block.
SHAPES = [
    (1, 1, 1), (1, 3, 1), (2, 1, 1), (1, 1, 7), (2, 3, 5), (3, 5, 7), (2, 3, 49), (3, 6, 196), (4, 8, 16),
    (3, 16, 15), (3, 16, 17), (5, 7, 64), (7, 13, 31), (2, 64, 16), (1, 3, 1021), (33, 4, 1), (257, 3, 1),
    (64, 65, 1), (331, 8, 1), (9, 130, 4), (2, 257, 9), (37, 24, 1), (3, 33, 25), (11, 2, 128),
]  # fmt: skip

# Several blocks to a channel, so that partial results go through scratch memory and the last block; at
# full size, as an H100 would split them (sms=132).
LARGE = [
    (16, 3, 784),
    (64, 8, 196),
    (8, 64, 49),
    (2, 5, 4099),
    (1500, 16, 1),
    (700, 67, 1),
    (96, 12, 25),
    (1300, 56, 1),
]

# Matrices whose tiles of columns take several blocks, and several rounds of them where the device has little
# shared memory; the last has fewer tile_vecs in its last tile.
TALL = [(1100, 72, 1), (190, 40, 7), (300, 136, 2)]

# Planes for clusters, up to those of 16; of 49, 9, 225, 289 and 1225 elements, which are taken side by side, the last
# two in packs.
PLANES = [(10, 2, 512), (40, 8, 49), (13, 8, 9), (5, 8, 225), (3, 8, 289), (3, 8, 1225)]

# Elements there are none of.
EMPTY = [(0, 3, 8), (2, 3, 0), (0, 5, 1), (2, 0, 8)]


def line(**options):
    return " ".join(f"{key}={int(value) if isinstance(value, bool) else value}" for key, value in options.items())


def case(rng, op, dtype, layout, shape, **fixed):
    """One case with every other option drawn at random, but legal."""
    n, c, s = shape
    relu, residual = rng.choice([(False, False), (False, True), (True, False), (True, True)])
    two_dtypes = ["f32", dtype] if dtype in ("f16", "bf16") else [dtype]
    options = {
        "op": op,
        "dtype": dtype,
        "layout": layout,
        "n": n,
        "c": c,
        "s": s,
        "param": rng.choice(two_dtypes),
        "weight": rng.random() < 0.75,
        "bias": rng.random() < 0.75,
        "relu": relu,
        "residual": residual,
        "plan": rng.choice(PLANS),
        # The device to plan for: as it is, which is few multiprocessors, or an H100's; with clusters or without; with
        # little shared memory, so that cooperative tensors are much to it; granting clusters of 16, or not.
        "sms": rng.choice([0, 0, 132]),
        "cc": rng.choice([0, 0, 80]),
        "shared": rng.choice([0, 0, 0, 6 * 1024, 8 * 1024, 24 * 1024, 48 * 1024]),
        "clusters": rng.choice([0, 99]),
        "data": rng.choice(["normal", "normal", "offset", "constant", "nan"]),
        "seed": rng.randrange(1, 1000),
        "order": rng.choice([0, rng.randrange(1, 1000)]),
    }
    options |= fixed
    if options["plan"] in ("cooperative", "automatic") or (layout == "interleaved" and options["plan"] == "resident"):
        options["sms"] = rng.choice([0, 12])  # blocks that wait for each other take an OS thread each
    if options["data"] == "nan" and n * s == 1:
        options["data"] = "normal"  # the deviation of a lone NaN may be 0
    if options["data"] == "normal" and dtype != "f16" and rng.random() < 0.2:
        options["data"] = "huge"
    if op == "forward":
        # torch.nn refuses one value a channel, whose unbiased variance is 0 / 0.
        options["stats"] = n * s > 1 and c > 0 and rng.random() < 0.7
        options["counter"] = rng.random() < 0.8
        options["cumulative"] = options["stats"] and options["counter"] and rng.random() < 0.4
        options["momentum"] = rng.choice([0.1, 0.0, 1.0])
    if op in ("forward", "eval"):
        options["running"] = rng.choice(two_dtypes)
        options["mask"] = rng.random() < 0.8
        options["saves"] = rng.random() < 0.5
        options["eps"] = rng.choice([1e-5, 1e-3])
    if op in BACKWARD:
        options |= {key: rng.random() < 0.8 for key in ("dx", "dweight", "dbias", "dresidual")}
        options["ranks"] = rng.choice([1, 1, 3])
    if op == "backward_eval" and not relu and rng.random() < 0.3:
        options |= {"x": False, "dx": True, "dweight": False, "dbias": False}
    return line(**options)


def cases(op):
    """All cases of an op, the same on every run."""
    rng = random.Random(op)
    grid = [(dtype, layout) for dtype in DTYPES for layout in LAYOUTS]
    out = [case(rng, op, *where, shape) for where in grid for shape in SHAPES for _ in range(2)]
    out += [case(rng, op, *where, shape, plan="two_pass", sms=132) for where in grid for shape in LARGE]
    if op in ("forward", "backward"):
        # Planned for that many multiprocessors, channels that fit into one block take several.
        out += [case(rng, op, *where, shape, plan="resident", sms=132, cc=0) for where in grid for shape in LARGE]
        for dtype in DTYPES:
            # Enough for one tile at a time, then for two.
            for shared, shape in [(size, shape) for size in (40, 64, 100) for shape in TALL]:
                out.append(case(rng, op, dtype, "interleaved", shape, plan="resident", shared=shared * 1024))
            # From what the merges take alone on.
            for shared, shape in [(size, shape) for size in (5, 7, 14, 22, 26, 44) for shape in PLANES]:
                fixed = {"plan": "resident", "shared": shared * 1024, "sms": 132, "clusters": 99, "cc": 0}
                out.append(case(rng, op, dtype, "planar", shape, dx=True, dweight=True, **fixed))
    else:
        out += [case(rng, op, *where, rng.choice(LARGE)) for where in grid for _ in range(2)]
    out += [case(rng, op, *rng.choice(grid), shape) for shape in EMPTY]
    # What the numerics contract names, each on its own.
    for where in grid:
        out.append(case(rng, op, *where, (6, 5, 36), data="constant", relu=False, residual=False))
        out.append(case(rng, op, *where, (12, 3, 100), data="offset"))
    return out


@pytest.mark.parametrize("mode", build.MODES)
@pytest.mark.parametrize("op", FORWARD + BACKWARD)
def test_kernels(op, mode):
    driver = build.build("driver", mode, KERNELS, HOST)
    lines = cases(op)
    done = subprocess.run([driver], input="\n".join(lines), capture_output=True, text=True, timeout=600)
    printed = done.stdout.splitlines()
    bad = [text for text in printed if ": ok " not in text]
    assert done.returncode == 0 and not bad, "\n".join([*bad[-20:], done.stderr[-8000:]])
    assert len(printed) == len(lines)
    if op in ("forward", "backward"):
        plans_that_ran(printed)


def plans_that_ran(printed):
    """Each kind of plan was reached in each dtype and layout, the resident one alone, in company, and in rounds."""
    ran = {
        (*re.search(r"dtype=(\w+) layout=(\w+)", text).groups(), re.search(r": ok (\S+)", text)[1]) for text in printed
    }
    for dtype in DTYPES:
        for layout in LAYOUTS:
            plans = {plan for *where, plan in ran if where == [dtype, layout]}
            # blocks of a tile, rounds, buffers
            resident = {tuple(map(int, plan.split("/")[1:])) for plan in plans if plan.startswith("resident")}
            assert "two_pass" in plans and (1, 1, 1) in resident
            assert any(plan.startswith("cooperative") and plan != "cooperative/1" for plan in plans)
            if layout == "planar":
                assert any(blocks > 1 for blocks, _, _ in resident) and "planes/1" in plans
            else:
                in_turn = {buffers for blocks, rounds, buffers in resident if blocks > 1 and rounds > 1}
                assert in_turn == {1, 2}
    clusters = (1, 2, 4, 8, 16)
    expected = {f"planes/{blocks}" for blocks in clusters} | {f"resident/{blocks}/1/1" for blocks in clusters}
    assert {plan for *_, plan in ran} >= expected


def test_cases_reach_every_option():
    """In each dtype and layout, each option that chooses a kernel takes each of its values."""
    for op in FORWARD + BACKWARD:
        chosen = [dict(word.split("=") for word in text.split()) for text in cases(op)]
        for dtype in DTYPES:
            params = {"f64"} if dtype == "f64" else {"f32", dtype}
            values = {
                "relu": {"0", "1"},
                "residual": {"0", "1"},
                "plan": set(PLANS),
                "param": params,
                "weight": {"0", "1"},
                "bias": {"0", "1"},
            }
            for layout in LAYOUTS:
                here = [options for options in chosen if (options["dtype"], options["layout"]) == (dtype, layout)]
                for key, expected in values.items():
                    assert {options[key] for options in here} == expected
