"""Loads the compiled module bnext._C: the one compiled ahead of time where it matches the running
torch, one compiled at first use otherwise.

BNEXT_BUILD=jit always takes the latter; BNEXT_BUILD=aot never does.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch

from . import _toolchain

if TYPE_CHECKING:
    from ._C import Extension

PACKAGE = Path(__file__).parent
MODULE = "bnext._C"
#: Ends the errors that the doctor knows more about.
HINT = "; `python -m bnext.doctor` says how to repair it"


@dataclass(frozen=True)
class Build:
    """A compiled extension: where it is, or is going to be, and what it is for."""

    kind: Literal["aot", "jit"]  # compiled ahead of time, or just in time
    path: Path
    info: dict[str, str]  # as in _toolchain.describe
    why: str = ""  # why it is compiled just in time

    @property
    def done(self) -> Path:
        """Written last, when compiled just in time: a linker that was killed may leave a file at `path`."""
        return self.path.with_suffix(".done")

    @property
    def compiled(self) -> bool:
        return self.kind == "aot" or self.done.exists()


def sources_folder() -> Path:
    """csrc: inside the installed package, beside it in a source tree."""
    inside = PACKAGE / "csrc"
    return inside if inside.is_dir() else PACKAGE.parent / "csrc"


_loading = threading.Lock()


@functools.cache
def extension() -> Extension:
    """The compiled module. The first call loads it, and compiles it where there is none to load."""
    with _loading:
        if MODULE in sys.modules:
            return cast("Extension", sys.modules[MODULE])
        build, module = load()
        return module or _import(_compiled(build))


def load() -> tuple[Build, Extension | None]:
    """What the first use gets: loaded, or None where it has to be compiled first."""
    build = find()
    if build.kind == "aot":
        try:
            return build, _import(build.path)
        except ImportError as error:
            build = just_in_time(f"{build.path} does not load ({error})")
    if os.environ.get("BNEXT_BUILD") == "aot":
        raise ImportError(f"bnext: {build.why}, and BNEXT_BUILD=aot forbids compiling one now{HINT}")
    return build, _import(build.path) if build.compiled else None


def find() -> Build:
    """Which extension the first use loads, or compiles. Compiles and loads nothing itself."""
    how = os.environ.get("BNEXT_BUILD", "")
    if how not in ("", "aot", "jit"):
        raise ValueError(f"BNEXT_BUILD must be 'aot', 'jit' or unset, got {how!r}")
    if how == "jit":
        return just_in_time("BNEXT_BUILD=jit asks for it")
    path = next((p for suffix in EXTENSION_SUFFIXES if (p := PACKAGE / f"_C{suffix}").is_file()), None)
    if path is None:
        return just_in_time("no extension was compiled ahead of time")
    info = _toolchain.read_info(path)
    if not matches(info, torch.__version__, torch.version.cuda):
        built_for = f"torch {info['torch']} (CUDA {info['torch_cuda']})" if info else "an unknown torch"
        running = f"torch {torch.__version__} (CUDA {torch.version.cuda or 'none'})"
        return just_in_time(f"the extension compiled ahead of time is for {built_for}, and this is {running}")
    return Build("aot", path, info)


def matches(info: dict[str, str], torch_version: str, torch_cuda: str | None) -> bool:
    """Whether an extension built for `info` can run with this torch, which keeps its binary
    interface from one patch release to the next, not between minor ones or nightly builds."""

    def interface(version: str) -> str:
        public = version.split("+")[0]
        release = re.fullmatch(r"(\d+\.\d+)\.\d+", public)
        return release[1] if release else public

    return (
        bool(info)
        and interface(info["torch"]) == interface(torch_version)
        and info["torch_cuda"] == (torch_cuda or "none")
    )


def just_in_time(why: str) -> Build:
    """The build for this torch, this Python, the visible GPUs and these very sources."""
    toolkit, architectures = _cuda_target()
    info = _toolchain.describe(torch.__version__, torch.version.cuda, toolkit, architectures)
    digest = hashlib.sha256(repr(info).encode())
    for path in sorted(path for path in sources_folder().rglob("*") if path.is_file()):
        digest.update(path.name.encode() + path.read_bytes())
    folder = f"torch{torch.__version__}-{sys.implementation.cache_tag}-{digest.hexdigest()[:16]}"
    return Build("jit", _cache() / folder / "_C.so", info, why)


def _cuda_target() -> tuple[_toolchain.Toolkit | None, list[str]]:
    """The CUDA compiler and the architectures to compile for at first use: CUDA only where a GPU
    is visible or TORCH_CUDA_ARCH_LIST asks for it, since nobody waits for code that cannot run."""
    gpus = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    if torch.version.cuda is None or not (gpus or _toolchain.requested_architectures()):
        return None, []
    toolkit, _ = _toolchain.find_toolkit(torch.version.cuda)
    if toolkit is None:
        return None, []
    return toolkit, _toolchain.architectures_for(toolkit, gpus, _toolchain.architectures_of_torch(torch))


def _cache() -> Path:
    """Where torch's own just-in-time extensions go, if the user moved them; else the user's cache."""
    moved = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(moved or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bnext"


def _import(path: Path) -> Extension:
    spec = importlib.util.spec_from_file_location(MODULE, path)
    assert spec is not None and spec.loader is not None  # it has an extension module's suffix
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[MODULE] = module
    return cast("Extension", module)


def unwritable(folder: Path) -> str | None:
    """Why nothing can be compiled into `folder`, which need not exist yet; None where it can. Leaves nothing behind.

    It tries, since permissions say too little: root has all of them, in /proc and on a read-only disk as well. It tries
    under another name, since another process may be about to compile into `folder`."""
    # A link that leads nowhere counts as existing: no folder can be made in its place.
    existing = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if not existing.is_dir():
        return f"{existing} is not a folder"
    try:
        with tempfile.TemporaryDirectory(prefix=".bnext-", dir=existing) as probe:
            Path(probe, "file").write_bytes(b"0")
    except PermissionError:
        return f"{existing} is not writable for this user{_owner(existing)}"
    except OSError as error:
        return f"no file can be written in {existing}: {error.strerror}"
    return None


def _owner(folder: Path) -> str:
    try:
        return "" if folder.stat().st_uid == os.getuid() else f", and belongs to {folder.owner()}"
    except (OSError, KeyError):  # KeyError: a user without a name
        return ""


def _compiled(build: Build) -> Path:
    """Compiles `build` unless that was done before, in this process or another."""
    if build.compiled:
        return build.path
    folder = build.path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            if not build.compiled:
                _compile(build)
                build.done.touch()
    except OSError as error:
        reason = unwritable(folder) or error
        raise ImportError(
            f"bnext: {build.why}, and one cannot be compiled into {folder}: {reason}; "
            "set TORCH_EXTENSIONS_DIR to a folder of yours"
        ) from error
    return build.path


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time. The kernel drops this lock with the process that holds it, whereas
    torch's own is a file that outlives a killed process, for which torch then waits for ever."""
    with open(folder / "bnext.lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log(f"waiting for another process that compiles into {folder}")
            fcntl.flock(handle, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        yield


def _compile(build: Build) -> None:
    from torch.utils import cpp_extension

    toolkit, architectures = _cuda_target()
    _toolchain.put_ninja_on_path()
    for tool in ("ninja", _toolchain.cxx()):
        if shutil.which(tool) is None:
            raise ImportError(f"bnext: {build.why}, and to compile one now {tool} is missing{HINT}")
    what, how_long = ("C++ and CUDA sources", "some minutes") if toolkit else ("C++ sources", "two or three minutes")
    _log(f"{build.why}: compiling {what} for torch {torch.__version__}, once; takes {how_long} ({build.path.parent})")
    if torch.cuda.is_available() and toolkit is None:
        _log("no CUDA compiler was found: tensors on the GPU will be refused; see `python -m bnext.doctor`")

    folder = build.path.parent
    recipe = _toolchain.recipe(sources_folder(), build.info, toolkit, architectures)
    library_dirs = []
    if toolkit is not None:
        cpp_extension.CUDA_HOME = str(toolkit.home)  # torch's own guess may hold no headers
        library_dirs = [f"-L{_toolchain.link_folder(toolkit, folder)}"]
    stubs = [str(_stub(source, folder)) for source in recipe.sources]
    try:
        with _progress(folder, len(stubs)):
            cpp_extension.load(
                name=build.path.stem,
                sources=stubs,
                extra_cflags=recipe.cxx,
                extra_cuda_cflags=recipe.nvcc,
                extra_ldflags=library_dirs + recipe.link,
                build_directory=str(folder),
                is_python_module=False,
            )
    except Exception as error:
        raise ImportError(f"bnext: {build.why}, and compiling one now failed{HINT}\n{error}") from error


def _stub(source: Path, folder: Path) -> Path:
    """A file that includes `source`: torch names an object after its source's stem alone, and
    several of ours share one."""
    stub = folder / "_".join(source.relative_to(sources_folder()).parts)
    stub.write_text(f'#include "{source.resolve()}"\n')
    return stub


@contextlib.contextmanager
def _progress(folder: Path, files: int, seconds: float = 10) -> Iterator[None]:
    """Says every so often how many of the files are compiled: minutes of silence look like a hang."""
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(seconds):
            _log(f"{len(list(folder.glob('*.o')))} of {files} files are compiled")

    thread = threading.Thread(target=watch, name="bnext-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


def _log(line: str) -> None:
    print(f"bnext: {line}", file=sys.stderr, flush=True)
