"""What the compiler made of the CUDA kernels: no spills, no local memory, registers within the launch
bound, wide accesses in the hot loops, no float atomics. Needs nvcc, and cuobjdump for the machine
code; no GPU, and no particular torch.
"""

from __future__ import annotations

import bisect
import collections
import fcntl
import functools
import hashlib
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from bnext import _toolchain

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
#: One of each generation: what is said of 8.0 holds for 8.6 and 8.9, and of 9.0 for 10.0.
ARCHITECTURES = ("7.5", "8.0", "9.0", "12.0")
REGISTERS_PER_MULTIPROCESSOR = 65536

TOOLKIT, PASSED_OVER = _toolchain.find_toolkit()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(TOOLKIT is None, reason=f"no CUDA compiler ({'; '.join(PASSED_OVER)})"),
]
each_compilation = pytest.mark.parametrize(
    "source, architecture", [(s, a) for s in SOURCES for a in ARCHITECTURES], ids=lambda v: getattr(v, "name", v)
)


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


@dataclass
class Compilation:
    cubin: Path
    log: str  # of ptxas -v
    ptx: str


def flags() -> list[str]:
    ours = _toolchain.recipe(CSRC, {}, TOOLKIT, []).nvcc
    torchs = ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF2_OPERATORS")
    return [*ours, "-std=c++17", "--expt-relaxed-constexpr", *(f"-D__CUDA_NO_{name}__" for name in torchs)]


@functools.cache
def folder() -> Path:
    """Where compilations are kept for as long as nothing that they depend on changes."""
    digest = hashlib.sha256(repr((TOOLKIT.version, flags())).encode())
    for path in sorted([*CSRC.glob("core/*"), *CSRC.glob("cuda/*")]):
        digest.update(path.name.encode() + path.read_bytes())
    made = ROOT / "build" / "static-quality" / digest.hexdigest()[:16]
    made.mkdir(parents=True, exist_ok=True)
    return made


@functools.cache
def compiled(source: Path, architecture: str) -> Compilation:
    if architecture not in _toolchain.known_architectures(TOOLKIT):
        pytest.skip(f"this nvcc does not know {architecture}")
    kept = folder() / f"{source.stem}-{architecture}"
    kept.mkdir(exist_ok=True)
    with open(kept / "lock", "w") as lock:  # other test processes want the same file
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (kept / "log").exists():
            number = architecture.replace(".", "")
            command = [str(TOOLKIT.nvcc), "-cubin", f"-arch=sm_{number}", *flags(), "-Xptxas", "-v"]
            command += ["--keep", "--keep-dir", str(kept), "-o", str(kept / "cubin"), str(source)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            (kept / "log").write_text(done.stderr)
    return Compilation(kept / "cubin", (kept / "log").read_text(), (kept / f"{source.stem}.ptx").read_text())


@functools.cache
def title(mangled: str) -> str:
    """stats_planar_kernel<float, true>"""
    full = subprocess.run(["c++filt", mangled], check=True, capture_output=True, text=True).stdout
    found = re.search(r"(\w+_kernel(<.*?>)?)\(", full.replace("bnext::", "").replace("cuda::", ""))
    return found[1] if found else full.strip()


# ---- registers


@each_compilation
def test_no_spills_and_no_stack(source, architecture):
    log = compiled(source, architecture).log
    frames = re.findall(r"Function properties for (\S+)\n\s+(\d+) bytes stack frame, (\d+) bytes spill stores", log)
    assert frames
    assert [(title(name), stack, spills) for name, stack, spills in frames if stack != "0" or spills != "0"] == []


@each_compilation
def test_registers_allow_the_declared_occupancy(source, architecture):
    """Each kernel says how many blocks of how many threads are to run on a multiprocessor."""
    compilation = compiled(source, architecture)
    bounds = {}
    for entry in re.split(r"\.entry ", compilation.ptx)[1:]:
        head = entry.split("{")[0]
        threads = re.search(r"\.maxntid (\d+)", head)
        blocks = re.search(r"\.minnctapersm (\d+)", head)
        bounds[head.split("(")[0]] = (int(threads[1]), int(blocks[1])) if threads and blocks else None
    assert [title(name) for name, bound in bounds.items() if bound is None] == []
    used = re.findall(r"entry function '(\S+)'.*?Used (\d+) registers", compilation.log, re.DOTALL)
    assert {name for name, _ in used} == set(bounds)
    too_many = []
    for name, registers in used:
        threads, blocks = bounds[name]
        if int(registers) * threads * blocks > REGISTERS_PER_MULTIPROCESSOR:
            too_many.append((title(name), registers, threads, blocks))
    assert too_many == []


# ---- machine code


@dataclass
class Instruction:
    address: int
    opcode: str
    target: int | None  # of a branch


@functools.cache
def machine_code(source: Path, architecture: str) -> dict[str, list[Instruction]]:
    if cuobjdump() is None:
        pytest.skip("no cuobjdump on PATH, in the toolkit or in triton's package")
    cubin = compiled(source, architecture).cubin
    text = subprocess.run([cuobjdump(), "--dump-sass", str(cubin)], check=True, capture_output=True, text=True).stdout
    kernels: dict[str, list[Instruction]] = {}
    for function in re.split(r"Function : ", text)[1:]:
        name, body = function.split("\n", 1)
        found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)([^;]*);", body)
        kernels[title(name)] = [Instruction(int(at, 16), opcode, _target(opcode, rest)) for at, opcode, rest in found]
    assert all(kernels.values())
    return kernels


def _target(opcode: str, operands: str) -> int | None:
    found = re.search(r"0x([0-9a-f]+)\s*$", operands.strip()) if opcode.startswith("BRA") else None
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
        loop = Loop(len(body), collections.Counter(), 0, collections.Counter(), 0, 0, 0)
        for opcode in (instruction.opcode for instruction in body):
            kind = opcode.split(".")[0]
            if kind not in ("LDG", "LD", "STG", "ST", "STS", "LDS", "ATOM", "ATOMG", "RED", "REDG"):
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
    """Kernels for data that does not come in whole units (ALIGNED = false), the cooperative plan's, which is about latency,
    and float64 on 12.0, whose loads ptxas splits, and of which those GPUs compute next to none."""
    return bool(re.search(r"^cooperative_|, false>$", kernel)) or ("<double" in kernel and architecture == "12.0")


@each_compilation
def test_hot_loops_move_16_bytes_at_a_time(source, architecture):
    """The loop with the most 16-byte loads is the one that walks the tensor: it has at least four
    loads in flight, and nothing narrower in it but the bytes of a sign mask."""
    for kernel, found in loops(source, architecture).items():
        if exempt(kernel, architecture):
            continue
        # Of the loops that merge what blocks left in memory, none streams.
        walking = [loop for loop in found if loop.streamed or not kernel.startswith("resident")]
        hot = max(walking, key=lambda loop: loop.loads[16], default=None)
        assert hot is not None, kernel
        assert hot.loads[16] >= 4, (kernel, hot)
        assert set(hot.loads) <= {16, 1}, (kernel, hot)
        assert set(hot.stores) <= {16, 1}, (kernel, hot)
        assert hot.atomics == 0, (kernel, hot)


#: Tensors that a resident kernel loads, and stores, by its EPILOGUE or GATE (0 none, 1 relu, 2 add, 3 add and relu;
#: 0 none, 1 relu, 2 mask). dresidual is stored under a condition, where it is wanted.
RESIDENT_BYTES = {
    "forward": {0: (1, 0, 1), 1: (1, 0, 1), 2: (1, 1, 1), 3: (1, 1, 1)},
    "backward": {0: (2, 0, 1), 1: (2, 0, 1), 2: (2, 0, 2)},
}


@pytest.mark.parametrize("direction", RESIDENT_BYTES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_resident_kernels_load_each_tensor_once(direction, architecture):
    """The bytes that docs/kernels.md declares, counted in the loops. x, and backward dy, are loaded in loops that leave
    all of it in shared memory and store nothing; the loops that store take them from there, and load no more than
    the residual."""
    source = CSRC / "cuda" / f"resident_{direction}.cu"
    seen = 0
    for kernel, found in loops(source, architecture).items():
        if "<double" in kernel and architecture == "12.0":
            continue
        choice = int(re.search(r"\)(\d)", kernel)[1])
        kept, beside, stored = RESIDENT_BYTES[direction][choice]
        taking = [loop for loop in found if loop.streamed and loop.kept]
        giving = [loop for loop in found if loop.given and loop.stores[16]]
        others = [loop for loop in found if loop not in taking and loop not in giving]
        assert taking and giving, kernel
        for loop in taking:
            assert loop.streamed == loop.loads[16] == loop.kept and not loop.stores, (kernel, loop)
            assert loop.kept % kept == 0, (kernel, loop)
        for loop in giving:
            units = loop.given // kept
            assert loop.given == units * kept and loop.kept == 0, (kernel, loop)
            assert loop.streamed == loop.loads[16] == units * beside, (kernel, loop)
            assert loop.stores[16] == units * stored, (kernel, loop)
        assert not any(loop.streamed or loop.stores[16] for loop in others), kernel
        seen += 1
    assert seen >= 9 * len(RESIDENT_BYTES[direction])


#: Instructions that may be spent on an element of 16 or 32 bits without falling behind the memory, in the loops that
#: take statistics and in those that normalize (without a residual). 39 would fit under an H100's 3 TB/s.
STATISTICS, NORMALIZE = 8, 6


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a != "7.5"])
def test_instructions_for_an_element(architecture):
    checked = collections.Counter()
    for stem in ("stats", "normalize", "resident_forward"):
        for kernel, found in loops(CSRC / "cuda" / f"{stem}.cu", architecture).items():
            if exempt(kernel, architecture) or "<double" in kernel or re.search(r"\)[23]", kernel):
                continue
            elements = 4 if "<float" in kernel else 8  # of 16 bytes
            # Whole chunks, which is what there is most of. In stats, the loop that merges comes after.
            walking = [loop for loop in found if loop.loads[16] >= 4 or loop.given >= 4]
            normalizing = [loop for loop in walking if loop.stores[16] >= 4]
            summing = walking[:1] if stem == "stats" else [loop for loop in walking if loop.streamed and loop.kept]
            for loop in normalizing:
                assert loop.instructions <= NORMALIZE * elements * loop.stores[16], (kernel, loop)
            for loop in summing:
                assert loop.instructions <= STATISTICS * elements * loop.loads[16], (kernel, loop)
            checked["normalize"] += bool(normalizing)
            checked["statistics"] += bool(summing)
    # stats and normalize in 2 layouts, resident_forward in 3 ways; the latter two without and with relu.
    assert checked == {"statistics": 3 * (2 + 3 * 2), "normalize": 3 * (2 * 2 + 3 * 2)}


def test_resident_blocks_fit_as_the_plan_counts_on():
    """Static shared memory is at most what plan.cpp's overhead() sets aside, less 1 KB that the system takes."""
    for direction, state in (("forward", 16), ("backward", 8)):
        for architecture in ARCHITECTURES:
            log = compiled(CSRC / "cuda" / f"resident_{direction}.cu", architecture).log
            for name, shared in re.findall(r"entry function '(\S+)'.*?(\d+) bytes smem", log, re.DOTALL):
                kernel = title(name)
                size = state * (2 if "<double" in kernel else 1)
                masked = int(re.search(r"\)(\d)", kernel)[1]) == (3 if direction == "forward" else 2)
                unit = 8 if masked else {"double": 2, "float": 4}.get(re.search(r"<(\w+)", kernel)[1], 8)
                merge = size * 128 * (1 if "planar" in kernel else unit + 1)
                assert int(shared) <= merge + 1024, (kernel, architecture)


@pytest.mark.parametrize(
    "source", [CSRC / "cuda" / "normalize.cu", CSRC / "cuda" / "backward_input.cu"], ids=lambda p: p.name
)
def test_second_passes_wait_before_they_load(source):
    """They are launched to overlap the first. ACQBULK is griddepcontrol.wait."""
    for kernel, code in machine_code(source, "9.0").items():
        opcodes = [instruction.opcode for instruction in code]
        first = next(i for i, opcode in enumerate(opcodes) if re.match(r"(LDG|LD|STG|ST|ATOM|RED)\b", opcode))
        assert "ACQBULK" in opcodes[:first], kernel


def test_there_is_a_kernel_for_every_stage_layout_and_type():
    """So that no kernel escapes the tests above by being somewhere else."""
    kernels = [kernel for source in SOURCES for kernel in machine_code(source, "9.0")]
    stages = ("stats", "normalize", "backward_reduce", "backward_input", r"\w+_forward", r"\w+_backward")
    for stage in stages:
        for dtype in ("float", "double", "f16", "bf16"):
            layouts = {"planar" in k for k in kernels if re.match(rf"{stage}_[a-z]+_kernel<{dtype}\b", k)}
            assert layouts == {True, False}, (stage, dtype)
