"""Builds executables that run CUDA kernels on the simulated device.

Objects and executables are kept in build/simt, named by a hash of everything that went into them, so
that a change rebuilds just what it touches. Processes that build the same thing wait for each other.
"""

import fcntl
import hashlib
import os
import re
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SIMT = Path("tests/simt")
CACHE = ROOT / "build" / "simt"

# plain: fast; reports what rendezvous see. sanitize: AddressSanitizer and UBSan. race: every access of a
# kernel goes through race.cpp.
MODES = ("plain", "sanitize", "race")

# Strict aliasing is off because nvcc's is; contraction, so that all modes and machines compute alike; a
# fixed address lets race.cpp keep code addresses in 31 bits. Line numbers are all that reports need of -g,
# which otherwise takes half of the time.
COMMON = "-std=c++17 -g1 -fno-strict-aliasing -ffp-contract=off -fno-pie -pthread -Wall -Wextra -Werror=switch -Wno-unknown-pragmas"
# kernel.cpp follows relocations, which calls within a section do without.
COMMON += " -ffunction-sections"
LINK = "-no-pie -pthread -Wl,--emit-relocs"
RUNTIME = ("context", "copies", "kernel", "memory", "rendezvous", "report", "runtime", "schedule")
# Without what AddressSanitizer sees anyway, for the time to compile.
SANITIZE = "-fsanitize=address,undefined -fno-sanitize=null,object-size"
SANITIZE += " -fno-sanitize-recover=all"
RACE = "-fsanitize=thread,alignment,bounds -fno-sanitize-recover=all"


class BuildError(RuntimeError):
    """The compiler's command and what it printed."""


@lru_cache
def compiler():
    command = shlex.split(os.environ.get("CXX") or "g++")
    return command, run([*command, "--version"])


def flags(mode, kernel, defines=()):
    """Compiler flags of a kernel's source, or of a host source, in a mode."""
    out = [*COMMON.split(), f"-I{SIMT}", *(f"-D{name}" for name in defines)]
    # What -O2 saves when kernels run, it takes several times when they compile; of the device, the other way round.
    # In race mode, what -O1 does not inline of the standard library would be linked once, with hooks, for race.cpp too.
    out.append("-O1" if mode == "sanitize" or (kernel and mode == "plain") else "-O2")
    if mode == "sanitize":
        out += SANITIZE.split()
    if mode == "race":
        out.append("-DSIMT_RACE")
        if kernel:
            # Volatile accesses count as atomic, so they must be told apart.
            clang = "clang" in compiler()[1]
            out += RACE.split() + (["-mllvm"] if clang else ["--param"])
            out.append("-tsan-distinguish-volatile=1" if clang else "tsan-distinguish-volatile=1")
    return out


def build(name, mode, kernels, host=(), defines=()):
    """The executable made of these sources (paths from the repository's root) and the device."""
    runtime = [SIMT / f"{part}.cpp" for part in (*RUNTIME, *(["race"] if mode == "race" else []))]
    jobs = [(Path(source), mode, True, defines) for source in kernels]
    jobs += [(Path(source), mode, False, defines) for source in host]
    jobs += [(source, mode, False) for source in runtime]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda job: compile_object(*job), jobs))
    link = [*LINK.split(), *(SANITIZE.split() if mode == "sanitize" else [])]
    command = [*compiler()[0], *link, *map(str, objects)]
    return cached(f"{name}-{mode}", [*command, compiler()[1]], lambda out: run([*command, "-o", str(out)]))


def compile_object(source, mode, kernel, defines=()):
    command = [*compiler()[0], *flags(mode, kernel, defines), "-x", "c++", "-c", str(source)]
    parts = [*command, compiler()[1], *(path.read_text() for path in with_headers(ROOT / source))]

    def make(out):
        run([*command, "-o", str(out)])
        if kernel and mode == "race":
            symbols = [f"--redefine-sym={f}=simt_{f}" for f in ("memcpy", "memmove", "memset")]
            run(["objcopy", *symbols, str(out)])

    return cached(f"{source.parent.name}-{source.stem}-{mode}.o", parts, make)


def with_headers(source):
    """The source and, in a fixed order, every file that it includes in quotes, or of the device's in brackets."""
    found, queue = [], [source]
    while queue:
        path = queue.pop().resolve()
        if path in found:
            continue
        found.append(path)
        for header in re.findall(r'^\s*#\s*include\s+["<]([^">]+)[">]', path.read_text(), re.M):
            queue += [p for p in (path.parent / header, ROOT / SIMT / header) if p.exists()][:1]
    return found


def cached(name, parts, make):
    """The file that make(path) makes, unless there is one of the same parts already."""
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    path = CACHE / f"{name}.{key}"
    if path.exists():
        return path
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # held until the file is closed, also by a process that dies
        if not path.exists():
            part = CACHE / f"{name}.part"
            make(part)
            part.replace(path)
            # Some earlier versions stay, for going back and forth.
            versions = sorted(CACHE.glob(f"{name}.{'[0-9a-f]' * 16}"), key=lambda p: p.stat().st_mtime)
            for old in versions[:-4]:
                old.unlink()
    return path


def run(command):
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise BuildError(f"{shlex.join(command)}\nfailed with exit status {done.returncode}:\n{done.stdout}")
    return done.stdout
