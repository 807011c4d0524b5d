"""`python -m bnext.doctor`: which bnext is in use, whether its first layer will run and on what, and
what to do where that is less than this machine offers. Compiles nothing. Exits with 1 where the
first layer would fail.

It is for the worst moment, so that it needs nothing but Python: torch, the rest of the package and
the compiled extension are looked at one by one, and what is wrong with them is a line of the report.
"""

from __future__ import annotations

import importlib
import importlib.util
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__, _toolchain

if TYPE_CHECKING:
    from ._extension import Build

PACKAGE = Path(__file__).resolve().parent
AHEAD_OF_TIME = "pip install --no-build-isolation --force-reinstall --no-deps ."
COMPILER_PACKAGES = "pip install nvidia-cuda-nvcc nvidia-cuda-cccl"


@dataclass
class Verdict:
    works: bool
    text: str
    remedies: list[str] = field(default_factory=list)


class Report:
    """Lines of a name and a text."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def add(self, name: str, text: str) -> None:
        self.lines.append((name, text))

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.lines)
        return "\n".join(f"{name:{width}}  {text}" for name, text in self.lines)


def main() -> int:
    report = Report()
    report.add("system", f"{platform.system()} {platform.release()} {platform.machine()}")
    report.add("python", f"{platform.python_version()} ({sys.executable})")
    describe_package(report, sys.path)
    try:
        verdict = examine(report)
    except Exception as error:
        verdict = Verdict(False, f"The doctor failed, which is a bug of bnext: {_one_line(error)}.")
    print(report)
    print(f"\n{verdict.text}")
    print("".join(f"  - {remedy}\n" for remedy in verdict.remedies), end="")
    return 0 if verdict.works else 1


def describe_package(report: Report, search: list[str]) -> None:
    """Which of several packages of this name this is: inside a clone, the clone hides the installed one."""
    report.add("bnext", f"{__version__}, {_kind_of(PACKAGE)} in {PACKAGE}")
    folders = list(dict.fromkeys(Path(folder or ".").resolve() for folder in search))
    found = [folder / "bnext" for folder in folders if (folder / "bnext" / "doctor.py").is_file()]
    if PACKAGE.parent == Path.cwd():
        report.add("  because", "python -m looks into the working directory first")
    elif PACKAGE not in found:
        report.add("  because", "an editable install points to it")
    for other in found:
        if other != PACKAGE:
            report.add("  hidden", f"{_kind_of(other)} in {other}; to ask about it, run this in another folder")


def _kind_of(package: Path) -> str:
    return "an installed package" if (package / "csrc").is_dir() else "the sources of a clone"


def examine(report: Report) -> Verdict:
    torch, error = _imported("torch")
    if torch is None:
        report.add("torch", error)
        return Verdict(False, "bnext does not work: torch does not import.", _remedies_for_torch(error))
    report.add("torch", f"{torch.__version__}, built {_with_cuda(torch.version.cuda)}")
    report.add("GPUs", _gpus(torch))

    problems: list[str] = []
    report.add("C++ compiler", _cxx(problems))
    report.add("ninja", _ninja(problems))
    _headers_and_setuptools(problems)
    toolkit, passed_over = _toolchain.find_toolkit(torch.version.cuda)
    report.add("CUDA compiler", f"{toolkit.version} in {toolkit.home} ({toolkit.origin})" if toolkit else "none found")
    for reason in passed_over:
        report.add("  passed over", reason)
    report.add("architectures", _architectures(torch, toolkit))

    layers, error = _imported("bnext.nn")
    if layers is None:
        report.add("bnext.nn", error)
        return Verdict(
            False, f"bnext does not work: it does not import with torch {torch.__version__}.", [AHEAD_OF_TIME]
        )
    from . import _extension

    try:
        build, module = _extension.load()
    except Exception as failure:
        error = _one_line(failure).removesuffix(_extension.HINT)  # which is to come here
        report.add("extension", error)
        return Verdict(False, f"bnext does not work: {error}.", _remedies_for_loading(failure))
    report.add("extension", f"compiled {'ahead of time' if build.kind == 'aot' else 'just in time'}: {build.path}")
    if build.kind == "jit":
        report.add("  because", build.why)
        report.add("  compiled", "already" if build.compiled else "at first use")
        obstacle = None if build.compiled else _extension.unwritable(build.path.parent)
        if obstacle is not None:
            report.add("  cache", obstacle)
            problems.append("set TORCH_EXTENSIONS_DIR to a folder that you can write to")
    report.add("  built for", ", ".join(f"{key} {value}" for key, value in build.info.items()))
    if module is not None:
        for device in ["cpu"] + (["cuda"] if torch.cuda.is_available() and build.info["nvcc"] != "none" else []):
            failed = try_layer(torch, layers, device)
            report.add(f"layer on {device}", "runs" if failed is None else "fails")
            if failed is not None:
                remedies = [] if "BNEXT_" in failed else [AHEAD_OF_TIME]  # of a variable, the error says it all
                return Verdict(False, f"bnext does not work: a layer on {device} fails: {failed}.", remedies)
    return diagnose(build, toolkit, torch.version.cuda, _visible(torch), problems)


def try_layer(torch: Any, layers: Any, device: str) -> str | None:
    """The error of the first layer; None where it runs."""
    try:
        layers.BatchNorm1d(2, device=device)(torch.ones(2, 2, device=device))
    except Exception as error:
        return _one_line(error)
    return None


def diagnose(
    build: Build,
    toolkit: _toolchain.Toolkit | None,
    torch_cuda: str | None,
    gpus: Mapping[str, tuple[int, int]],
    problems: list[str],
) -> Verdict:
    """Of an extension that loads, or is still to be compiled: what it runs on, and how to get more. `gpus` are those
    that are visible, with their capabilities; `problems` are what a compilation would fail for, as remedies."""
    if not build.compiled and problems:
        return Verdict(False, "bnext does not work: there is nothing to load, and it cannot be compiled.", problems)
    if build.info["nvcc"] != "none":
        return _diagnose_code(build.info["gpus"], gpus)
    if torch_cuda is None:
        remedies = ["install a CUDA build of torch, then reinstall bnext"] if shutil.which("nvidia-smi") else []
        return Verdict(True, "bnext runs on the CPU; this torch is built without CUDA.", remedies)
    if toolkit is None:
        text = "bnext runs on the CPU only: no CUDA compiler was found when it was built, nor is there one now."
        major = torch_cuda.split(".")[0]
        return Verdict(True, text, [f"set CUDA_HOME to a CUDA {major} toolkit, or: {COMPILER_PACKAGES}", AHEAD_OF_TIME])
    if build.kind == "jit" and not gpus:
        text = "bnext runs on the CPU; it compiles for CUDA at first use where a GPU is visible."
        return Verdict(True, text, [f"to compile for CUDA here: {AHEAD_OF_TIME}"])
    text = "bnext runs on the CPU only, although a CUDA compiler is there now."
    return Verdict(True, text, [f"reinstall bnext: {AHEAD_OF_TIME}"])


def _diagnose_code(built_for: str, gpus: Mapping[str, tuple[int, int]]) -> Verdict:
    """For a build with CUDA code."""
    if not gpus:
        return Verdict(True, "bnext runs on the CPU and on CUDA, but no GPU is visible now.")
    code = {name: _toolchain.code_for(built_for, capability) for name, capability in gpus.items()}
    without = [name for name, what in code.items() if what is None]
    if without:
        text = f"bnext does not run on {', '.join(without)}: it was compiled for {built_for} alone."
        return Verdict(False, text, [f"compile it where that GPU is visible: {AHEAD_OF_TIME}"])
    remedies = [
        f"{name} runs the {what}, which the driver compiles at first use, and which leaves out what is newer; "
        f"for machine code, compile where it is visible: {AHEAD_OF_TIME}"
        for name, what in code.items()
        if what is not None and what.startswith("PTX")
    ]
    return Verdict(True, "bnext runs on the CPU and on CUDA.", remedies)


def _imported(name: str) -> tuple[Any, str]:
    """(the module or None, why not). Whatever an import may raise: a missing library is an OSError."""
    try:
        return importlib.import_module(name), ""
    except Exception as error:
        return None, f"does not import: {_one_line(error)}"


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:400]}"


def _remedies_for_torch(error: str) -> list[str]:
    if "No module named 'torch'" in error:
        return [f"install torch into this Python: {sys.executable} -m pip install torch", AHEAD_OF_TIME]
    return ["repair torch first: python -c 'import torch' must succeed; then come back to this"]


def _remedies_for_loading(failure: Exception) -> list[str]:
    if isinstance(failure, ValueError):  # an environment variable; its message says which values there are
        return []
    return [AHEAD_OF_TIME]


def _with_cuda(torch_cuda: str | None) -> str:
    return f"for CUDA {torch_cuda}" if torch_cuda else "without CUDA"


def _visible(torch: Any) -> dict[str, tuple[int, int]]:
    devices = range(torch.cuda.device_count())
    return {torch.cuda.get_device_name(i): torch.cuda.get_device_capability(i) for i in devices}


def _gpus(torch: Any) -> str:
    names = [f"{name} ({'.'.join(map(str, capability))})" for name, capability in _visible(torch).items()]
    return ", ".join(names) or "none visible"


def _cxx(problems: list[str]) -> str:
    command = _toolchain.cxx()
    if shutil.which(command) is None:
        problems.append("install a C++ compiler (Debian, Ubuntu: apt-get install g++), or set CXX")
        return f"{command} is not on PATH"
    done = subprocess.run([command, "--version"], capture_output=True, text=True)
    if done.returncode != 0:
        problems.append("set CXX to a C++ compiler that works")
        return f"`{command} --version` fails: {(done.stderr or done.stdout).strip() or done.returncode}"
    return f"{command}: {done.stdout.splitlines()[0]}" if done.stdout else command


def _ninja(problems: list[str]) -> str:
    _toolchain.put_ninja_on_path()
    found = shutil.which("ninja")
    if found is None:
        problems.append("pip install ninja")
    return found or "not on PATH"


def _headers_and_setuptools(problems: list[str]) -> None:
    """What else torch's compilation at first use needs."""
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        problems.append("install Python's headers (Debian, Ubuntu: apt-get install python3-dev)")
    if importlib.util.find_spec("setuptools") is None:
        problems.append("pip install setuptools")


def _architectures(torch: Any, toolkit: _toolchain.Toolkit | None) -> str:
    if requested := _toolchain.requested_architectures():
        return f"{requested} (TORCH_CUDA_ARCH_LIST)"
    if toolkit is None:
        return "none"
    gpus = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    chosen = _toolchain.choose_architectures(
        _toolchain.known_architectures(toolkit), gpus, _toolchain.architectures_of_torch(torch)
    )
    return f"{' '.join(chosen)} ({'the visible GPUs' if gpus else 'those of torch, as no GPU is visible'})"


if __name__ == "__main__":
    sys.exit(main())
