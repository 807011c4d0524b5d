"""`python -m bnext.doctor`: which build of bnext is in use, what it can run on, and what to do
where that is less than this machine offers. Compiles nothing. Exits with 1 where bnext does not work.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping

import torch

from . import _extension, _toolchain

AHEAD_OF_TIME = "pip install --no-build-isolation --force-reinstall --no-deps ."
COMPILER_PACKAGES = "pip install nvidia-cuda-nvcc nvidia-cuda-cccl"


def main() -> int:
    toolkit, passed_over = _toolchain.find_toolkit(torch.version.cuda)
    problems = []
    lines = [
        ("python", f"{platform.python_version()} ({sys.executable})"),
        ("torch", f"{torch.__version__}, built {_with_cuda(torch.version.cuda)}"),
        ("GPUs", _gpus()),
        ("C++ compiler", _cxx(problems)),
        ("ninja", _ninja(problems)),
        ("CUDA compiler", f"{toolkit.version} in {toolkit.home} ({toolkit.origin})" if toolkit else "none found"),
        *[("  passed over", reason) for reason in passed_over],
        ("architectures", _architectures(toolkit)),
    ]
    build = _extension.find()
    lines.append(("extension", f"compiled {build.how}: {build.path}"))
    if build.how == "just in time":
        lines.append(("  because", build.why))
        lines.append(("  compiled", "already" if build.path.with_suffix(".done").exists() else "at first use"))
    lines.append(("  built for", ", ".join(f"{key} {value}" for key, value in build.info.items())))

    works, verdict, remedies = judge(build, toolkit, torch.version.cuda, _visible(), problems)
    width = max(len(name) for name, _ in lines)
    print("\n".join(f"{name:{width}}  {text}" for name, text in lines))
    print(f"\n{verdict}")
    print("\n".join(f"  - {remedy}" for remedy in remedies))
    return 0 if works else 1


def judge(
    build: _extension.Build,
    toolkit: _toolchain.Toolkit | None,
    torch_cuda: str | None,
    gpus: Mapping[str, tuple[int, int]],
    problems: list[str],
) -> tuple[bool, str, list[str]]:
    """(does it work, the verdict, what to do for more). `gpus` are those that are visible, with their capabilities."""
    to_compile = build.how == "just in time" and not build.path.with_suffix(".done").exists()
    if to_compile and os.environ.get("BNEXT_BUILD") == "aot":
        return False, "bnext does not work: nothing to load, and BNEXT_BUILD=aot forbids compiling.", [AHEAD_OF_TIME]
    if to_compile and problems:
        return False, "bnext does not work: nothing to load, and nothing to compile with.", problems
    if build.info["nvcc"] != "none":
        return _judge_code(build.info["gpus"], gpus)
    if torch_cuda is None:
        remedies = ["install a CUDA build of torch, then reinstall bnext"] if shutil.which("nvidia-smi") else []
        return True, "bnext runs on the CPU; this torch is built without CUDA.", remedies
    if toolkit is None:
        verdict = "bnext runs on the CPU only: no CUDA compiler was found when it was built, nor is there one now."
        major = torch_cuda.split(".")[0]
        remedies = [f"set CUDA_HOME to a CUDA {major} toolkit, or: {COMPILER_PACKAGES}", AHEAD_OF_TIME]
        return True, verdict, remedies
    if build.how == "just in time" and not gpus:
        verdict = "bnext runs on the CPU; it compiles for CUDA at first use where a GPU is visible."
        return True, verdict, [f"to compile for CUDA here: {AHEAD_OF_TIME}"]
    verdict = "bnext runs on the CPU only, although a CUDA compiler is there now."
    return True, verdict, [f"reinstall bnext: {AHEAD_OF_TIME}"]


def _judge_code(built_for: str, gpus: Mapping[str, tuple[int, int]]) -> tuple[bool, str, list[str]]:
    """For a build with CUDA code."""
    if not gpus:
        return True, "bnext runs on the CPU and on CUDA, but no GPU is visible now.", []
    code = {name: _toolchain.code_for(built_for, capability) for name, capability in gpus.items()}
    without = [name for name, what in code.items() if what is None]
    if without:
        verdict = f"bnext does not run on {', '.join(without)}: it was compiled for {built_for} alone."
        return False, verdict, [f"compile it where that GPU is visible: {AHEAD_OF_TIME}"]
    remedies = [
        f"{name} runs the {what}, which the driver compiles at first use, and which leaves out what is newer; "
        f"for machine code, compile where it is visible: {AHEAD_OF_TIME}"
        for name, what in code.items()
        if what.startswith("PTX")
    ]
    return True, "bnext runs on the CPU and on CUDA.", remedies


def _with_cuda(torch_cuda: str | None) -> str:
    return f"for CUDA {torch_cuda}" if torch_cuda else "without CUDA"


def _visible() -> dict[str, tuple[int, int]]:
    devices = range(torch.cuda.device_count())
    return {torch.cuda.get_device_name(i): torch.cuda.get_device_capability(i) for i in devices}


def _gpus() -> str:
    names = [f"{name} ({'.'.join(map(str, capability))})" for name, capability in _visible().items()]
    return ", ".join(names) or "none visible"


def _cxx(problems: list[str]) -> str:
    command = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(command) is None:
        problems.append("install a C++ compiler (Debian, Ubuntu: apt-get install g++), or set CXX")
        return f"{command} is not on PATH"
    answer = subprocess.run([command, "--version"], capture_output=True, text=True).stdout
    return f"{command}: {answer.splitlines()[0]}" if answer else command


def _ninja(problems: list[str]) -> str:
    _toolchain.put_ninja_on_path()
    found = shutil.which("ninja")
    if found is None:
        problems.append("pip install ninja")
    return found or "not on PATH"


def _architectures(toolkit: _toolchain.Toolkit | None) -> str:
    if requested := _toolchain.requested_architectures():
        return f"{requested} (TORCH_CUDA_ARCH_LIST)"
    if toolkit is None:
        return "none"
    gpus = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    chosen = _toolchain.choose_architectures(_toolchain.known_architectures(toolkit), gpus)
    return f"{' '.join(chosen)} ({'the visible GPUs' if gpus else 'all, as no GPU is visible'})"


if __name__ == "__main__":
    sys.exit(main())
