"""Which compiler there is, and what it is to compile: one answer for setup.py, the just-in-time
build, the doctor and the tests.

Imports neither torch nor the rest of bnext, so that setup.py can load this file by its path.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Compiled where no GPU says which one is wanted, as far as the compiler knows them and torch has kernels for that
#: generation: the first of each, whose machine code all of it runs. Where a GPU is visible, its own is compiled.
ARCHITECTURES = ("7.5", "8.0", "9.0", "10.0", "11.0", "12.0")

#: So that instruction sets give the same bits, the compiler fuses no multiplication into an addition by itself. And it
#: vectorizes no square root that may set errno.
ARITHMETIC = ("-ffp-contract=off", "-fno-math-errno")

#: Where the sources' use of __CUDA_ARCH__ begins to tell architectures apart: from one of these to the next, kernels
#: are the same PTX.
STAGES = ("7.5", "8.0", "9.0")

#: Where CUDA's own installers put it; the last place that torch looks in.
CONVENTIONAL_PREFIX = Path("/usr/local/cuda")


@dataclass(frozen=True)
class Toolkit:
    """A CUDA compiler with its headers."""

    home: Path
    origin: str  # what led to it, in words
    version: str  # "13.0"

    @property
    def nvcc(self) -> Path:
        return self.home / "bin" / "nvcc"


def find_toolkit(
    torch_cuda: str | None = None,
    *,
    environ: Mapping[str, str] = os.environ,
    prefix: Path = CONVENTIONAL_PREFIX,
    search: Iterable[str] | None = None,
) -> tuple[Toolkit | None, list[str]]:
    """The first usable CUDA toolkit, and why those before it were passed over.

    `torch_cuda` is `torch.version.cuda`: a toolkit of another major version is no use to that
    torch. None accepts any. `search` defaults to `sys.path`.
    """
    passed_over: list[str] = []
    for origin, home in _candidates(environ, prefix, sys.path if search is None else search):
        fault, version = _inspect(home, torch_cuda)
        if fault is None:
            return Toolkit(home, origin, version), passed_over
        passed_over.append(f"{origin}: {home} {fault}")
    return None, passed_over


def _candidates(environ: Mapping[str, str], prefix: Path, search: Iterable[str]) -> Iterator[tuple[str, Path]]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if environ.get(variable):
            yield variable, Path(environ[variable])
    on_path = shutil.which("nvcc", path=environ.get("PATH", ""))
    if on_path:
        # Torch's own guess is the folder above, also where nvcc is a wrapper script that lies
        # outside its toolkit, or a link into it.
        yield "nvcc on PATH", Path(on_path).parent.parent
        if Path(on_path).is_symlink():
            yield "nvcc on PATH, links followed", Path(on_path).resolve().parent.parent
    yield "the conventional prefix", prefix
    for folder in search:
        for home in sorted(Path(folder or ".").glob("nvidia/cu[1-9]*"), reverse=True):
            yield "NVIDIA's compiler packages", home


def _inspect(home: Path, torch_cuda: str | None) -> tuple[str | None, str]:
    """(what is wrong with this toolkit or None, its version)."""
    if not (home / "bin" / "nvcc").is_file():
        return "has no bin/nvcc", ""
    if not (home / "include" / "cuda_runtime.h").is_file():
        return "has no include/cuda_runtime.h", ""
    try:
        answer = _output(home / "bin" / "nvcc", "--version")
    except (OSError, subprocess.CalledProcessError) as error:
        return f"does not run ({error})", ""
    release = re.search(r"release (\d+\.\d+)", answer)
    if release is None:
        return "does not tell its version", ""
    if torch_cuda is not None and release[1].split(".")[0] != torch_cuda.split(".")[0]:
        return f"is CUDA {release[1]}, and torch is built for CUDA {torch_cuda}", release[1]
    return None, release[1]


def _output(*command: os.PathLike | str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def known_architectures(toolkit: Toolkit) -> list[str]:
    """All that this compiler can compile for: ["7.5", "8.0", ...]."""
    numbers = re.findall(r"compute_(\d+)\b", _output(toolkit.nvcc, "--list-gpu-arch"))
    return [f"{n[:-1]}.{n[-1]}" for n in sorted(numbers, key=int)]


def requested_architectures(environ: Mapping[str, str] = os.environ) -> str:
    """TORCH_CUDA_ARCH_LIST, empty where the user leaves the choice open."""
    value = environ.get("TORCH_CUDA_ARCH_LIST", "")
    return "" if value == "native" else value


def architectures_for(toolkit: Toolkit, capabilities: Iterable[tuple[int, int]], of_torch: str | None) -> list[str]:
    """The architectures to compile for; none where the user's request is for torch to read."""
    if requested_architectures():
        return []
    return choose_architectures(known_architectures(toolkit), capabilities, of_torch)


def choose_architectures(
    known: Sequence[str], capabilities: Iterable[tuple[int, int]], of_torch: str | None = None
) -> list[str]:
    """Those of the visible GPUs. Where none is visible, all of ARCHITECTURES that are known, of the generations that
    torch was compiled for (`of_torch`: "sm_75 sm_80 ..."; None where it does not say). A GPU that the compiler does not
    know runs the PTX of the newest that is older."""
    older = [[a for a in known if _number(a) <= 10 * major + minor] for major, minor in capabilities]
    chosen = {max(those, key=_number) for those in older if those}
    if not chosen:
        generations = {int(number) // 10 for number in re.findall(r"sm_(\d+)", of_torch or "")}
        chosen = {a for a in ARCHITECTURES if a in known and (not generations or _number(a) // 10 in generations)}
    return sorted(chosen, key=_number)


def architectures_of_torch(torch: Any) -> str | None:
    """ "sm_75 sm_80 ...", whether or not there is a GPU; None of a torch without CUDA."""
    return getattr(torch._C, "_cuda_getArchFlags", lambda: None)()


def _number(architecture: str) -> int:
    return int(architecture.replace(".", ""))


def code_for(built_for: str, capability: tuple[int, int]) -> str | None:
    """What a GPU runs of an extension that was built for these `gpus` (of `describe`, or as read from the file):
    "machine code of 9.0"; "PTX of 8.0", which the driver compiles at first use, and in which nothing that came
    after 8.0 is used; or None. Empty where the user named generations, which only torch understands."""
    major, minor = capability
    machine_code, ptx = [], []
    for item in re.split("[;/]", built_for):
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", item)
        if found is None:
            return ""
        architecture, number = (int(found[1]), int(found[2])), f"{found[1]}.{found[2]}{found[3]}"
        # Of one generation, an older member's code runs on a newer one; with "a", on none but that very one.
        if architecture == capability or (found[3] != "a" and (major, 0) <= architecture < capability):
            machine_code.append((architecture, number))
        if found[4] and not found[3] and architecture <= capability:
            ptx.append((architecture, number))
    if machine_code:
        return f"machine code of {max(machine_code)[1]}"
    return f"PTX of {max(ptx)[1]}" if ptx else None


def ptx_for(architecture: str, architectures: Sequence[str]) -> str:
    """Whose PTX this architecture's machine code is made of: the first of the same stage. Two thirds of the time that a
    kernel takes to compile go by before there is PTX."""
    stage = max((s for s in STAGES if _number(s) <= _number(architecture)), key=_number, default=architecture)
    return min((a for a in architectures if _number(stage) <= _number(a) <= _number(architecture)), key=_number)


def gencode(architectures: Sequence[str]) -> list[str]:
    """nvcc's flags: machine code for each architecture, and PTX of the newest stage for those to come."""
    pairs = [(_number(ptx_for(a, architectures)), _number(a)) for a in architectures]
    flags = [f"-gencode=arch=compute_{ptx},code=sm_{number}" for ptx, number in pairs]
    return flags + [f"-gencode=arch=compute_{ptx},code=compute_{ptx}" for ptx, _ in pairs[-1:]]


@dataclass(frozen=True)
class Recipe:
    """What to compile, and how."""

    sources: list[Path]
    cxx: list[str]
    nvcc: list[str]
    link: list[str]


def recipe(csrc: Path, info: Mapping[str, str], toolkit: Toolkit | None, architectures: Sequence[str]) -> Recipe:
    """`info` becomes readable in the compiled file (see `read_info`). Empty `architectures`
    leave the choice to torch, which reads TORCH_CUDA_ARCH_LIST."""
    patterns = ["bindings/*.cpp", "cpu/*.cpp"] + (["cuda/**/*.cpp", "cuda/**/*.cu"] if toolkit else [])
    # No -std: torch adds the one that its headers need; ours are content with C++17 and later.
    cxx = ["-O3", "-g0", "-fopenmp", *ARITHMETIC, f"-DBNEXT_BUILD_INFO={_encode(info)}"]
    # The many architectures are alike: compressed, they take an eighth of the space.
    compressed = toolkit is not None and int(toolkit.version.split(".")[0]) >= 13
    return Recipe(
        sources=sorted(path for pattern in patterns for path in csrc.glob(pattern)),
        cxx=cxx + (["-DBNEXT_WITH_CUDA"] if toolkit else []),
        nvcc=["-O3", *(["--compress-mode=size"] if compressed else []), *gencode(architectures)],
        link=["-fopenmp"],
    )


def link_folder(toolkit: Toolkit, folder: Path) -> Path:
    """A folder in which the linker finds -lcudart: NVIDIA's packages ship libcudart.so.13 without
    the plain name that linkers look for, so that a link to it is made in `folder`."""
    for libraries in (toolkit.home / "lib64", toolkit.home / "lib"):
        if (libraries / "libcudart.so").exists():
            return libraries
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / "libcudart.so"
    for library in sorted(toolkit.home.glob("lib*/libcudart.so.*")):
        link.unlink(missing_ok=True)
        link.symlink_to(library)
    return folder


def describe(
    torch_version: str, torch_cuda: str | None, toolkit: Toolkit | None, architectures: Sequence[str]
) -> dict[str, str]:
    """The `info` of a recipe."""
    return {
        "torch": torch_version,
        "torch_cuda": torch_cuda or "none",
        "nvcc": toolkit.version if toolkit else "none",
        "gpus": _spelled(architectures) if toolkit else "none",
    }


def _spelled(architectures: Sequence[str]) -> str:
    if not architectures:
        return requested_architectures()
    ptx = ptx_for(architectures[-1], architectures)
    return ";".join(a + "+PTX" if a == ptx else a for a in architectures)


def _encode(info: Mapping[str, str]) -> str:
    # Passes through shells and the C preprocessor unquoted.
    return ",".join(f"{key}:{re.sub(r'[^0-9A-Za-z.+]+', '/', value)}" for key, value in info.items())


def read_info(path: Path) -> dict[str, str]:
    """What a compiled extension was built for, read from its bytes: loading one that was built
    for another torch may crash instead of failing. Empty where the file does not say."""
    found = re.search(rb"bnext-build\{([^{}\0]+)\}", path.read_bytes())
    return dict(item.split(":", 1) for item in found[1].decode().split(",")) if found else {}


def cxx() -> str:
    """The command of the C++ compiler that torch runs, without its arguments."""
    return (os.environ.get("CXX", "c++").split() or ["''"])[0]


def put_ninja_on_path() -> None:
    """A virtual environment that is used without being activated has ninja, but not on PATH."""
    scripts = sysconfig.get_path("scripts")
    if shutil.which("ninja") is None and (Path(scripts) / "ninja").is_file():
        os.environ["PATH"] = os.pathsep.join((scripts, os.environ.get("PATH", "")))
