"""Says whether two revisions compile to the same machine code, the names of kernels aside.

    python tests/compare_machine_code.py HEAD~1 [REVISION] [--architectures 8.0,9.0]

compares the kernels of a revision with those of another, or of the working tree. A renaming must not
change one byte. Needs nvcc and cuobjdump; no GPU and no torch.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import test_static_quality as static  # noqa: E402


def kernels_of(csrc: Path, architecture: str) -> collections.Counter:
    """How often each kernel's code, as a digest, occurs."""
    sources = sorted(csrc.glob("cuda/**/*.cu"))
    with tempfile.TemporaryDirectory() as made, ThreadPoolExecutor(2) as pool:
        cubins = list(pool.map(lambda source: compiled(source, architecture, Path(made)), sources))
        found: collections.Counter = collections.Counter()
        for cubin in cubins:
            text = subprocess.run(
                [static.cuobjdump(), "--dump-sass", str(cubin)], check=True, capture_output=True, text=True
            ).stdout
            for function in text.split("Function : ")[1:]:
                code = re.findall(r"/\* (0x[0-9a-f]{16}) \*/", function)
                found[hashlib.sha256(" ".join(code).encode()).hexdigest()] += 1
    return found


def compiled(source: Path, architecture: str, folder: Path) -> Path:
    cubin = folder / f"{source.stem}.cubin"
    stage = static._toolchain.ptx_for(architecture, static._toolchain.ARCHITECTURES)
    ptx, code = (a.replace(".", "") for a in (stage, architecture))
    command = [str(static.TOOLKIT.nvcc), "-cubin", f"-arch=compute_{ptx}", f"-code=sm_{code}", *static.flags()]
    subprocess.run([*command, "-o", str(cubin), str(source)], check=True)
    return cubin


def checkout(revision: str, folder: Path) -> Path:
    archive = subprocess.run(["git", "archive", revision, "csrc"], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)
    return folder / "csrc"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("before")
    parser.add_argument("after", nargs="?", help="the working tree where it is left out")
    parser.add_argument("--architectures", default="8.0,9.0")
    arguments = parser.parse_args()
    differ = False
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        before = checkout(arguments.before, Path(one))
        after = checkout(arguments.after, Path(two)) if arguments.after else static.CSRC
        for architecture in arguments.architectures.split(","):
            old, new = (kernels_of(csrc, architecture) for csrc in (before, after))
            same, changed = (old & new).total(), (old - new).total()
            differ |= old != new
            print(
                f"{architecture}: {old.total()} and {new.total()} kernels, {same} the same, {changed} changed or gone"
            )
    return int(differ)


if __name__ == "__main__":
    sys.exit(main())
