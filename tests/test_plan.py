"""Which kernels each shape gets on each GPU: a pure function, tested without one.

`python tests/test_plan.py` writes tests/plan_table.txt anew; its diff is then part of the change.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "tests" / "plan_table.txt"
sys.path.insert(0, str(ROOT))

from bench.suites import NETWORKS  # noqa: E402

# compute capability, multiprocessors, threads and shared bytes of one, shared bytes of a block. To a plan
# an H200 is an H100.
GPUS = {
    "H100": "90 132 2048 233472 232448",
    "B200": "100 148 2048 233472 232448",
    "A100": "80 108 2048 167936 166912",
    "RTX4090": "89 128 1536 102400 101376",
    "T4": "75 40 1024 65536 65536",
}
BATCHES = (32, 64, 128, 256)


def compile_table(folder: Path) -> Path:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    program = folder / "plan_table"
    sources = [ROOT / "tests" / "plan_table.cpp", ROOT / "csrc" / "cuda" / "plan.cpp"]
    command = [compiler, "-std=c++17", "-O1", "-fsanitize=undefined", "-fno-sanitize-recover", *map(str, sources)]
    subprocess.run([*command, "-o", str(program)], check=True)
    return program


def plans(program: Path, problems: list[str]) -> list[dict]:
    run = subprocess.run([program], input="\n".join(problems), capture_output=True, text=True, check=True)
    return [json.loads(line) for line in run.stdout.splitlines()]


def describe(plan: dict) -> str:
    def grid(p: dict) -> str:
        return f"{p['tiles']}x{p['splits']}@{p['threads']}"

    if plan["kind"] == "two_pass":
        return f"T {grid(plan['reduce'])}/{plan['reduce']['shared_bytes']} {grid(plan['apply'])}"
    whole = plan["whole"]
    return f"{plan['kind'][0].upper()} {grid(whole)}/{whole['shared_bytes'] + whole['kept_bytes']}"


def table(program: Path) -> str:
    layers = dict.fromkeys(layer.features[:2] for name in ("resnet50", "resnet18", "densenet")
                           for layer in NETWORKS[name])  # fmt: skip
    rows = list(itertools.product(GPUS, ("planar", "interleaved"), ("bf16", "f32"), layers, ("forward", "backward")))
    problems = [
        f"{GPUS[gpu]} {layout} {dtype} {n} {c} {size * size} {direction} 0 0"
        for gpu, layout, dtype, (c, size), direction in rows
        for n in BATCHES
    ]
    cells = iter(describe(plan) for plan in plans(program, problems))
    lines = [
        "# The plan at batch 32, 64, 128, 256: R resident, S small, T two passes; for each launch",
        "# tiles x splits @ threads, and after / its shared memory in bytes, if it has any.",
    ]
    for gpu, layout, dtype, (c, size), direction in rows:
        lines.append(
            f"{gpu} {layout} {dtype} {c}x{size}x{size} {direction}: " + ", ".join(next(cells) for _ in BATCHES)
        )
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return compile_table(tmp_path_factory.mktemp("plan"))


def test_network_layers_get_the_plans_of_the_table(program):
    expected, actual = TABLE.read_text().splitlines(), table(program).splitlines()
    changed = [f"{a}\n  was: {e}" for e, a in zip(expected, actual, strict=False) if e != a]
    assert len(expected) == len(actual)
    assert not changed, f"{len(changed)} plans changed, among them:\n" + "\n".join(changed[:5])


def unit_size(dtype: str, masked: int) -> int:
    return 8 if masked else 16 // {"f32": 4, "f64": 8, "f16": 2, "bf16": 2}[dtype]


def check_pass(p: dict, shape: tuple[int, int, int], gpu: str) -> None:
    """What the kernels rely on: see csrc/cuda/plan.h."""
    n, c, s = shape
    assert p["threads"] % 32 == 0 and 32 <= p["threads"] <= 256
    assert p["splits"] >= 1 and p["fits"]
    # Splits cover all steps, and none is empty but the only one.
    assert p["splits"] * p["steps_per_split"] >= p["steps"]
    assert p["splits"] == 1 or (p["splits"] - 1) * p["steps_per_split"] < p["steps"] or p["kept_bytes"]
    assert p["shared_bytes"] <= 48 * 1024 and p["shared_bytes"] + p["kept_bytes"] <= int(gpu.split()[4])
    if p["columns"]:
        assert p["cols"] % p["unit"] == 0 and p["cols"] % c == 0
        assert p["tiles"] * p["lanes"] * p["unit"] >= p["cols"]
        assert (p["tiles"] - 1) * p["lanes"] * p["unit"] < p["cols"] or p["tiles"] == 0
        assert 1 <= p["lanes"] * p["lane_rows"] <= p["threads"]
        assert p["steps"] * p["cols"] >= n * c * s > (p["steps"] - 1) * p["cols"] or n * s == 0
    else:
        assert p["tiles"] == c
        assert p["stride_planes"] * p["plane_units"] + p["stride_units"] == p["threads"]
        assert p["aligned"] == (s % p["unit"] == 0)


def check_scratch(plan: dict, p: dict, state: int) -> None:
    """A partial result for each block and column, and a counter for each tile, where blocks exchange any."""
    in_cluster = not p["columns"] and p["kept_bytes"]
    if (p["splits"] > 1 or p["repeat"] > 1) and not in_cluster:
        width = p["lanes"] * p["unit"] if p["columns"] else 1
        assert plan["partial_bytes"] >= p["tiles"] * p["splits"] * width * state
        assert plan["counters"] >= (p["tiles"] if p["repeat"] == 1 else 1)


def check_resident(p: dict, gpu: str, dtype: str, tensors: int) -> None:
    capability, multiprocessors, _, shared, _ = map(int, gpu.split())
    unit_bytes = p["unit"] * 16 // unit_size(dtype, 0) * tensors
    strides = -(-p["steps_per_split"] // p["lane_rows"]) if p["columns"] else None
    slots = strides * p["threads"] if p["columns"] else p["steps_per_split"]
    assert p["kept_bytes"] == slots * unit_bytes, "a slot for each unit of a block's share"
    if p["columns"]:
        assert p["lanes"] * p["unit"] * 16 // unit_size(dtype, 0) <= 64
        # Blocks that wait for each other are on the device together.
        per_sm = min(shared // (p["kept_bytes"] + p["shared_bytes"] + 1024), 1 if dtype == "f64" else 2)
        assert p["splits"] == 1 or p["tiles"] * p["splits"] <= per_sm * multiprocessors
    else:
        assert p["splits"] in (1, 2, 4, 8)
        assert p["splits"] == 1 or capability >= 90, "clusters"


def test_every_plan_covers_its_tensor(program):
    """Random shapes, most of them awkward, under every choice of plan."""
    pick = random.Random(0)
    sizes = (0, 1, 2, 3, 7, 8, 9, 31, 49, 63, 64, 65, 100, 196, 256, 257, 784, 1000, 3136, 12544, 50176)
    problems, facts = [], []
    for _ in range(4000):
        gpu = pick.choice(list(GPUS.values()))
        layout, dtype = pick.choice(("planar", "interleaved")), pick.choice(("f32", "f64", "f16", "bf16"))
        shape = (pick.choice(sizes), pick.choice(sizes[1:14]), pick.choice(sizes))
        direction, masked, choice = pick.choice(("forward", "backward")), pick.randint(0, 1), pick.randint(0, 3)
        problems.append(" ".join(map(str, (gpu, layout, dtype, *shape, direction, masked, choice))))
        facts.append((gpu, layout, dtype, shape, direction, masked, choice))
    for problem, fact, plan in zip(problems, facts, plans(program, problems), strict=True):
        gpu, layout, dtype, shape, direction, masked, choice = fact
        unit = unit_size(dtype, masked)
        try:
            for name in ("reduce", "apply"):
                check_pass(plan[name], shape, gpu)
            assert plan["apply"]["unit"] == unit
            assert plan["apply"]["columns"] or plan["apply"]["aligned"], "elementwise planes are whole units"
            assert plan["reduce"]["unit"] == (unit if direction == "backward" else unit_size(dtype, 0))
            assert plan["reduce"]["columns"] == (layout == "interleaved")
            whole = plan["whole"]
            state = (4 if direction == "forward" else 2) * (8 if dtype == "f64" else 4)
            check_scratch(plan, plan["reduce"], state)
            if plan["kind"] != "two_pass":
                check_pass(whole, shape, gpu)
                check_scratch(plan, whole, state)
                assert not whole["columns"] or whole["repeat"] == 1, "a tile has whole channels"
            if plan["kind"] == "small":
                assert choice in (0, 1) and layout == "interleaved" and not masked
                assert whole["splits"] == 1 and whole["unit"] == 1 and whole["kept_bytes"] == 0
            elif plan["kind"] == "resident":
                check_resident(whole, gpu, dtype, 1 if direction == "forward" else 2)
                assert choice in (0, 3) and whole["unit"] == unit
                assert whole["columns"] or whole["aligned"] or not masked, "a byte of mask belongs to one block"
            elif choice == 1 and layout == "interleaved":
                assert masked or shape[0] * shape[2] >= 2**31 - 512
        except AssertionError as error:
            raise AssertionError(f"{problem}\n{plan}") from error


def test_sizes_beyond_32_bits(program):
    """2^33 elements: every count that a kernel keeps in 32 bits still fits."""
    problems = [
        f"{GPUS['H100']} {layout} bf16 {n} {c} {s} {direction} 0 0"
        for n, c, s in ((2**15, 64, 4096), (1, 1, 2**33), (2**33, 1, 1), (2**20, 2**13, 1), (8, 3, 2**28 + 1))
        for layout in ("planar", "interleaved")
        for direction in ("forward", "backward")
    ]
    for problem, plan in zip(problems, plans(program, problems), strict=True):
        assert plan["kind"] == "two_pass", problem
        assert plan["reduce"]["fits"] and plan["apply"]["fits"], problem


def test_a_problem_too_large_for_the_kernels_says_so(program):
    (plan,) = plans(program, [f"{GPUS['H100']} planar f32 1 {2**32} 1 forward 0 2"])
    assert not (plan["reduce"]["fits"] and plan["apply"]["fits"])


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        TABLE.write_text(table(compile_table(Path(folder))))
