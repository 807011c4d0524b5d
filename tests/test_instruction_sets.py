"""The CPU's kernels for AVX2 and for AVX-512 give the same bits, whatever the order of tasks, and whether stores go past
the caches or not. Where there is no AVX-512, its instructions are emulated (tests/emulated_avx512.h)."""

import re
import subprocess
from pathlib import Path

import pytest
import torch
from compiler import cxx

ROOT = Path(__file__).parent.parent
CPU = ROOT / "csrc" / "cpu"


def emulated(folder):
    """The AVX-512 kernels as a source that any processor with AVX2 runs, made of isa_avx512.h."""
    text = (CPU / "isa_avx512.h").read_text()
    text = text.replace("#include <immintrin.h>", f'#include "{ROOT / "tests" / "emulated_avx512.h"}"')
    text = text.replace('"../core/', f'"{ROOT / "csrc" / "core"}/')
    text = re.sub(r"\b_mm512_", "emulated_", text)
    text = re.sub(r"\b_mm256_(mask[z_])", r"emulated256_\1", text)
    text = re.sub(r"\b__m512", "Emulated", text)
    (folder / "isa_emulated.h").write_text(text)
    source = folder / "kernels_emulated.cpp"
    headers = [CPU / "isa.h", CPU / "kernels.h", folder / "isa_emulated.h", CPU / "kernel_table.h"]
    includes = "".join(f'#include "{header}"\n' for header in headers)
    source.write_text(f"{includes}namespace bnext::cpu {{\nconst KernelSet& avx512_kernels() {{ return table; }}\n}}\n")
    return source


@pytest.mark.slow
def test_avx2_and_avx512_give_the_same_bits(tmp_path):
    compiler = cxx()
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in ("AVX2", "AVX512"):
        pytest.skip("needs AVX2")
    kernels = CPU / "kernels_avx512.cpp" if capability == "AVX512" else emulated(tmp_path)
    not_linked = {"dispatch.cpp", "cache.cpp", "kernels_avx512.cpp", "kernels_portable.cpp", "kernels_avx2.cpp"}
    common = [
        ROOT / "tests" / "instruction_sets.cpp",
        *(f for f in sorted(CPU.glob("*.cpp")) if f.name not in not_linked),
    ]
    # Kernels take half a minute to optimize, and emulated ones more: longer than they run as they are.
    flags = ["-std=c++17", "-O0", "-Werror=switch", "-Wno-psabi", "-mavx2", "-mfma", "-mf16c"]
    parts = {"kernels": [kernels, CPU / "kernels_avx2.cpp"], "common": common}
    compilers, objects = [], []
    for name, sources in parts.items():
        folder = tmp_path / name
        folder.mkdir()
        compilers.append(subprocess.Popen([compiler, *flags, "-c", *map(str, sources)], cwd=folder))
        objects += [folder / f"{source.stem}.o" for source in sources]
    assert [compiling.wait() for compiling in compilers] == [0, 0]
    program = tmp_path / "instruction_sets"
    subprocess.run([compiler, *map(str, objects), "-o", str(program)], check=True)

    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    assert re.fullmatch(r"0 of \d{4} differ\n", done.stdout)
