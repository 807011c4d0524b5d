"""Every CUDA kernel and plan of bnext, executed on the CPU from its own source against a float64 oracle.

tests/kernel_driver.cpp runs the cases and says what it checks; here is which cases there are. In each of
two of the device's modes the same few executables run all of them: sanitize for bounds and undefined
behaviour, race for ordering, unwritten memory and alignment. (What plain sees, sanitize does, too:
tests/test_simt_device.py.)
"""

import functools
import itertools
import random
import re
import subprocess

import pytest
from compiler import PATIENCE

from tests.simt import build

pytestmark = pytest.mark.slow

KERNELS = sorted(build.ROOT.glob("csrc/cuda/plans/*.cu"))
HOST = sorted(build.ROOT.glob("csrc/cuda/**/*.cpp"))
KERNEL_DRIVER, DEVICE_DRIVER = "tests/kernel_driver.cpp", "tests/device_driver.cpp"

# The modes, each with the 16-bit type that it does without.
MODES = {"sanitize": "f16", "race": "bf16"}
PLANS = ["automatic", "cooperative", "resident", "two_pass"]  # where a shape does not allow one, it gets two_pass
FORWARD = ["stats", "normalize", "forward", "eval"]
BACKWARD = ["backward_reduce", "backward_input", "backward", "backward_eval"]
DTYPES = ["f32", "f64", "f16", "bf16"]
LAYOUTS = ["planar", "interleaved"]

# n, c, s, small enough to run by the hundred: one element, one value a channel, one channel, three,
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

# Partial results of so many blocks that they are merged in sections first: of one tile, of each of several, and, where
# channels are not whole vectors, of all tiles together.
MERGES_IN_SECTIONS = [("f32", (12000, 64, 1)), ("bf16", (5000, 256, 1)), ("f64", (5000, 67, 1))]

# Matrices whose tiles of columns take several blocks, and several rounds of them where the device has little
# shared memory; the last has fewer columns in its last tile.
TALL = [(1100, 72, 1), (190, 40, 7), (300, 136, 2)]

# Planes for clusters, up to those of 16; of 49, 9, 225, 289 and 1225 elements, which are taken side by side, the last
# two in packs.
PLANES = [(10, 2, 512), (40, 8, 49), (13, 8, 9), (5, 8, 225), (3, 8, 289), (3, 8, 1225)]

# Blocks of a cluster.
CLUSTER_SIZES = (1, 2, 4, 8, 16)


def partial_case(rng, op, dtype, act, residual, splits=2, tile_vecs=16, strides=11, last=0):
    """Tiles of which blocks have room for some strides of their share in shared memory, by the bytes of
    csrc/cuda/planner/partition.h, 8 forward and 2 backward. `last` is how many strides fewer the last block's share
    has."""
    size, acc = {"f64": 8, "f32": 4}.get(dtype, 2), 8 if dtype == "f64" else 4
    vec = 8 if residual or act not in ("none", "relu") else 16 // size
    forward = op == "forward"
    merge = acc * (2 * vec * 256 + (256 + 16 * vec if forward else 0))
    stride = 256 * vec * size * (1 if forward else 2)
    shared = merge + 2048 + (8 if forward else 2) * stride + stride // 2
    plan = f"resident:groups=1,splits={splits},tile_vecs={tile_vecs}"
    fixed = {"plan": plan, "shared": shared, "act": act, "residual": residual}
    fixed |= {"sms": 0 if splits == 2 else 12, "cc": 0, "dx": True, "dweight": True}
    rows = 256 // tile_vecs * (splits * strides - last)
    return case(rng, op, dtype, "interleaved", (rows - 11, (tile_vecs + 3) * vec, 1), **fixed)


def register_cases(rng, op, dtype, act, residual):
    """The same of blocks whose threads keep bytes in registers, by register_bytes(): all of the rest of their shares; not
    all; and of a last block that has less than registers hold, and more than shared memory does."""
    size, inputs = {"f32": 4}.get(dtype, 2), 1 if op == "forward" else 2
    kept = 384 if dtype == "f16" and residual and inputs == 2 else 512
    in_registers = kept // (size * (8 if residual else 16 // size) * inputs)
    for splits, tile_vecs, strides, last in [
        (2, 16, in_registers + 2, 0),
        (2, 16, in_registers + 12, 1),
        (5, 4, in_registers + 1, 4),
    ]:
        yield partial_case(rng, op, dtype, act, residual, splits, tile_vecs, strides, last)


# float64 that keeps 12 to 28 KB beside 33 KB of static shared memory, forward with a residual and relu.
BESIDE_STATIC = {
    "planar": [(4, 32, 49), (4, 16, 81), (4, 64, 196)],
    "interleaved": [(256, 128, 1), (300, 64, 1), (32, 64, 64)],
}

# Activations whose kernels share one instance of each plan.
GENERAL = ["relu6", "leaky_relu", "silu", "hardswish", "sigmoid", "tanh"]

# Elements there are none of.
EMPTY = [(0, 3, 8), (2, 3, 0), (0, 5, 1), (2, 0, 8)]


def line(**options):
    return " ".join(f"{key}={int(value) if isinstance(value, bool) else value}" for key, value in options.items())


def case(rng, op, dtype, layout, shape, **fixed):
    """One case with every other option drawn at random, but legal."""
    n, c, s = shape
    act, residual = rng.choice([("none", False), ("none", True), ("relu", False), ("relu", True)])
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
        "act": act,
        "residual": residual,
        "plan": rng.choice(PLANS),
        # The device to plan for: as it is, which is few multiprocessors, or an H100's; with clusters or without; with
        # little shared memory, so that small tensors are large for it; granting clusters of 16, or not.
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
        options["biased"] = options["seed"] % 3 == 0
    if op in ("forward", "eval"):
        options["running"] = rng.choice(two_dtypes)
        options["mask"] = rng.random() < 0.8
        options["saves"] = rng.random() < 0.5
        options["eps"] = rng.choice([1e-5, 1e-3])
    if op in BACKWARD:
        options |= {key: rng.random() < 0.8 for key in ("dx", "dweight", "dbias", "dresidual")}
        options["ranks"] = rng.choice([1, 1, 3])
    if op == "backward_eval" and options["act"] == "none" and rng.random() < 0.3:
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
            # Enough for some of the tiles at a time, then for all.
            for shared, shape in [(size, shape) for size in (32, 40, 64, 100) for shape in TALL]:
                out.append(case(rng, op, dtype, "interleaved", shape, plan="resident", shared=shared * 1024))
            # From what the merges take alone on.
            for shared, shape in [(size, shape) for size in (4, 5, 6, 7, 14, 22, 26, 44) for shape in PLANES]:
                fixed = {"plan": "resident", "shared": shared * 1024, "sms": 132, "clusters": 99, "cc": 0}
                out.append(case(rng, op, dtype, "planar", shape, dx=True, dweight=True, **fixed))
        # Clusters of each size, which need not be what the plan takes.
        for dtype, cluster in itertools.product(DTYPES, CLUSTER_SIZES):
            fixed = {"plan": f"resident:cluster={cluster}", "shared": 0, "sms": 132, "clusters": 99, "cc": 0}
            out.append(case(rng, op, dtype, "planar", (16, 3, 128), dx=True, dweight=True, **fixed))
            # Of tiles of columns: of narrow ones, and of those of 256 bytes, which take two blocks at least.
            shapes = itertools.product((4, 16), TALL[1:]) if cluster > 1 else [(4, (30, 40, 7)), (4, (50, 136, 2))]
            for tile_vecs, shape in shapes:
                plan = f"resident:cluster={cluster},tile_vecs={tile_vecs}"
                out.append(case(rng, op, dtype, "interleaved", shape, dx=True, dweight=True, **{**fixed, "plan": plan}))
        for dtype, (act, residual) in itertools.product(DTYPES, [("none", False), ("relu", True), ("silu", True)]):
            if (dtype, act) != ("f64", "silu"):  # which has no resident kernels
                out.append(partial_case(rng, op, dtype, act, residual))
            if dtype != "f64" and act != "silu":
                out += register_cases(rng, op, dtype, act, residual)
    else:
        out += [case(rng, op, *where, rng.choice(LARGE)) for where in grid for _ in range(2)]
    out += [case(rng, op, *rng.choice(grid), shape) for shape in EMPTY]
    for dtype, shape in MERGES_IN_SECTIONS:
        out.append(case(rng, op, dtype, "interleaved", shape, plan="two_pass", shared=0, sms=132, cc=0))
    # What the numerics contract names, each on its own.
    for where in grid:
        out.append(case(rng, op, *where, (6, 5, 36), data="constant", act="none", residual=False))
        out.append(case(rng, op, *where, (12, 3, 100), data="offset"))
    if op in ("forward", "backward"):
        device = {"shared": 0, "cc": 0, "sms": 0, "clusters": -1, "plan": "automatic"}
        for layout, shapes in BESIDE_STATIC.items():
            out += [case(rng, op, "f64", layout, shape, act="relu", residual=True, **device) for shape in shapes]
    # All activations but relu share their kernels: each of them once, and with each of the plans that there are for it.
    for where, (act, plan) in itertools.product(grid, zip(GENERAL, itertools.cycle(["resident", "two_pass"]))):
        out.append(case(rng, op, *where, rng.choice(LARGE), act=act, plan=plan))
    return out


def defines(mode):
    """The same for all executables of a mode: their kernels are compiled once."""
    return ["BNEXT_SIMT", f"BNEXT_WITHOUT={MODES[mode]}"]


@functools.cache
def driver(mode):
    return build.build("kernel_driver", mode, KERNELS, [KERNEL_DRIVER, *HOST], defines(mode))


def run(lines, mode="sanitize"):
    """What the driver printed for each case, and on stderr."""
    done = subprocess.run([driver(mode)], input="\n".join(lines), capture_output=True, text=True, timeout=1800)
    return done.stdout.splitlines(), done.stderr


def ran(lines):
    """What ran of each case, all of which must pass."""
    printed, errors = run(lines)
    assert [text for text in printed if ": ok " not in text] == [], errors
    assert len(printed) == len(lines)
    return [text.split(": ok ")[1] for text in printed]


@pytest.mark.long
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("op", FORWARD + BACKWARD)
def test_kernels(op, mode):
    lines = [text for text in cases(op) if f"dtype={MODES[mode]} " not in text]
    printed, errors = run(lines, mode)
    bad = [text for text in printed if ": ok " not in text]
    assert not bad, "\n".join([*bad[-20:], errors[-8000:]])
    assert len(printed) == len(lines)
    if op in ("forward", "backward"):
        plans_that_ran(printed, [dtype for dtype in DTYPES if dtype != MODES[mode]])
    if op in ("stats", "forward", "backward_reduce", "backward"):
        assert sum(": ok two_pass/" in text for text in printed) >= 2, "merges in sections"


def plans_that_ran(printed, dtypes):
    """Each kind of plan was reached in each of these dtypes and layouts, the resident one alone, in company, and in rounds."""
    ran = {
        (*re.search(r"dtype=(\w+) layout=(\w+)", text).groups(), re.search(r": ok (\S+)", text)[1]) for text in printed
    }
    for dtype in dtypes:
        for layout in LAYOUTS:
            plans = {plan for *where, plan in ran if where == [dtype, layout]}
            # blocks of a tile, rounds
            resident = {
                tuple(map(int, plan.split("/")[1:]))
                for plan in plans
                if plan.startswith(("resident", "partly", "registers"))
            }
            assert "two_pass" in plans and ((1, 1) in resident if layout == "planar" else "tiles/1" in plans)
            assert any(plan.startswith("cooperative") and plan != "cooperative/1" for plan in plans)
            if layout == "planar":
                assert any(blocks > 1 for blocks, _ in resident) and "packed/1" in plans
            else:
                assert any(blocks > 1 and rounds > 1 for blocks, rounds in resident)
                assert "partly/2/2" in plans
                assert dtype == "f64" or {"registers/2/2", "registers/5/2"} <= plans
    expected = {f"packed/{blocks}" for blocks in CLUSTER_SIZES} | {f"resident/{blocks}/1" for blocks in CLUSTER_SIZES}
    expected |= {f"tiles/{blocks}" for blocks in CLUSTER_SIZES if blocks > 1}
    assert {plan for *_, plan in ran} >= expected


def test_cases_reach_every_option():
    """In each dtype and layout, each option that chooses a kernel takes each of its values."""
    for op in FORWARD + BACKWARD:
        chosen = [dict(word.split("=", 1) for word in text.split()) for text in cases(op)]
        for dtype in DTYPES:
            params = {"f64"} if dtype == "f64" else {"f32", dtype}
            values = {
                "act": {"none", "relu", *GENERAL},
                "residual": {"0", "1"},
                "plan": set(PLANS),
                "param": params,
                "weight": {"0", "1"},
                "bias": {"0", "1"},
            }
            for layout in LAYOUTS:
                here = [options for options in chosen if (options["dtype"], options["layout"]) == (dtype, layout)]
                for key, expected in values.items():
                    assert {options[key].split(":")[0] for options in here} == expected


def test_means_of_many_threads():
    """In units of 2^-24 of the numbers' size. Not recentred, before the merges of threads and blocks, means would be off
    by 1.3 to 2.4 of them, and before their rounding by 2.1 to 3.8."""
    many = {"op": "stats", "plan": "two_pass", "sms": 132, "data": "normal"}
    lines = [
        line(layout=layout, n=n, c=64, s=s, seed=seed, **many)
        for layout, n, s in (("planar", 8, 1024), ("interleaved", 8192, 1))
        for seed in (1, 2, 3)
    ]
    for text in ran(lines):
        errors = {name: float(value) for name, value in re.findall(r"(\w+)=(\S+)", text)}
        assert errors["mean"] <= 1.2 and errors["mean_rest"] <= 1.7, text


@pytest.mark.parametrize("order", range(4))
def test_flags_of_groups_do_not_come_twice(order):
    """Numbers with flags stay in memory for whatever launch comes next. Each case runs twice. The first leaves states of a
    group that has then gone through 3 tiles, in all columns that its last tile did not have; the second brings another
    group to 2; whose third tile, in the third case, is where those states are."""
    first, second, third = (
        line(layout="interleaved", n=600, c=c, s=1, sms=12, order=order, seed=order + 1, plan=f"resident:{plan}")
        for c, plan in (
            (72, "groups=1,splits=2,tile_vecs=16"),
            (8, "groups=2,splits=2,tile_vecs=1"),
            (32, "groups=2,splits=2,tile_vecs=4"),
        )
    )
    for op in ("forward", "backward"):
        plans = ran([f"op={op} {case}" for case in (first, second, third)])
        assert [plan.split()[0] for plan in plans] == ["resident/2/2", "resident/2/1", "resident/2/1"]


# ---- devices that do less than they say


#: Shapes with a plan of each kind that a driver may refuse, on a device of 132 multiprocessors or of 12.
CLUSTERS = {"layout": "planar", "n": 40, "c": 8, "sms": 132, "plan": "resident"}
GROUPS = {"layout": "interleaved", "n": 1100, "c": 72, "s": 1, "sms": 12, "shared": 40 * 1024, "plan": "resident"}
GROUPS |= {"cc": 80}  # where there are clusters, they would be those
SMALL = {"layout": "interleaved", "n": 33, "c": 15, "s": 9, "plan": "cooperative"}


def both_directions(**options):
    return [line(op=op, **options) for op in ("forward", "backward")]


def test_static_shared_memory_counts_towards_48_kb():
    """float64 with a residual and relu has 33 KB of it, so that 16 KB more have to be asked for."""
    lines = [
        line(op=op, dtype="f64", param="f64", layout=layout, n=n, c=c, s=s, act="relu", residual=True, plan="resident")
        for op in ("forward", "backward")
        for layout, shapes in BESIDE_STATIC.items()
        for n, c, s in shapes
    ]
    assert all(plan.startswith(("resident", "partly", "packed", "tiles")) for plan in ran(lines))


def test_older_code_runs_without_clusters_and_overlap():
    """compute_80 PTX, compiled on a Hopper at load time, as of TORCH_CUDA_ARCH_LIST="8.0+PTX"."""
    for dtype, s in itertools.product([dtype for dtype in DTYPES if dtype != MODES["sanitize"]], (512, 49)):
        param = "f64" if dtype == "f64" else "f32"
        shape = {**CLUSTERS, "dtype": dtype, "param": param, "s": s, "shared": 30 * 1024}
        newer, older = ran(both_directions(**shape)), ran(both_directions(**shape, code=80))
        assert all(int(re.match(r"(?:resident|packed)/(\d+)", plan)[1]) > 1 for plan in newer), newer
        assert all(re.match(r"(resident|packed)/1\b|two_pass", plan) for plan in older), older
        ran(both_directions(**{**shape, "plan": "two_pass"}, code=80))
    assert all(plan.startswith(("resident/", "partly/")) for plan in ran(both_directions(**GROUPS, code=80)))
    assert all(plan.startswith("cooperative/") for plan in ran(both_directions(**SMALL, code=80)))


@pytest.mark.parametrize(
    "plan, report", [("resident:cluster=2", "calls cluster_sync"), ("two_pass", "waits for the kernel")]
)
@pytest.mark.parametrize("op", ["forward", "backward"])
def test_older_code_traps_where_clusters_or_overlap_are_forced(op, plan, report):
    printed, errors = run([line(op=op, **{**CLUSTERS, "s": 64, "plan": plan}, code=80, planned_cc=90)])
    assert ": ok" not in printed[0] and re.search(f"simt: trap: .* {report}", errors), errors


@pytest.mark.parametrize("case", [GROUPS, SMALL], ids=["resident", "cooperative"])
def test_refused_cooperative_launches_become_two_pass(case):
    """Right results, no error left behind, and asked for only once: the driver checks all three."""
    assert not any("refused" in plan for plan in ran(both_directions(**case)))
    for plan in ran(both_directions(**case, refuses=True)):
        assert plan.startswith("two_pass") and plan.endswith("refused:cooperative_launches"), plan
    for plan in ran(both_directions(**{**case, "plan": "automatic"}, refuses=True)):
        assert not plan.startswith(("cooperative", "resident/2")), plan


def test_refused_groups_become_clusters_where_there_are_some():
    assert all(plan.startswith("tiles/") for plan in ran(both_directions(**{**GROUPS, "cc": 0}, refuses=True)))


@pytest.mark.parametrize("n, s", [(40, 512), (80, 49)])
def test_refused_clusters_become_fewer_blocks_or_two_pass(n, s):
    """Of tensors that one block holds, but takes longer for."""
    small = {**CLUSTERS, "n": n, "s": s, "clusters": 0}
    assert not any("refused" in plan for plan in ran(both_directions(**small)))
    for plan in ran(both_directions(**small, largest=1)):
        assert re.match(r"(resident|packed)/1\b|two_pass", plan) and plan.endswith("refused:clusters"), plan
    # What one block cannot hold.
    for plan in ran(both_directions(**small, shared=30 * 1024, largest=1)):
        assert plan.startswith("two_pass") and plan.endswith("refused:clusters"), plan


def test_refused_clusters_of_16_leave_those_of_8():
    large = {"layout": "planar", "n": 10, "c": 2, "s": 512, "sms": 132, "shared": 8 * 1024, "plan": "resident"}
    large |= {"op": "forward", "clusters": 99}
    assert ran([line(**large)])[0].startswith("resident/16/")
    assert ran([line(**large, largest=8)])[0].endswith("refused:clusters_of_16")
    assert ran([line(**large | {"shared": 10 * 1024}, largest=8)])[0].startswith("resident/8/")


def test_devices_are_queried_prepared_and_remembered():
    """tests/device_driver.cpp: query_device, allow_kernel_resources and Device on their own."""
    executable = build.build("device_driver", "sanitize", KERNELS, [DEVICE_DRIVER, *HOST], defines("sanitize"))
    names = subprocess.run([executable], capture_output=True, text=True, check=True).stdout.split()
    assert len(names) >= 12
    for name in names:
        done = subprocess.run([executable, name], capture_output=True, text=True, timeout=PATIENCE)
        assert (done.returncode, done.stdout) == (0, f"{name}: ok\n"), done.stderr


@pytest.mark.parametrize("mode", MODES)
def test_statistics_of_several_processes_are_merged(mode):
    """tests/merge_driver.cpp."""
    executable = build.build(
        "merge_driver", mode, ["csrc/cuda/batch_norm_merge.cu"], ["tests/merge_driver.cpp"], defines(mode)
    )
    done = subprocess.run([executable], capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (0, "ok 2880\n"), done.stdout + done.stderr
