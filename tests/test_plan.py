"""Which kernels each shape gets on each GPU: a pure function, tested without one.

`python tests/test_plan.py` writes tests/plans/*.txt anew; their diff is then part of the change.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from compiler import PATIENCE, cxx

ROOT = Path(__file__).resolve().parents[1]
TABLES = ROOT / "tests" / "plans"
sys.path.insert(0, str(ROOT))

import bnext.cuda  # noqa: E402
from bench.suites import NETWORKS  # noqa: E402

GPUS = {name: " ".join(map(str, properties)) for name, properties in bnext.cuda.GPUS.items()}
KINDS = ("automatic", "resident", "cooperative", "two_pass")
BATCHES = (32, 64, 128, 256)


def compile_table(folder: Path) -> Path:
    compiler = cxx()
    program = folder / "plan_table"
    sources = [
        ROOT / "tests" / "plan_table.cpp",
        *sorted((ROOT / "csrc" / "cuda" / "planner").glob("*.cpp")),
    ]
    command = [
        compiler,
        "-std=c++17",
        "-O1",
        "-Werror=switch",
        "-fsanitize=undefined",
        "-fno-sanitize-recover",
        *map(str, sources),
    ]
    subprocess.run([*command, "-o", str(program)], check=True)
    return program


def plans(program: Path, problems: list[str]) -> list[dict]:
    run = subprocess.run([program], input="\n".join(problems), capture_output=True, text=True, check=True)
    return [json.loads(line) for line in run.stdout.splitlines()]


def rounds_of(p: dict) -> int:
    return -(-p["tiles"] // p["groups"])


def describe(plan: dict) -> str:
    def grid(p: dict) -> str:
        return f"{p['groups']}x{p['splits']}@{p['threads']}"

    if plan["kind"] == "two_pass":
        return f"T {grid(plan['reduce'])}/{plan['reduce']['shared_bytes']} {grid(plan['apply'])}"
    if plan["kind"] == "cooperative":
        return f"C {plan['blocks']}"
    p = plan["resident"]
    turns = f"*{rounds_of(p)}" if rounds_of(p) > 1 else ""
    kind = "K" if p["exchange_bytes"] else "R"
    return f"{kind} {grid(p)}{turns}/{p['shared_bytes'] + p['resident_bytes'] + p['exchange_bytes']}"


LEGEND = """\
# R resident (K: of interleaved tiles in clusters), C cooperative (and its blocks), T two passes; for each launch
# tiles x splits @ threads, and after / its shared memory in bytes, if it has any. After *, how often a block takes a
# tile, if more than once.
"""


def table(program: Path, gpu: str) -> str:
    """The plans of ResNet-50's layers on one GPU: how many there are of each kind, then each."""
    layers = list(dict.fromkeys(layer.features[:2] for layer in NETWORKS["resnet50"]))
    blocks = list(itertools.product(("planar", "interleaved"), ("bf16", "f32"), ("forward", "backward")))
    problems = [
        f"{GPUS[gpu]} {layout} {dtype} {n} {c} {size * size} {direction} 0 automatic 0"
        for layout, dtype, direction in blocks
        for c, size in layers
        for n in BATCHES
    ]
    cells = [describe(plan) for plan in plans(program, problems)]
    of_a_block = len(layers) * len(BATCHES)
    lines = [f"# ResNet-50 on {gpu}, {len(layers)} shapes at batch {', '.join(map(str, BATCHES))}: R, C and T"]
    texts = []
    for i, block in enumerate(blocks):
        mine = cells[i * of_a_block : (i + 1) * of_a_block]
        counts = [[cell[0].replace("K", "R") for cell in mine[k :: len(BATCHES)]] for k in range(len(BATCHES))]
        summary = ", ".join("/".join(str(kinds.count(kind)) for kind in "RCT") for kinds in counts)
        lines.append(f"#   {' '.join(block):28} {summary}")
        texts += ["", " ".join(block)]
        for j, (c, size) in enumerate(layers):
            row = mine[j * len(BATCHES) : (j + 1) * len(BATCHES)]
            texts.append(f"  {c}x{size}x{size}".ljust(15) + " | ".join(f"{cell:28}" for cell in row).rstrip())
    return "\n".join([*lines, LEGEND.rstrip(), *texts]) + "\n"


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return compile_table(tmp_path_factory.mktemp("plan"))


@pytest.mark.parametrize("gpu", GPUS)
def test_network_layers_get_the_plans_of_the_table(program, gpu):
    expected, actual = (TABLES / f"{gpu}.txt").read_text().splitlines(), table(program, gpu).splitlines()
    changed = [f"{a}\n  was: {e}" for e, a in zip(expected, actual, strict=False) if e != a]
    assert len(expected) == len(actual)
    assert not changed, f"{len(changed)} lines changed, among them:\n" + "\n".join(changed[:5])


def vec_elements_of(dtype: str, masked: int) -> int:
    return 8 if masked else 16 // {"f32": 4, "f64": 8, "f16": 2, "bf16": 2}[dtype]


def check_pass(p: dict, shape: tuple[int, int, int], gpu: str, merges: bool = True) -> None:
    """What the kernels rely on: see csrc/cuda/planner/partition.h."""
    n, c, s = shape
    assert p["threads"] % 32 == 0 and 32 <= p["threads"] <= 256
    assert p["splits"] >= 1 and p["fits"] == (n * c * s <= p["vec"] * (2**32 - 1))
    # Splits cover all steps, and none is empty but the only one.
    assert p["splits"] * p["steps_per_split"] >= p["steps"]
    assert p["splits"] == 1 or (p["splits"] - 1) * p["steps_per_split"] < p["steps"] or p["resident_bytes"]
    assert p["shared_bytes"] <= 48 * 1024
    assert p["shared_bytes"] + p["resident_bytes"] + p["exchange_bytes"] <= int(gpu.split()[3])
    assert 1 <= p["groups"] <= p["tiles"] or p["tiles"] == p["groups"] == 0
    assert 0 <= p["l2_steps"] <= p["steps_per_split"]
    if p["columns"]:
        assert p["cols"] % p["vec"] == 0 and p["cols"] % c == 0
        tile = p["tile_vecs"] * p["vec"] * max(1, p["packs"])
        assert p["tiles"] * tile >= p["cols"]
        assert (p["tiles"] - 1) * tile < p["cols"] or p["tiles"] == 0
        assert not p["tile_channels"] or (tile == p["tile_channels"] * s and p["tiles"] * p["tile_channels"] == c)
        assert p["tile_vecs"] <= p["row_threads"] and 1 <= p["row_threads"] * p["thread_rows"] <= p["threads"]
        if merges and not p["packs"]:  # merge_rows() exchanges states between lanes, and has slots for so many
            assert p["row_threads"] in (1, 2, 4, 8, 16)
        assert p["packs"] or p["tile_vecs"] <= 16
        assert p["steps"] * p["cols"] >= n * c * s > (p["steps"] - 1) * p["cols"] or n * s == 0
    else:
        assert p["tiles"] == c
        assert p["stride_planes"] * p["plane_vecs"] + p["stride_vecs"] == p["threads"]
        assert p["aligned"] == (s % p["vec"] == 0)


def check_scratch(plan: dict, p: dict, numbers: int, accumulator: int) -> None:
    """A partial result of so many numbers for each block and column, where blocks exchange any, with a counter for each
    tile and each section of its splits; or with a flag to each 8 bytes, and so two numbers for each column of a group,
    behind a number for each of 256 groups."""
    width = p["tile_vecs"] * p["vec"] if p["columns"] else 1
    exchanges = (p["splits"] > 1 or p["repeat"] > 1) and not p["clustered"]
    states = p["groups"] * p["splits"] * width * numbers
    flagged = 256 * 8 + 2 * (states + p["groups"] * width * 2) * accumulator
    if exchanges and plan["kind"] != "resident":
        assert plan["partial_bytes"] == p["tiles"] * p["splits"] * width * numbers * accumulator
        sections = -(-p["splits"] // p["merge_section"]) if p["merge_section"] > 1 else 0
        assert plan["counters"] == p["tiles"] * (1 + sections) + (plan["kind"] == "cooperative")
        assert plan["flagged_bytes"] == 0
    else:
        assert plan["partial_bytes"] == 0 and plan["counters"] == (plan["kind"] == "cooperative"), (
            "no allocation for it"
        )
        assert plan["flagged_bytes"] == (flagged if exchanges else 0)


def check_sections(p: dict, numbers: int, accumulator: int) -> None:
    """What one block merges, of a section or of all sections, its threads load in one go, or two; unless a channel's
    columns lie in so many tiles that even one partial result of each is more."""
    width = p["tile_vecs"] * p["vec"] if p["columns"] else 1
    together = p["splits"] * (1 if p["repeat"] == 1 else p["tiles"])
    at_once, section = 32 * 1024 // (numbers * accumulator), p["merge_section"]
    if together * width <= 2 * at_once or not p["columns"]:
        assert section == 1
        return
    sections = together // p["splits"] * -(-p["splits"] // section)
    assert 1 < section <= p["splits"] and section * width <= 2 * at_once
    assert sections * width <= 2 * at_once or sections == p["tiles"]


def check_resident(p: dict, gpu: str, dtype: str, tensors: int, margin: int, asked: bool = False) -> None:
    capability, multiprocessors, shared, _, _, _, *together = map(int, gpu.split())
    vec_bytes = p["vec"] * 16 // vec_elements_of(dtype, 0) * tensors
    strides = -(-p["steps_per_split"] // p["thread_rows"]) if p["columns"] else None
    slots = strides * p["threads"] if p["columns"] else p["steps_per_split"]
    share = max(1, p["packs"]) * slots * vec_bytes
    # A slot for each vec of a block's share, or a register, or it is read again. What a block keeps of some is whole
    # chunks, whatever the kernel's are.
    chunk = (8 if tensors == 1 else 2) * p["threads"] * vec_bytes
    in_registers = p["register_vecs"] * p["threads"] * vec_bytes
    spare = p["resident_bytes"] + in_registers + p["reread_bytes"] - share
    assert 0 <= spare < (chunk if in_registers and not p["reread_bytes"] else 1)
    if p["reread_bytes"] or in_registers:
        assert p["columns"] and not p["clustered"] and p["splits"] > 1
        assert p["resident_bytes"] % chunk == 0 < p["resident_bytes"]
    if in_registers:
        assert p["register_vecs"] * vec_bytes in (384, 512) and dtype != "f64"
        assert p["groups"] * p["splits"] <= multiprocessors - margin, "a block to a multiprocessor"
        assert p["resident_bytes"] + p["shared_bytes"] <= shared
    if not p["reread_bytes"]:
        assert p["l2_steps"] == 0
    if not p["clustered"]:
        assert p["repeat"] == 1, "a tile has whole channels"
        # Blocks that wait for each other are on the device together.
        per_sm = min(shared // (p["resident_bytes"] + p["shared_bytes"] + 1024), 1 if dtype == "f64" else 2)
        assert p["splits"] > 1 and p["groups"] * p["splits"] <= per_sm * max(1, multiprocessors - margin)
    else:
        assert p["groups"] == p["tiles"]
        assert p["columns"] == (p["tile_channels"] > 0 or p["exchange_bytes"] > 0), "whole planes, or columns"
        assert p["tile_channels"] <= 8 and p["splits"] <= p["steps"]
        if p["exchange_bytes"]:
            state = (4 if tensors == 1 else 2) * (8 if dtype == "f64" else 4)
            width = p["tile_vecs"] * p["vec"]
            assert not p["tile_channels"] and p["repeat"] == 1 and p["exchange_bytes"] == width * state
            assert p["threads"] >= width, "a thread to each channel"
        assert p["splits"] == 1 or (capability >= 90 and together[(2, 4, 8, 16).index(p["splits"])] > 0), "clusters"


def check_passes(
    plan: dict, gpu: str, layout: str, dtype: str, shape: tuple[int, int, int], direction: str, masked: int
) -> None:
    vec, reduce, apply = vec_elements_of(dtype, masked), plan["reduce"], plan["apply"]
    for each in (reduce, apply):
        check_pass(each, shape, gpu, merges=each is reduce)
        assert each["groups"] == each["tiles"] and each["resident_bytes"] == 0
    assert apply["vec"] == vec
    assert apply["columns"] or apply["aligned"], "elementwise planes are whole vectors"
    assert apply["pdl"] == (int(gpu.split()[0]) >= 90) and not reduce["pdl"]
    assert not reduce["starts_next"] and not apply["starts_next"], "a stage may be on its own"
    assert reduce["vec"] == (vec if direction == "backward" else vec_elements_of(dtype, 0))
    assert reduce["columns"] == (layout == "interleaved")


def test_every_plan_covers_its_tensor(program):
    """Random shapes, most of them awkward, under every choice of plan."""
    pick = random.Random(0)
    sizes = (0, 1, 2, 3, 7, 8, 9, 31, 49, 63, 64, 65, 100, 196, 256, 257, 784, 1000, 3136, 12544, 50176)
    problems, facts = [], []
    for _ in range(6000):
        gpu = pick.choice(list(GPUS.values()))
        if gpu.startswith("90"):
            gpu = " ".join([*gpu.split()[:-1], pick.choice(("0", "6", "8"))])
        layout, dtype = pick.choice(("planar", "interleaved")), pick.choice(("f32", "f64", "f16", "bf16"))
        shape = (pick.choice(sizes), pick.choice((*sizes[1:14], 512, 2048)), pick.choice(sizes))
        direction, masked, kind = pick.choice(("forward", "backward")), pick.randint(0, 1), pick.choice(list(KINDS))
        margin = pick.choice((0, 0, 16, 1000))
        problems.append(" ".join(map(str, (gpu, layout, dtype, *shape, direction, masked, kind, margin))))
        facts.append((gpu, layout, dtype, shape, direction, masked, kind, margin))
    for problem, fact, plan in zip(problems, facts, plans(program, problems), strict=True):
        gpu, layout, dtype, shape, direction, masked, kind, margin = fact
        vec, numel = vec_elements_of(dtype, masked), shape[0] * shape[1] * shape[2]
        tensors = 1 if direction == "forward" else 2
        overlap = int(gpu.split()[0]) >= 90
        try:
            if plan["kind"] != "resident":
                check_passes(plan, *fact[:6])
            merging = plan["resident" if plan["kind"] == "resident" else "reduce"]
            check_scratch(plan, merging, 4 if direction == "forward" else 2, 8 if dtype == "f64" else 4)
            if plan["kind"] != "resident":
                check_sections(merging, 4 if direction == "forward" else 2, 8 if dtype == "f64" else 4)
            assert kind in ("automatic", plan["kind"]) or plan["kind"] == "two_pass"
            assert bool(plan["refusal"]) == (kind not in ("automatic", plan["kind"])), "silence or a reason"
            assert plan["cluster"] == (merging["splits"] if merging["clustered"] else 1)
            together = plan["kind"] == "cooperative" or (plan["kind"] == "resident" and not merging["clustered"])
            assert plan["cooperative"] == together, "blocks that wait for each other"
            if plan["kind"] == "cooperative":
                assert plan["reduce"]["threads"] == plan["apply"]["threads"] == 256
                assert 1 <= plan["blocks"] <= max(1, int(gpu.split()[1]) - margin)
                assert plan["counters"] > (plan["reduce"]["tiles"] if plan["reduce"]["splits"] > 1 else 0)
            elif plan["kind"] == "resident":
                resident = plan["resident"]
                check_pass(resident, shape, gpu)
                check_resident(resident, gpu, dtype, tensors, margin)
                assert resident["vec"] == vec
            else:
                assert kind != "cooperative" or numel == 0
                small = 0 < numel * tensors * 16 // vec_elements_of(dtype, 0) <= 2 * 1024 * 1024
                if kind == "automatic" and small and not overlap:
                    raise AssertionError("a small tensor takes one launch where two would not overlap")
            if kind == "automatic" and overlap:
                assert plan["kind"] != "cooperative", "two launches that overlap take less time"
        except AssertionError as error:
            raise AssertionError(f"{problem}\n{plan}") from error


# ---- plans that are asked for


def choices(program: Path, texts: list[str]) -> list[str]:
    run = subprocess.run(
        [program, "choices"], input="".join(f"{text}\n" for text in texts), capture_output=True, text=True, check=True
    )
    return run.stdout.splitlines()


def test_choices_are_read_as_they_are_written(program):
    texts = ["automatic", "resident", "cooperative", "two_pass", "resident:cluster=16", "resident:splits=65535"]
    texts += ["resident:groups=2,splits=33,tile_vecs=16", "resident:cluster=2,tile_vecs=4"]
    assert choices(program, texts) == texts
    assert choices(program, ["resident:tile_vecs=8,groups=12"]) == ["resident:groups=12,tile_vecs=8"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("fast", "plan should be 'automatic', 'resident', 'cooperative' or 'two_pass', not 'fast'"),
        ("", "plan should be 'automatic', 'resident', 'cooperative' or 'two_pass', not ''"),
        ("cooperative:cluster=2", "only plan 'resident' has details, got 'cooperative:cluster=2'"),
        (
            "resident:",
            "should be cluster=NUMBER, groups=NUMBER, splits=NUMBER or tile_vecs=NUMBER, not ''",
        ),
        ("resident:width=2", "or tile_vecs=NUMBER, not 'width=2'"),
        ("resident:tile_vecs=8,", "or tile_vecs=NUMBER, not ''"),
        ("resident:cluster=3", "cluster of plan 'resident' should be 1, 2, 4, 8 or 16, not '3'"),
        ("resident:cluster=32", "should be 1, 2, 4, 8 or 16, not '32'"),
        ("resident:cluster", "should be 1, 2, 4, 8 or 16, not ''"),
        ("resident:tile_vecs=0", "tile_vecs of plan 'resident' should be from 1 to 16, not '0'"),
        ("resident:tile_vecs=17", "tile_vecs of plan 'resident' should be from 1 to 16, not '17'"),
        ("resident:groups=65536", "groups of plan 'resident' should be from 1 to 65535, not '65536'"),
        ("resident:splits=-1", "splits of plan 'resident' should be from 1 to 65535, not '-1'"),
        ("resident:splits=99999999999999999999", "not '99999999999999999999'"),
        ("resident:splits=2,splits=2", "splits of plan 'resident' is given twice"),
        (
            "resident:cluster=2,groups=4",
            "plan 'resident' has clusters, or groups and splits, got 'resident:cluster=2,groups=4'",
        ),
    ],
)
def test_a_choice_that_is_none_is_explained(program, text, message):
    (answer,) = choices(program, [text])
    assert answer.startswith("error: ") and message in answer


def detail(text: str) -> dict[str, int]:
    return {name: int(value) for name, value in (item.split("=") for item in text.split(":")[1].split(","))}


def test_details_are_taken_to_the_letter_or_refused(program):
    """Random details on random shapes; a plan that has them is one that the kernels can run."""
    pick = random.Random(1)
    problems, facts = [], []
    for _ in range(6000):
        gpu = pick.choice(list(GPUS.values()))
        if gpu.startswith("90"):
            gpu = " ".join([*gpu.split()[:-1], pick.choice(("0", "6"))])
        layout, dtype = pick.choice(("planar", "interleaved")), pick.choice(("f32", "f64", "f16", "bf16"))
        shape = pick.choice((1, 8, 32, 64)), pick.choice((8, 64, 256, 2048)), pick.choice((2, 49, 196, 784, 3136))
        direction, masked, margin = pick.choice(("forward", "backward")), pick.randint(0, 1), pick.choice((0, 0, 16))
        if layout == "planar":
            wish = f"resident:cluster={pick.choice((1, 2, 4, 8, 16))}"
        else:
            some = {
                "groups": (1, 2, 3, 16),
                "splits": (1, 2, 16, 33, 132),
                "cluster": (2, 4, 8, 16),
                "tile_vecs": (1, 4, 6, 8, 16),
            }
            names = pick.sample(["cluster", "tile_vecs"], pick.randint(1, 2))
            if pick.random() < 0.6:
                names = pick.sample(["groups", "splits", "tile_vecs"], pick.randint(1, 3))
            wish = "resident:" + ",".join(f"{name}={pick.choice(some[name])}" for name in names)
        problems.append(" ".join(map(str, (gpu, layout, dtype, *shape, direction, masked, wish, margin))))
        facts.append((gpu, layout, dtype, shape, direction, wish, margin))
    taken = {"planar": 0, "interleaved": 0}
    for problem, fact, plan in zip(problems, facts, plans(program, problems), strict=True):
        gpu, layout, dtype, shape, direction, wish, margin = fact
        try:
            assert plan["kind"] == ("two_pass" if plan["refusal"] else "resident")
            if plan["refusal"]:
                continue
            taken[layout] += 1
            resident = plan["resident"]
            for name, value in detail(wish).items():
                assert resident["splits" if name == "cluster" else name] == value
            check_pass(resident, shape, gpu)
            check_resident(resident, gpu, dtype, 1 if direction == "forward" else 2, margin, asked=True)
            check_scratch(plan, resident, 4 if direction == "forward" else 2, 8 if dtype == "f64" else 4)
        except AssertionError as error:
            raise AssertionError(f"{problem}\n{plan}") from error
    assert min(taken.values()) > 500, taken


def test_what_a_refusal_offers_is_taken(program):
    H100 = GPUS["H100"]
    asked = {
        "planar bf16 64 64 3136 forward 0 resident:cluster=1 0": "resident:cluster=2",
        "planar bf16 256 64 3136 forward 0 resident:cluster=4 0": "resident:cluster=16",
        "interleaved bf16 64 256 3136 forward 0 resident:groups=9 0": "resident:groups=",
        "interleaved bf16 64 256 3136 forward 0 resident:splits=400 0": "resident:groups=",
        "interleaved bf16 16 65536 49 forward 0 resident:groups=3000 0": "resident:cluster=1,tile_vecs=16",
    }
    for problem, offer in asked.items():
        (plan,) = plans(program, [f"{H100} {problem}"])
        offered = plan["refusal"].split("'")[1]
        assert "it does not fit 132 multiprocessors of 233472 bytes of shared memory" in plan["refusal"]
        assert offered.startswith(offer)
        head, _, tail = problem.rpartition("resident:")
        (plan,) = plans(program, [f"{H100} {head}{offered} 0"])
        assert plan["kind"] == "resident" and not plan["refusal"]


@pytest.mark.parametrize(
    "problem, reason",
    [
        ("planar bf16 64 64 3136 forward 0 resident:tile_vecs=4 0", "in a planar layout, the one detail is cluster"),
        ("interleaved bf16 64 64 3136 forward 0 resident:cluster=2 0", "it does not fit 132 multiprocessors"),
        ("planar f64 64 2 50176 forward 0 resident:cluster=8 0", "nor does any other 'resident'"),
        ("planar f64 64 2 50176 forward 0 resident 0", "its channels do not fit 132 multiprocessors of 233472 bytes"),
        ("interleaved bf16 64 3 3136 forward 0 resident 0", "or its rows are not whole 16-byte vectors"),
        ("interleaved bf16 0 64 3136 forward 0 cooperative 0", "it is empty"),
    ],
)
def test_refusals_say_why(program, problem, reason):
    (plan,) = plans(program, [f"{GPUS['H100']} {problem}"])
    assert plan["kind"] == "two_pass" and reason in plan["refusal"]


def test_clusters_are_refused_below_9_0(program):
    for cluster, kind in ((1, "resident"), (2, "two_pass")):
        (plan,) = plans(program, [f"{GPUS['A100']} planar bf16 8 64 3136 forward 0 resident:cluster={cluster} 0"])
        assert plan["kind"] == kind
        assert plan["refusal"] == ("" if cluster == 1 else "clusters need compute capability 9.0")


def test_plans_describe_themselves(program):
    said = {
        "planar bf16 64 64 3136 forward 0 automatic 0": "resident: 1 launch of 64 tiles, 2 blocks of 256 threads each, "
        "in clusters; 204800 bytes of shared memory a block",
        "planar bf16 256 64 12544 backward 0 automatic 0": "two_pass: 2 launches, of 64 tiles, 6 blocks of 256 threads "
        "each, and of 64 tiles, 196 blocks of 256 threads each; the second overlaps the first; partial results of 3072 "
        "bytes",
        "interleaved f32 8 3 361 forward 0 cooperative 0": "cooperative: 1 launch of ",
        "interleaved bf16 64 64 3136 forward 0 resident 0": "1 tile, 131 blocks of 256 threads each; 214528 bytes of "
        "shared memory a block; an exchange of 271360 bytes; predicted: ",
        "interleaved bf16 64 512 784 forward 0 resident 0": "4 tiles, 33 blocks of 256 threads each, 65536 bytes a block "
        "read again; 214528 bytes of shared memory a block, and 32 vectors of each input in each thread's registers; an "
        "exchange of ",
        "interleaved bf16 64 256 3136 backward 0 resident 0": "4 tiles, 131 blocks of 256 threads each, 1 at a time, ",
        "interleaved bf16 64 2048 49 forward 0 automatic 0": "64 tiles, 2 blocks of 256 threads each, in clusters; ",
    }
    for problem, text in said.items():
        (plan,) = plans(program, [f"{GPUS['H100']} {problem}"])
        assert text in plan["text"]


def test_hoppers_and_blackwells_read_resnet50_once(program):
    """If they are asked to, at batch 32, in bf16: all layers, in both layouts, with and without a mask to write or to
    read; but for channels_last of 112x112, 56x56 and 28x28, of which some may be read twice."""
    layers = sorted({layer.features[:2] for layer in NETWORKS["resnet50"]})
    cases = list(
        itertools.product(("H100", "B200"), ("planar", "interleaved"), ("forward", "backward"), (0, 1), layers)
    )
    problems = [
        f"{GPUS[gpu]} {layout} bf16 32 {c} {size * size} {direction} {masked} resident 0"
        for gpu, layout, direction, masked, (c, size) in cases
    ]
    found = zip(cases, plans(program, problems), strict=True)
    found = list(found)
    assert {plan["kind"] for _, plan in found} == {"resident"}
    not_once = {(layout, size) for (_, layout, _, _, (_, size)), plan in found if plan["resident"]["reread_bytes"]}
    assert not_once == {("interleaved", size) for size in (112, 56, 28)}


def choice(plan: dict) -> str:
    p = plan["resident"]
    detail = f"cluster={p['splits']}" if p["clustered"] else f"groups={p['groups']}"
    detail += f",tile_vecs={p['tile_vecs']}" if p["columns"] and not p["tile_channels"] else ""
    return f"resident:{detail}" if plan["kind"] == "resident" else plan["kind"]


def named(plan: dict) -> str:
    """As the file of measured times has it."""
    splits = "" if plan["resident"]["clustered"] else f",splits={plan['resident']['splits']}"
    return choice(plan).replace(",tile", f"{splits},tile")


def predicted(plan: dict) -> float:
    return float(re.search(rf"{plan['kind']} ([\d.]+) us", plan["text"].split("predicted:")[1])[1])


@pytest.mark.parametrize(
    "layout, problems, mean, worst", [("planar", 34, 1.005, 1.05), ("interleaved", 78, 1.01, 1.065)]
)
def test_automatic_plans_took_little_longer_than_the_best(program, layout, problems, mean, worst):
    """Of those that an H100 was forced to (bench/results/h100-forced.txt); and about as long as predicted."""
    measured: dict[str, dict[str, float]] = {}
    for line in (ROOT / "bench" / "results" / "h100-forced.txt").read_text().splitlines():
        if not line.startswith("#") and f" {layout} " in line:
            direction, _, n, c, s, fused, plan, us = line.split()
            problem = f"{GPUS['H100']} {layout} bf16 {n} {c} {s} {direction} {int(fused == 'fused')} automatic 0"
            measured.setdefault(problem, {})[plan] = float(us)
    chosen = dict(zip(measured, plans(program, measured), strict=True))
    # Not all sizes of tiles were forced on all problems.
    of = {problem: times for problem, times in measured.items() if named(chosen[problem]) in times and len(times) > 1}
    assert len(of) >= problems
    longer = {problem: times[named(chosen[problem])] / min(times.values()) for problem, times in of.items()}
    assert statistics.mean(longer.values()) <= mean
    assert max(longer.values()) <= worst, max(longer, key=longer.get)
    off = [predicted(chosen[problem]) / times[named(chosen[problem])] for problem, times in of.items()]
    assert statistics.quantiles(off, n=20)[0] >= 0.8 and statistics.quantiles(off, n=20)[-1] <= 1.25


def test_plans_are_those_that_took_the_least_time(program):
    """On an H100 (bench/results/h100-*.json), where the difference is more than a few percent."""
    fastest = {
        "planar bf16 64 64 12544 forward": "resident:cluster=16",
        "planar bf16 64 64 12544 backward": "resident:cluster=16",
        "planar bf16 256 64 12544 backward": "two_pass",  # a channel of it fits no cluster
        "planar bf16 64 64 3136 forward": "resident:cluster=2",  # 64 of 66 that there are together
        "planar bf16 64 64 3136 backward": "resident:cluster=8",
        "planar bf16 32 256 3136 forward": "resident:cluster=1",
        "planar bf16 64 512 784 forward": "resident:cluster=1",
        "planar bf16 64 256 196 forward": "resident:cluster=1",
        "planar bf16 64 2048 49 backward": "resident:cluster=1",
        "interleaved bf16 64 64 3136 forward": "resident:groups=1,tile_vecs=8",
        "interleaved bf16 64 512 784 forward": "resident:groups=4,tile_vecs=16",  # of which some is in registers
        "interleaved bf16 64 128 784 backward": "resident:groups=2,tile_vecs=8",
        "interleaved bf16 64 1024 196 backward": "resident:groups=8,tile_vecs=16",
        "interleaved bf16 64 256 3136 forward": "resident:groups=1,tile_vecs=16",  # of which some is read again
        "interleaved bf16 64 2048 49 forward": "resident:cluster=2,tile_vecs=4",
        "interleaved bf16 64 2048 49 backward": "resident:groups=32,tile_vecs=8",
        "interleaved bf16 8 2048 49 forward": "resident:cluster=1,tile_vecs=4",
        # With a residual and relu: blocks that are alone read the residual at less than the memory's rate.
        "planar bf16 64 512 784 forward fused": "resident:cluster=1",
        "interleaved bf16 64 64 3136 forward fused": "resident:groups=1,tile_vecs=8",
    }

    asked = [f"{problem.removesuffix(' fused')} {int(problem.endswith('fused'))}" for problem in fastest]
    found = plans(program, [f"{GPUS['H100']} {problem} automatic 0" for problem in asked])
    assert {problem: choice(plan) for problem, plan in zip(fastest, found, strict=True)} == fastest


def test_what_waves_of_clusters_do_for_each_other(program):
    """The second block of a multiprocessor waits for as long as the first takes to load, at the rate of a copy; and all
    fetch some of what the next wave loads."""
    late = {
        "planar bf16 64 512 784 forward": (264, True),
        "planar bf16 64 1024 196 forward": (264, True),  # packed planes
        "planar bf16 64 256 3136 backward": (30, True),  # clusters of 8
        "planar bf16 64 256 784 forward": (0, False),  # all are there together
        "planar bf16 64 256 3136 forward": (66, False),  # a block to a multiprocessor
        "interleaved bf16 64 512 784 backward": (0, False),
    }
    for problem, plan in zip(late, plans(program, [f"{GPUS['H100']} {p} 0 resident 0" for p in late]), strict=True):
        first_wave, cycles, prefetched = plan["resident"]["late"]
        bandwidth, multiprocessors = bnext.cuda.GPUS["H100"][5], bnext.cuda.GPUS["H100"][1]
        assert (first_wave, cycles > 0) == late[problem], problem
        us = plan["resident"]["resident_bytes"] * multiprocessors / bandwidth
        assert cycles in (0, int(1700 * us))
        # All threads that are there together, of what an H100 copies in 2.7 us.
        assert bool(prefetched) == bool(first_wave)
        vec_bytes = 32 if "backward" in problem else 16
        threads = first_wave * plan["resident"]["splits"] * plan["resident"]["threads"]
        assert not prefetched or 0.8 * 2.7 * bandwidth <= prefetched * threads * vec_bytes <= 2.7 * bandwidth


def test_awkward_planes_do_not_take_long_to_plan(program):
    """Of a prime number of elements, and of as many divisors as there can be."""
    problems = [f"{GPUS['H100']} planar bf16 2 8 {s} forward 0 automatic 0" for s in (2**31 - 1, 735134400)] * 1000
    # In seconds of the processor, whatever else it does meanwhile: they take 0.1.
    limited = ["sh", "-c", 'ulimit -t 10 && exec "$0"', program]
    subprocess.run(limited, input="\n".join(problems), text=True, check=True, timeout=PATIENCE, capture_output=True)


def test_clusters_of_16_are_taken_where_enough_of_them_fit(program):
    """64x112x112 at batch 64, backward: 1.6 MB of x and as much of dy a channel."""
    for granted, kind in ((0, "two_pass"), (3, "two_pass"), (7, "resident")):
        gpu = " ".join([*GPUS["H100"].split()[:-1], str(granted)])
        (plan,) = plans(program, [f"{gpu} planar bf16 64 64 12544 backward 0 automatic 0"])
        assert plan["kind"] == kind, granted
        assert kind == "two_pass" or plan["resident"]["splits"] == 16


def test_the_second_pass_finds_half_an_l2_cache_of_the_first(program):
    problem = f"{GPUS['H100']} planar f32 256 64 12544 forward 0 two_pass 0"
    (plan,) = plans(program, [problem])
    reduce = plan["reduce"]
    retained = reduce["tiles"] * reduce["splits"] * reduce["l2_steps"] * 16
    assert 0.9 < retained / (52428800 / 2) < 1.01


def test_sizes_beyond_32_bits(program):
    """2^33 elements: every count that a kernel keeps in 32 bits still fits."""
    problems = [
        f"{GPUS['H100']} {layout} bf16 {n} {c} {s} {direction} 0 automatic 0"
        for n, c, s in ((2**15, 64, 4096), (1, 1, 2**33), (2**33, 1, 1), (2**20, 2**13, 1), (8, 3, 2**28 + 1))
        for layout in ("planar", "interleaved")
        for direction in ("forward", "backward")
    ]
    for problem, plan in zip(problems, plans(program, problems), strict=True):
        assert plan["kind"] == "two_pass", problem
        assert plan["reduce"]["fits"] and plan["apply"]["fits"], problem


def test_a_problem_too_large_for_the_kernels_says_so(program):
    (plan,) = plans(program, [f"{GPUS['H100']} planar f32 1 {2**32} 1 forward 0 two_pass 0"])
    assert not (plan["reduce"]["fits"] and plan["apply"]["fits"])


if __name__ == "__main__":
    TABLES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        compiled = compile_table(Path(folder))
        for gpu in GPUS:
            (TABLES / f"{gpu}.txt").write_text(table(compiled, gpu))
