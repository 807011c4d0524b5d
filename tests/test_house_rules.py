"""The rules of the house that a machine can check."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def is_ours(path: Path) -> bool:
    """Not what was built, installed or cached here."""
    folders = path.relative_to(ROOT).parts[:-1]
    made = {"build", "dist", "__pycache__"} & set(folders) or any(f.endswith(".egg-info") for f in folders)
    hidden = any(f.startswith(".") and f != ".ci" for f in folders)
    return path.is_file() and not made and not hidden and path.suffix not in (".so", ".png")


TEXT = sorted(path for path in ROOT.rglob("*") if is_ours(path))
CPP = [path for path in TEXT if path.suffix in (".h", ".cuh", ".cpp", ".cu")]
#: What a dependency may point to: bindings -> {cuda, cpu} -> core, and never cuda <-> cpu.
MAY_INCLUDE = {"core": {"core"}, "cpu": {"cpu", "core"}, "cuda": {"cuda", "core"}}


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def lines_that_match(pattern: str, paths) -> list[str]:
    expression = re.compile(pattern)
    return [
        f"{shown(path)}:{number}: {line.strip()}"
        for path in paths
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if expression.search(line)
    ]


def test_torch_is_included_by_bindings_alone():
    outside = [p for p in CPP if "csrc" in p.parts and "bindings" not in p.parts]
    assert outside
    assert lines_that_match(r"#\s*include\s*[<\"](torch|ATen|c10|pybind11|Python)\b", outside) == []


@pytest.mark.parametrize("folder", MAY_INCLUDE)
def test_dependencies_point_one_way(folder):
    for path in (p for p in (ROOT / "csrc" / folder).rglob("*") if p.is_file()):
        for included in re.findall(r'#\s*include\s*"([^"]+)"', path.read_text()):
            target = (path.parent / included).resolve()
            if target.exists():
                assert target.relative_to(ROOT / "csrc").parts[0] in MAY_INCLUDE[folder], (
                    f"{shown(path)} includes {included}"
                )


def test_python_does_not_import_upward():
    """bnext.nn -> bnext.functional -> bnext.ops -> the extension."""
    order = ["_toolchain", "_extension", "ops", "functional", "nn"]
    for i, name in enumerate(order):
        above = "|".join(order[i + 1 :])
        if above:
            pattern = rf"^\s*(from bnext\.({above})\b|from \.({above})\b|import bnext\.({above})\b|from bnext import .*\b({above})\b)"
            assert lines_that_match(pattern, [ROOT / "bnext" / f"{name}.py"]) == []


def test_cuda_kernels_are_started_in_one_place():
    cuda = [p for p in CPP if "cuda" in p.parts]
    assert lines_that_match(r"<<<", cuda) == []
    assert {shown(p) for p in cuda if "cudaLaunchKernel" in p.read_text()} <= {"csrc/cuda/device/cuda_compat.h"}


def test_a_kernel_lets_the_next_begin_only_where_it_is_ours():
    """Behind a stage on its own there may be a kernel of somebody else's that overlaps, and need not wait."""
    says_so = [p for p in CPP if re.search(r"\bstarts_next = ", p.read_text())]
    assert {shown(p) for p in says_so} == {"csrc/cuda/launch.cpp"}
    calls = lines_that_match(r"launch_dependent_grids\(\);", [p for p in CPP if p.suffix == ".cu"])
    assert len(calls) == 2 and all("if (partition.starts_next) launch_dependent_grids();" in line for line in calls)


def test_macros_are_ours():
    ours = [p for p in CPP if "csrc" in p.parts]
    assert lines_that_match(r"#\s*define\s+(?!BNEXT_)", ours) == []


def test_setup_is_data():
    text = (ROOT / "setup.py").read_text()
    assert len(text.splitlines()) < 120
    assert not re.search(r"\bprint\(|urllib|requests|socket|subprocess|git ", text)


def test_no_path_or_host_of_a_machine():
    # Assembled, so that this file does not match itself. The conventional CUDA prefix is no machine's.
    places = "|".join(
        ("/ho" + "me/", "/ro" + "ot/", "/wo" + "rk/", "/op" + "t/", "/Us" + "ers/", "/us" + r"r/local/cuda-")
    )
    assert lines_that_match(rf"(?<![\w.~>\"])({places})", TEXT) == []
    assert lines_that_match(r"https?://[\w.]*(pypi|pythonhosted|mirror|proxy|artifactory)", TEXT) == []


def test_no_unfinished_business():
    words = "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK"))
    assert lines_that_match(rf"\b({words})\b", TEXT) == []


def test_importing_compiles_and_loads_nothing():
    program = "import sys, bnext; sys.exit('bnext._C' in sys.modules or 'torch.utils.cpp_extension' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def test_python_is_clean():
    pytest.importorskip("ruff")
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
