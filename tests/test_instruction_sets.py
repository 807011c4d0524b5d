"""The CPU's kernels for AVX2 and for AVX-512 give the same bits, whatever the order of tasks, and whether stores go past
the caches or not. What this processor lacks of AVX-512 is emulated (tests/emulated_avx512.h). So do the kernels for
NEON and those in plain C++, on 64-bit ARM."""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from compiler import cxx
from processor import runs

from bnext._toolchain import ARITHMETIC

ROOT = Path(__file__).parent.parent
CPU = ROOT / "csrc" / "cpu"


def emulated(folder, instruction_set):
    """The AVX-512 kernels as a source that any processor with AVX2 runs, made of isa_avx512.h."""
    text = (CPU / "isa_avx512.h").read_text()
    text = text.replace("#include <immintrin.h>", f'#include "{ROOT / "tests" / "emulated_avx512.h"}"')
    text = text.replace('"../core/', f'"{ROOT / "csrc" / "core"}/')
    text = re.sub(r"\b_mm512_", "emulated_", text)
    text = re.sub(r"\b_mm256_(mask[z_])", r"emulated256_\1", text)
    text = re.sub(r"\b__m512", "Emulated", text)
    (folder / "isa_emulated.h").write_text(text)
    source = folder / "kernels_emulated.cpp"
    define = "#define BNEXT_AVX512_BF16 1\n" if instruction_set == "avx512_bf16" else ""
    headers = [CPU / "isa.h", CPU / "kernels.h", folder / "isa_emulated.h", CPU / "kernel_table.h"]
    includes = "".join(f'#include "{header}"\n' for header in headers)
    of_set = f"const KernelSet& {instruction_set}_kernels() {{ return table; }}"
    source.write_text(f"{define}{includes}namespace bnext::cpu {{\n{of_set}\n}}\n")
    return source


def differing(folder, compiler, kernels, flags, *, step=1, runner=()):
    """What tests/instruction_sets.cpp says of the kernels of these sources."""
    common = [f for f in sorted(CPU.glob("*.cpp")) if f.name not in ("dispatch.cpp", "cache.cpp")]
    common = [ROOT / "tests" / "instruction_sets.cpp", *(f for f in common if not f.name.startswith("kernels_"))]
    compilers, objects = [], []
    for name, sources in {"kernels": kernels, "common": common}.items():
        (folder / name).mkdir()
        command = [compiler, "-std=c++17", "-Werror=switch", *ARITHMETIC, *flags, "-c", *map(str, sources)]
        compilers.append(subprocess.Popen(command, cwd=folder / name))
        objects += [folder / name / f"{source.stem}.o" for source in sources]
    assert [compiling.wait() for compiling in compilers] == [0, 0]
    program = folder / "instruction_sets"
    # A program for another machine finds no libraries here.
    link = [compiler, *(["-static"] if runner else []), *map(str, objects), "-o", str(program)]
    subprocess.run(link, check=True)
    done = subprocess.run([*runner, program, str(step)], capture_output=True, text=True)
    return done.stdout[-4000:] + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("instruction_set", ["avx512", "avx512_bf16"])
def test_avx2_and_avx512_give_the_same_bits(tmp_path, instruction_set):
    compiler = cxx()
    if not runs("avx2"):
        pytest.skip("needs AVX2")
    if not runs(instruction_set):
        # To optimize emulated kernels takes longer than they run as they are.
        kernels, optimize = [emulated(tmp_path, instruction_set)], "-O0"
    else:
        # As in the build. (Without, functions of the headers before the pragma that sets the target are not inlined, and
        # return registers in another way.) Kernels of other dtypes than bfloat16 are from the first of these.
        kernels, optimize = [CPU / "kernels_avx512.cpp", CPU / "kernels_avx512_bf16.cpp"], "-O2"
    flags = [optimize, "-Wno-psabi", "-mavx2", "-mfma", "-mf16c", f"-DOTHER={instruction_set}_kernels"]
    said = differing(tmp_path, compiler, [*kernels, CPU / "kernels_avx2.cpp"], flags)
    assert re.fullmatch(r"0 of \d{4} differ\n", said), said


@pytest.mark.slow
@pytest.mark.long
def test_neon_gives_the_bits_of_plain_cpp(tmp_path):
    """On 64-bit ARM, or elsewhere by its compiler and qemu, some shapes of them."""
    here = platform.machine() == "aarch64"
    compiler = cxx() if here else shutil.which("aarch64-linux-gnu-g++")
    runner = [] if here else [shutil.which("qemu-aarch64")]
    if not compiler or None in runner:
        pytest.skip("needs 64-bit ARM, or g++-aarch64-linux-gnu and qemu-user")
    kernels = [CPU / "kernels_portable.cpp", CPU / "kernels_neon.cpp"]
    said = differing(tmp_path, compiler, kernels, ["-O1"], step=1 if here else 5, runner=runner)
    assert re.fullmatch(r"0 of \d+ differ\n", said) and not said.startswith("0 of 0"), said
