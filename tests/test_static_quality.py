"""What the compiler made of the CUDA kernels: no spills, no local memory, registers within the launch
bound, wide accesses in the hot loops, no float atomics. Reads what the build compiled, where that is of these sources
and by this nvcc; what is missing there is compiled here. Needs nvcc and cuobjdump; no GPU, and no particular torch.
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import itertools
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from bnext import _toolchain
from tests import ptx
from tests.simt.build import with_headers

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
SOURCES = sorted((CSRC / "cuda" / "plans").glob("*.cu"))
#: One of each generation: what is said of 8.0 holds for 8.6 and 8.9, and of 9.0 for 10.0.
ARCHITECTURES = ("7.5", "8.0", "9.0", "12.0")
REGISTERS_PER_MULTIPROCESSOR = 65536

TOOLKIT, PASSED_OVER = _toolchain.find_toolkit()


@functools.cache
def cuobjdump() -> str | None:
    """On PATH, in the toolkit, or in triton's package, which torch brings along for CUDA."""
    spec = importlib.util.find_spec("triton")
    folders = [TOOLKIT.home / "bin"] if TOOLKIT else []
    if spec and spec.origin:
        folders.append(Path(spec.origin).parent / "backends" / "nvidia" / "bin")
    return shutil.which("cuobjdump") or next(
        (str(folder / "cuobjdump") for folder in folders if (folder / "cuobjdump").is_file()), None
    )


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(TOOLKIT is None, reason=f"no CUDA compiler ({'; '.join(PASSED_OVER)})"),
    pytest.mark.skipif(cuobjdump() is None, reason="no cuobjdump on PATH, in the toolkit or in triton's package"),
]
each_compilation = pytest.mark.parametrize(
    "source, architecture", [(s, a) for s in SOURCES for a in ARCHITECTURES], ids=lambda v: getattr(v, "name", v)
)


@dataclass
class Compilation:
    cubin: Path
    usage: str  # registers, stack and shared memory, as cuobjdump puts it


def flags() -> list[str]:
    ours = _toolchain.recipe(CSRC, {}, TOOLKIT, []).nvcc
    torchs = ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF2_OPERATORS")
    return [*ours, "-std=c++17", "--expt-relaxed-constexpr", *(f"-D__CUDA_NO_{name}__" for name in torchs)]


@functools.cache
def known() -> list[str]:
    """Those of ARCHITECTURES that this nvcc knows."""
    return [a for a in ARCHITECTURES if a in _toolchain.known_architectures(TOOLKIT)]


def parts(source: Path) -> list[Path]:
    """What a kernel is compiled from."""
    return [path for path in with_headers(source) if path.is_relative_to(CSRC)]


def built(source: Path) -> Path | None:
    """The object that the build has made of this source as it is now, with this compiler and these flags."""
    newest = max(path.stat().st_mtime for path in parts(source))
    for rules in ROOT.glob("build/temp.*/build.ninja"):
        made = rules.parent / source.relative_to(ROOT).with_suffix(".o")
        text = rules.read_text()
        same = f"nvcc = {TOOLKIT.nvcc}\n" in text and " ".join(_toolchain.recipe(CSRC, {}, TOOLKIT, []).nvcc) in text
        if same and made.is_file() and made.stat().st_mtime > newest and architectures_in(made) >= set(known()):
            return made
    return None


def architectures_in(compiled_object: Path) -> set[str]:
    numbers = re.findall(r"\.sm_(\d+)\.cubin", output(cuobjdump(), "--list-elf", str(compiled_object)))
    return {f"{number[:-1]}.{number[-1]}" for number in numbers}


def output(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def folder(source: Path) -> Path:
    """Where a source's code is kept for as long as nothing that it depends on changes."""
    digest = hashlib.sha256(repr((TOOLKIT.version, flags(), known())).encode())
    for path in sorted(parts(source)):
        digest.update(path.name.encode() + path.read_bytes())
    made = ROOT / "build" / "static-quality" / f"{source.stem}-{digest.hexdigest()[:16]}"
    made.mkdir(parents=True, exist_ok=True)
    return made


@contextlib.contextmanager
def kept(source: Path) -> Iterator[Path]:
    """That folder, for one process at a time: others want the same files."""
    with open(folder(source) / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder(source)


@functools.cache
def images(source: Path) -> Path:
    """A folder with the machine code for each architecture, and the PTX of the newest."""
    with kept(source) as here:
        if not (here / "images").exists():
            compiled_object = built(source)
            if compiled_object is None:
                compiled_object = here / f"{source.stem}.o"
                everywhere = _toolchain.gencode(known())
                output(str(TOOLKIT.nvcc), "-c", *flags(), *everywhere, "-o", str(compiled_object), str(source))
            unfinished = here / "unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            output(cuobjdump(), "--extract-elf", "all", "--extract-ptx", "all", str(compiled_object), cwd=unfinished)
            unfinished.rename(here / "images")
    return here / "images"


@functools.cache
def compiled(source: Path, architecture: str) -> Compilation:
    if architecture not in known():
        pytest.skip(f"this nvcc does not know {architecture}")
    (cubin,) = images(source).glob(f"*.sm_{architecture.replace('.', '')}.cubin")
    return Compilation(cubin, output(cuobjdump(), "--dump-resource-usage", str(cubin)))


@functools.cache
def ptx_of(source: Path) -> str:
    """The PTX of the newest stage, of which the machine code for 9.0 and all that came after is made."""
    (only,) = images(source).glob("*.ptx")
    return only.read_text()


def usage(source: Path, architecture: str) -> dict[str, dict[str, int]]:
    """By the mangled name of a kernel: {"REG": 72, "STACK": 0, "SHARED": 1168, "LOCAL": 0, ...}."""
    found = re.findall(r"Function (\S+):\n\s*(REG:.*)", compiled(source, architecture).usage)
    return {name: {key: int(n) for key, n in re.findall(r"(\w+):(\d+)", numbers)} for name, numbers in found}


def static_shared(source: Path, architecture: str) -> dict[str, int]:
    """Bytes of shared memory that a kernel declares, by its title: without the 1 KB that the system takes from 9.0 on,
    which cuobjdump counts."""
    taken = 1024 if float(architecture) >= 9 else 0
    return {title(name): max(of["SHARED"] - taken, 0) for name, of in usage(source, architecture).items()}


def enumerators(header: str, enum: str) -> list[str]:
    """The names of an enumeration's values, which the compiler mangles to numbers."""
    text = re.sub(r"//.*", "", (CSRC / header).read_text())
    return re.findall(r"\w+", re.search(rf"enum class {enum}[^{{]*{{([^}}]*)}}", text)[1])


#: What is fused into a kernel of each operation.
VARIANTS = {
    "BatchNormForward": ("forward", enumerators("core/params.h", "Epilogue")),
    "BatchNormBackward": ("backward", enumerators("core/params.h", "Derivative")),
}

#: How a cooperative kernel reduces.
READS = enumerators("cuda/plans/cooperative.cu", "Reads")


@functools.cache
def title(mangled: str) -> str:
    """A kernel in words: "resident_planar forward bf16 relu", "reduce_planar backward float none covering",
    "resident_interleaved forward bf16 relu registers", "cooperative forward float run_time planes by 4, columns by 8"."""
    full = subprocess.run(["c++filt", mangled], check=True, capture_output=True, text=True).stdout
    full = re.sub(r"bnext::|cuda::|\(anonymous namespace\)::", "", full)
    found = re.search(r"(\w+)_kernel<(\w+)<(\w+), \(\w+\)(\d+), \d+ ?>(?:, (true|false))? ?>\(", full)
    if found:
        plan, op, dtype, variant, last = found.groups()
        direction, variants = VARIANTS[op]
        marked, word = ("true", "registers") if plan == "resident_interleaved" else ("false", "covering")
        return " ".join([plan, direction, dtype, variants[int(variant)], *([word] if last == marked else [])])
    found = re.search(
        r"cooperative_kernel<(\w+)<(\w+), \(\w+\)\d+, (\d+) ?>, \(\w+\)(\d+), \w+<\w+, \(\w+\)\d+, (\d+) ?>, (\w+)>\(",
        full,
    )
    if not found:
        return full.strip()
    op, dtype, vec, reads, apply_vec, columns = found.groups()
    passes = f"{READS[int(reads)]} by {vec}, {'columns' if columns == 'true' else 'planes'} by {apply_vec}"
    return f"cooperative {VARIANTS[op][0]} {dtype} run_time {passes}"


# ---- registers


@each_compilation
def test_no_spills_and_no_stack(source, architecture):
    """What is spilled lies on the stack."""
    kernels = usage(source, architecture)
    assert kernels
    bad = {title(name): of for name, of in kernels.items() if of["STACK"] or of["LOCAL"]}
    assert bad == {}


@each_compilation
def test_registers_allow_the_declared_occupancy(source, architecture):
    """Each kernel says how many blocks of how many threads are to run on a multiprocessor, and says so alike for all
    architectures."""
    bounds = {}
    for entry in re.split(r"\.entry ", ptx_of(source))[1:]:
        head = entry.split("{")[0]
        threads = re.search(r"\.maxntid (\d+)", head)
        blocks = re.search(r"\.minnctapersm (\d+)", head)
        bounds[title(head.split("(")[0])] = (int(threads[1]), int(blocks[1])) if threads and blocks else None
    assert [kernel for kernel, bound in bounds.items() if bound is None] == []
    used = {title(name): of["REG"] for name, of in usage(source, architecture).items()}
    assert set(used) == set(bounds)
    too_many = []
    for kernel, registers in used.items():
        threads, blocks = bounds[kernel]
        if registers * threads * blocks > REGISTERS_PER_MULTIPROCESSOR:
            too_many.append((kernel, registers, threads, blocks))
    assert too_many == []


# ---- machine code


@dataclass
class Instruction:
    address: int
    opcode: str
    target: int | None  # of a branch


@functools.cache
def disassembly(source: Path, architecture: str) -> str:
    """What cuobjdump says, kept as long as the machine code is: large kernels take it minutes."""
    cubin = compiled(source, architecture).cubin
    text = cubin.with_suffix(".sass")
    with kept(source):
        if not text.exists():
            lines = output(cuobjdump(), "--dump-sass", str(cubin)).splitlines()
            text.write_text("\n".join(line for line in lines if "/* 0x" not in line or ";" in line))
    return text.read_text()


@functools.cache
def machine_code(source: Path, architecture: str) -> dict[str, list[Instruction]]:
    kernels: dict[str, list[Instruction]] = {}
    for function in re.split(r"Function : ", disassembly(source, architecture))[1:]:
        name, body = function.split("\n", 1)
        found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)([^;]*);", body)
        kernels[title(name)] = [Instruction(int(at, 16), opcode, _target(opcode, rest)) for at, opcode, rest in found]
    assert all(kernels.values())
    return kernels


def _target(opcode: str, operands: str) -> int | None:
    # Behind & and ? a newer cuobjdump tells how an instruction is scheduled.
    found = re.search(r"0x([0-9a-f]+)\s*([&?].*)?$", operands.strip()) if opcode.startswith("BRA") else None
    return int(found[1], 16) if found else None


@dataclass
class Loop:
    """An innermost loop, and its accesses by width in bytes."""

    instructions: int
    loads: collections.Counter  # from global memory
    streamed: int  # of these, 16 bytes wide and marked as last use
    stores: collections.Counter
    kept: int  # 16-byte stores to shared memory
    given: int  # 16-byte loads from it
    copied: int  # 16-byte copies to it from global memory
    atomics: int


WIDTH = re.compile(r"\.(128|64|U16|S16|U8|S8)\b")


@functools.cache
def loops(source: Path, architecture: str) -> dict[str, list[Loop]]:
    """The innermost loops of each kernel, in the order of their code."""
    return {kernel: list(_loops(code)) for kernel, code in machine_code(source, architecture).items()}


def _loops(code: list[Instruction]) -> Iterator[Loop]:
    addresses = [instruction.address for instruction in code]
    ranges = sorted({(i.target, i.address) for i in code if i.target is not None and i.target <= i.address})
    for first, last in ranges:
        if any(first <= start and end <= last and (start, end) != (first, last) for start, end in ranges):
            continue
        body = code[bisect.bisect_left(addresses, first) : bisect.bisect_right(addresses, last)]
        loop = Loop(len(body), collections.Counter(), 0, collections.Counter(), 0, 0, 0, 0)
        for opcode in (instruction.opcode for instruction in body):
            kind = opcode.split(".")[0]
            if kind not in ("LDG", "LD", "STG", "ST", "STS", "LDS", "LDGSTS", "ATOM", "ATOMG", "RED", "REDG"):
                continue
            width = WIDTH.search(opcode)
            size = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}[width[1]] if width else 4
            if kind in ("LDG", "LD"):
                loop.loads[size] += 1
                loop.streamed += size == 16 and ".EF" in opcode
            elif kind in ("STG", "ST"):
                loop.stores[size] += 1
            elif kind == "STS":
                loop.kept += size == 16
            elif kind == "LDS":
                loop.given += size == 16
            elif kind == "LDGSTS":
                loop.copied += size == 16
            else:
                loop.atomics += 1
        yield loop


@each_compilation
def test_no_local_memory_and_no_float_atomics(source, architecture):
    """Also what ptxas does not call a spill: arrays that are indexed at run time. Atomics count
    blocks; sums of floats have a fixed order."""
    for kernel, code in machine_code(source, architecture).items():
        opcodes = {instruction.opcode for instruction in code}
        assert {o for o in opcodes if re.match(r"(LDL|STL)\b", o)} == set(), kernel
        assert {o for o in opcodes if re.match(r"(RED|ATOM)", o) and re.search(r"F16|F32|F64|FADD", o)} == set(), kernel


def exempt(kernel: str, architecture: str) -> bool:
    """Kernels for planes that are not whole vectors, those that hold the code of all activations, the cooperative plan's,
    which is about latency, and float64 on 12.0, whose loads ptxas splits, and of which those GPUs compute next to
    none."""
    slow_double = " double" in kernel and architecture == "12.0"
    return kernel.startswith("cooperative") or kernel.endswith(("covering", "general")) or slow_double


@each_compilation
def test_hot_loops_move_16_bytes_at_a_time(source, architecture):
    """The first loop with several 16-byte loads is the one that walks the tensor: it has at least four
    in flight, and nothing narrower in it but the bytes of a sign mask."""
    for kernel, found in loops(source, architecture).items():
        if exempt(kernel, architecture):
            continue
        # Of the loops that merge what blocks left in memory, none streams, and none copies.
        walking = [loop for loop in found if loop.streamed or loop.copied or not kernel.startswith("resident")]
        hot = next((loop for loop in walking if loop.loads[16] + loop.copied >= 4), None)
        assert hot is not None, (kernel, walking)
        assert set(hot.loads) <= {16, 1}, (kernel, hot)
        assert set(hot.stores) <= {16, 1}, (kernel, hot)
        assert hot.atomics == 0, (kernel, hot)


#: Tensors that a resident kernel keeps, loads beside them, and stores. dresidual is stored under a condition.
RESIDENT_BYTES = {
    "forward none": (1, 0, 1),
    "forward relu": (1, 0, 1),
    "forward add": (1, 1, 1),
    "forward add_relu": (1, 1, 1),
    "backward none": (2, 0, 1),
    "backward relu": (2, 0, 1),
    "backward mask": (2, 0, 2),
}
RESIDENT = ("planar", "packed", "interleaved")
#: Where a byte of mask goes with 8 elements; others are 16.
VECTOR_BYTES = {("float", "add_relu"): 32, ("double", "add_relu"): 64}


def copying(kernel: str, architecture: str) -> bool:
    """Whether a kernel copies its input to shared memory asynchronously."""
    plan, direction, _, variant = kernel.split()[:4]
    of_two = direction == "backward" and variant in ("none", "relu")  # and nothing else to load
    copies = {"resident_planar": direction == "forward" or of_two, "resident_packed": of_two}
    return float(architecture) >= 8 and copies.get(plan, False)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_copies_to_shared_memory_are_asynchronous_where_they_are_meant_to_be(architecture):
    """And plainly addressed: the form that ptxas 13.0 gives copies with a hint to the L2 cache, which nothing sets up,
    is an illegal instruction."""
    for source in SOURCES:
        for kernel, code in machine_code(source, architecture).items():
            opcodes = {instruction.opcode.split(".")[0] for instruction in code}
            assert ({"LDGSTS", "LDGDEPBAR"} <= opcodes) == ("LDGSTS" in opcodes) == copying(kernel, architecture), (
                kernel
            )
        assert re.findall(r"LDGSTS\S* \[[^\]]*UR[^;]*;", disassembly(source, architecture)) == []


@pytest.mark.parametrize("plan", RESIDENT)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_resident_kernels_load_each_tensor_once(plan, architecture):
    """The bytes that docs/kernels.md declares, counted in the loops. x, and backward dy, are loaded in loops that leave
    all of it in shared memory, or copied there in loops that take it from there, and store nothing; the loops that
    store take them from there, and load no more than the residual. Those of tiles that may not fit have another way
    besides, which loads what is read again: the first time with a hint to the L2 cache."""
    source = CSRC / "cuda" / "plans" / f"resident_{plan}.cu"
    seen = 0
    for kernel, found in loops(source, architecture).items():
        if exempt(kernel, architecture):
            continue
        _, direction, dtype, variant = kernel.split()[:4]
        kept, beside, stored = RESIDENT_BYTES[f"{direction} {variant}"]
        copies, partial = copying(kernel, architecture), plan == "interleaved"
        taking = [loop for loop in found if loop.copied or (loop.streamed and loop.kept)]
        giving = [loop for loop in found if loop.given and loop.stores[16]]
        others = [loop for loop in found if loop not in taking and loop not in giving]
        assert taking and giving, kernel
        for loop in taking:
            assert not loop.stores, (kernel, loop)
            if copies:
                # Of the chunk to come: all of it, or what is left of the walk, one vector at a time. The first copies have
                # a loop of their own.
                vector = kept * max(1, VECTOR_BYTES.get((dtype, variant), 16) // 16)
                chunk = loop.given or (loop.copied + vector) // 2
                assert loop.loads[16] == loop.kept == 0, (kernel, loop)
                assert loop.copied == chunk + (chunk - vector), (kernel, loop)
            else:
                assert loop.streamed == loop.kept and loop.copied == 0, (kernel, loop)
                assert loop.loads[16] == loop.kept * (1 + partial), (kernel, loop)
                assert loop.kept % kept == 0, (kernel, loop)
        for loop in giving:
            units = loop.given // kept
            assert loop.given == units * kept and loop.kept == 0, (kernel, loop)
            assert loop.streamed == loop.loads[16] == units * (beside + kept * partial), (kernel, loop)
            assert loop.stores[16] == units * stored, (kernel, loop)
        assert not any(loop.streamed or loop.copied or loop.stores[16] for loop in others), kernel
        seen += 1
    assert seen >= 3 * len(RESIDENT_BYTES)


#: Instructions that may be spent on an element of 16 or 32 bits without falling behind the memory, in the loops that
#: reduce and in the elementwise ones, by what is fused. 39 would fit under an H100's 3 TB/s.
STATISTICS = 8
#: A loop that copies counts both ways of the next chunk, whole or what is left of the walk, of which one is taken. By the
#: elements of 16 bytes, over which a copy's instructions are spread.
STATISTICS_AND_COPIES = {8: 10, 4: 13}
SUMS = {"none": 9.2, "relu": 12.3, "mask": 11.4}
SUMS_AND_COPIES = {8: {"none": 9.6, "relu": 12.6}, 4: {"none": 12.1, "relu": 15.1}}
NORMALIZE = {"none": 6, "relu": 6, "add": 7.5, "add_relu": 11.2}
#: Of eval mode's branch, one side is taken, and both are counted.
GRADIENT = {"none": 10.4, "relu": 14.4, "mask": 14.5}

#: Budgets of their own, of sums and gradient, have interleaved tiles of groups where the addresses of flagged numbers, or
#: kept inputs, leave ptxas so few registers that it moves some about.
OF_GROUPS = {
    "bf16 mask": (11.4, 15),
    "bf16 mask registers": (11.5, 15),
    "float mask registers": (12, 14.5),
    "float none registers": (9.3, 10.4),
}

#: What has the loops over whole vectors: the two passes, and each way of doing both.
STEMS = ("two_pass_reduce", "two_pass_apply", *(f"resident_{plan}" for plan in RESIDENT))


def instructions_for_an_element(stem: str, kernel: str, found: list[Loop]) -> tuple[list[float], list[float]]:
    """Those of the loops that reduce, and of the elementwise ones, over whole chunks, which is what there is most of."""
    _, direction, dtype, variant = kernel.split()[:4]
    elements = {"float": 4, "double": 2}.get(dtype, 8)  # of 16 bytes
    inputs, _, stored = RESIDENT_BYTES[f"{direction} {variant}"]
    walking = [loop for loop in found if loop.loads[16] >= 4 or loop.given >= 4]
    elementwise = [loop for loop in walking if loop.stores[16] >= 2 * stored]
    if stem == "two_pass_reduce":  # the loop that merges comes after
        reducing = walking[:1]
    else:
        reducing = [loop for loop in walking if loop.copied or (loop.streamed and loop.kept)]

    def reduced(loop: Loop) -> float:
        # Of the two ways to load that tiles have which may not fit, one is taken.
        instructions = loop.instructions - max(0, loop.loads[16] - loop.kept) * bool(loop.kept)
        return instructions / (elements * (loop.kept or loop.loads[16] or loop.given) / inputs)

    return [reduced(loop) for loop in reducing], [
        loop.instructions / (elements * loop.stores[16] / stored) for loop in elementwise
    ]


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a != "7.5"])
def test_instructions_for_an_element(architecture):
    checked = collections.Counter()
    for stem in STEMS:
        for kernel, found in loops(CSRC / "cuda" / "plans" / f"{stem}.cu", architecture).items():
            if exempt(kernel, architecture) or " double " in kernel:
                continue
            _, direction, dtype, variant = kernel.split()[:4]
            reducing, elementwise = instructions_for_an_element(stem, kernel, found)
            copies, elements = copying(kernel, architecture), 4 if dtype == "float" else 8
            if direction == "backward":
                allowed = (SUMS_AND_COPIES[elements] if copies else SUMS)[variant], GRADIENT[variant]
                if stem == "resident_interleaved":
                    allowed = OF_GROUPS.get(kernel.split(maxsplit=2)[2], allowed)
            else:
                allowed = STATISTICS_AND_COPIES[elements] if copies else STATISTICS, NORMALIZE[variant]
            assert max(reducing, default=0) <= allowed[0], (kernel, reducing)
            assert max(elementwise, default=0) <= allowed[1], (kernel, elementwise)
            checked[f"{direction} reduction"] += bool(reducing)
            checked[f"{direction} elementwise"] += bool(elementwise)
    # Three dtypes. The two passes in 2 layouts, resident in 3 ways, of which one is with registers or without; what is
    # fused concerns the backward's sums too.
    forward, backward = len(NORMALIZE), len(GRADIENT)
    assert checked == {
        "forward reduction": 3 * (2 + 4 * forward),
        "forward elementwise": 3 * (2 * forward + 4 * forward),
        "backward reduction": 3 * (2 * backward + 4 * backward),
        "backward elementwise": 3 * (2 * backward + 4 * backward),
    }


def documented(heading: str) -> list[list[str]]:
    """The rows of the table of docs/kernels.md behind the line that begins so, without its heads."""
    lines = (ROOT / "docs" / "kernels.md").read_text().split(heading, 1)[1].splitlines()
    table = list(itertools.takewhile(str.strip, itertools.dropwhile(lambda line: not line.startswith("|"), lines)))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table if not line.startswith("|--")]


of_the_compiler_in_docs = pytest.mark.skipif(
    TOOLKIT is None or TOOLKIT.version != "13.0", reason="docs/kernels.md tells what nvcc 13.0 made of the kernels"
)


@of_the_compiler_in_docs
def test_instructions_for_an_element_are_those_of_the_docs():
    kernels = {}
    for stem in STEMS:
        for kernel, found in loops(CSRC / "cuda" / "plans" / f"{stem}.cu", "9.0").items():
            if kernel.endswith(" none"):
                kernels[kernel] = instructions_for_an_element(stem, kernel, found)
    rows = documented("Instructions for an element in the hot loop")[1:]
    assert len(rows) == 2 * (2 + 2 + len(RESIDENT))
    for name, *cells in rows:
        plan, direction = re.match(r"`(\w+)_kernel`, (\w+)", name).groups()
        for dtype, cell in zip(("bf16", "float"), cells, strict=True):
            counted = kernels[f"{plan} {direction} {dtype} none"]
            assert " + ".join(f"{max(part):.1f}" for part in counted if part) == cell, (name, dtype)


def test_there_are_as_many_kernels_as_the_docs_say():
    total = 0
    for files, sums in documented("## Size of the build")[1:]:
        number = int(re.search(r"= (\d+)", sums)[1])
        for name in re.findall(r"`(\w+\.cu)`", files):
            assert len(usage(CSRC / "cuda" / "plans" / name, "9.0")) == number, name
            total += number
    assert f"{total} kernels an architecture" in (ROOT / "docs" / "kernels.md").read_text()


@of_the_compiler_in_docs
def test_instructions_of_an_activation_are_those_of_the_docs(tmp_path):
    """Of a kernel that does nothing else, beyond one that does without."""
    source = tmp_path / "activations.cu"
    source.write_text(
        f'''#include "{CSRC}/core/activation.h"
        using namespace bnext;
        template <class Act> __global__ void value(float* y, const float* z, float param) {{
          y[threadIdx.x] = Act::value(z[threadIdx.x], param);
        }}
        template <class Act> __global__ void derivative(float* dz, const float* z, const float* dy, float param) {{
          dz[threadIdx.x] = through(dy[threadIdx.x], Act::grad(z[threadIdx.x], param));
        }}
        template <> __global__ void derivative<Identity>(float* dz, const float* z, const float* dy, float) {{
          dz[threadIdx.x] = dy[threadIdx.x] + z[threadIdx.x];  // one instruction
        }}
        #define BNEXT_KERNELS(name, type)                               \\
          template __global__ void value<type>(float*, const float*, float); \\
          template __global__ void derivative<type>(float*, const float*, const float*, float);
        BNEXT_ACTIVATIONS(BNEXT_KERNELS)'''
    )
    cubin = tmp_path / "activations.cubin"
    output(str(TOOLKIT.nvcc), "-cubin", "-arch=sm_90", *flags(), "-o", str(cubin), str(source))
    counted = {}
    for function in output(cuobjdump(), "--dump-sass", str(cubin)).split("Function : ")[1:]:
        kernel, struct = re.search(r"(value|derivative)IN5bnext\d+([A-Za-z]\w*?\d?)EE", function).groups()
        opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", function)
        counted[kernel, struct] = sum(not opcode.startswith(("NOP", "BRA")) for opcode in opcodes)
    listed = re.findall(r"^  X\((\w+), (\w+)\)", (CSRC / "core" / "activation.h").read_text(), re.M)
    names, cells = documented("Instructions that an activation adds")
    assert sorted([*names, "none"]) == sorted(name for name, _ in listed)
    value, derivative = counted["value", "Identity"], counted["derivative", "Identity"] - 1
    for name, struct in listed:
        if name != "none":
            adds = f"{counted['value', struct] - value}; {counted['derivative', struct] - derivative}"
            assert adds == cells[names.index(name)], name


def test_resident_blocks_fit_as_the_plan_counts_on():
    """Static shared memory is at most what reserved_bytes() of the planner sets aside, less 1 KB that the system takes."""
    for plan, architecture in itertools.product(RESIDENT, ARCHITECTURES):
        shared_by = static_shared(CSRC / "cuda" / "plans" / f"resident_{plan}.cu", architecture)
        assert shared_by
        for kernel, shared in shared_by.items():
            _, direction, dtype, variant = kernel.split()[:4]
            numbers, width = {"forward": 4, "backward": 2}[direction], 8 if dtype == "double" else 4
            masked = variant in ("add_relu", "mask", "general")
            vec = 8 if masked else {"double": 2, "float": 4}.get(dtype, 8)
            merge = {
                "planar": 256 * numbers,
                "packed": 2 * 256 * numbers,
                "interleaved": 2 * 256 * vec + (256 + 16 * vec if direction == "forward" else 0),
            }[plan] * width
            assert shared <= merge + 1024, (kernel, architecture)


def without_asking() -> int:
    """Static and dynamic shared memory, together, that device.cpp takes to be granted to every kernel."""
    return 1024 * int(re.search(r"kDefaultSharedBytes = (\d+) \* 1024;", (CSRC / "cuda" / "device.cpp").read_text())[1])


@each_compilation
def test_shared_memory_that_is_not_asked_for_is_at_most_48_kb(source, architecture):
    """device.cpp asks for what exceeds its constant; passes without dynamic shared memory do not come to it, unless
    they reduce or share coefficients, and none of the others may have any at all."""
    assert without_asking() <= 48 * 1024
    kernels = static_shared(source, architecture)
    assert kernels
    for kernel, shared in kernels.items():
        assert shared <= (0 if kernel.startswith("apply_planar") else without_asking()), kernel


@pytest.mark.parametrize("plan", RESIDENT)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_stop_where_they_have_no_clusters(plan, architecture):
    """They trap where they would meet in a cluster's barrier (UCGABAR), or load from another block (LD: an address that
    may be of any memory; but for counters, whose loads are STRONG)."""
    kernels = machine_code(CSRC / "cuda" / "plans" / f"resident_{plan}.cu", architecture)
    has_clusters = float(architecture) >= 9
    for kernel, code in kernels.items():
        opcodes = {i.opcode.split(".")[0] for i in code if ".STRONG" not in i.opcode}
        assert any(i.opcode == "BPT.TRAP" for i in code) != has_clusters, kernel
        assert ({"UCGABAR_ARV", "UCGABAR_WAIT"} <= opcodes) == ("LD" in opcodes) == has_clusters, kernel
    # Those with registers, of three dtypes, have no code of all activations.
    assert len(kernels) == 3 * (5 + 4) + (4 + 3) + 3 * (4 + 3) * (plan == "interleaved")


#: Kernels that may be launched to overlap the one before, and those that may be overlapped.
SECOND_PASS, FIRST_PASS = "two_pass_apply", "two_pass_reduce"


@functools.cache
def ptx_kernels(source: Path) -> dict[str, ptx.Kernel]:
    return {title(name): kernel for name, kernel in ptx.kernels(ptx_of(source)).items()}


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.name)
def test_second_passes_touch_nothing_before_they_wait(source):
    """On no path from the entry; tests/test_ptx.py shows what would be found."""
    for name, kernel in ptx_kernels(source).items():
        if source.stem == SECOND_PASS:
            assert kernel.touched_before("griddepcontrol.wait") == [], name
        else:
            assert "griddepcontrol.wait" not in kernel.opcodes(), f"{name} is not known to overlap another"


def test_the_assembler_leaves_the_wait_where_it_is():
    """ACQBULK, in machine code."""
    for kernel, code in machine_code(CSRC / "cuda" / "plans" / f"{SECOND_PASS}.cu", "9.0").items():
        opcodes = [instruction.opcode for instruction in code]
        first = next(i for i, opcode in enumerate(opcodes) if re.match(r"(LDG|LD|STG|ST|ATOM|RED)\b", opcode))
        assert "ACQBULK" in opcodes[:first], kernel


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.name)
def test_first_passes_let_the_next_begin_only_where_it_is_ours(source):
    """Partition::starts_next says whether: there is a way to the tensor, and a way to the end, without."""
    trigger = "griddepcontrol.launch_dependents"
    for name, kernel in ptx_kernels(source).items():
        if source.stem == FIRST_PASS:
            without = kernel.before(trigger)
            assert trigger in kernel.opcodes(), name
            assert kernel.touched_before(trigger) and "ret" in [s.opcode for s in without], name
        else:
            assert trigger not in kernel.opcodes(), name


def test_every_plan_has_a_kernel_of_every_operation_type_and_variant():
    """So that no kernel escapes the tests above by being somewhere else."""
    kernels = {kernel for source in SOURCES for kernel in machine_code(source, "9.0")}
    plans = (
        *(f"resident_{plan}" for plan in RESIDENT),
        "reduce_planar",
        "reduce_columns",
        "apply_planar",
        "apply_columns",
    )
    for plan, (direction, variants), dtype in itertools.product(
        plans, VARIANTS.values(), ("float", "double", "f16", "bf16")
    ):
        for variant in set(variants) - {"run_time"}:
            if plan.startswith("reduce") and direction == "forward" and variant != "none":
                continue  # statistics do not depend on what follows
            if plan.startswith("resident") and (dtype, variant) == ("double", "general"):
                continue  # see kResident
            assert f"{plan} {direction} {dtype} {variant}" in kernels
    cooperative = {kernel for kernel in kernels if kernel.startswith("cooperative")}
    expected = set()
    for direction, dtype in itertools.product(("forward", "backward"), ("float", "double", "f16", "bf16")):
        plain = {"float": 4, "double": 2}.get(dtype, 8)
        for applied_by in {plain, 8}:
            reduced_by = applied_by if direction == "backward" else plain
            passes = [("planes", "planes"), ("covered_planes", "columns"), ("columns", "columns")]
            if reduced_by != applied_by:  # planes of whole narrow vectors, and no whole wide ones
                passes.append(("planes", "columns"))
            for reads, applies in passes:
                expected.add(
                    f"cooperative {direction} {dtype} run_time {reads} by {reduced_by}, {applies} by {applied_by}"
                )
    assert cooperative == expected
