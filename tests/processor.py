"""What the processor of this machine runs of the CPU's instruction sets."""

from pathlib import Path

import torch


def runs(instruction_set: str) -> bool:
    """By the names of BNEXT_CPU, on x86."""
    capability = torch.backends.cpu.get_cpu_capability()
    if instruction_set == "avx512_bf16":
        flags = Path("/proc/cpuinfo").read_text().split()
        return runs("avx512") and {"avx512_bf16", "avx512vbmi"} <= set(flags)
    return instruction_set == "portable" or instruction_set == capability.lower() or capability == "AVX512"
