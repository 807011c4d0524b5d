"""The rules of the house that a machine can check."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def our_files(root: Path) -> list[Path]:
    """The text files of the project: those that git knows, so that what else lies in a clone is nobody's
    matter; where git knows nothing, as in an unpacked sdist, all but what was built, installed or cached."""
    command = ["git", "-C", str(root), "ls-files", "-z"]
    try:
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        names = []
    paths = [root / name for name in names if name]
    if not paths:
        environments = [found.parent for found in root.rglob("pyvenv.cfg")]
        made = {"build", "dist", "__pycache__"}
        paths = [
            path
            for path in root.rglob("*")
            if not any(environment in path.parents for environment in environments)
            and not any(f in made or f.startswith(".") or f.endswith(".egg-info") for f in path.relative_to(root).parts)
        ]
    return sorted(path for path in paths if path.is_file() and not is_binary(path))


def is_binary(path: Path) -> bool:
    """As git tells: by a zero byte near the beginning."""
    with open(path, "rb") as file:
        return b"\0" in file.read(8000)


TEXT = our_files(ROOT)
CPP = [path for path in TEXT if path.suffix in (".h", ".cuh", ".cpp", ".cu")]
#: What a dependency may point to: bindings -> {cuda, cpu} -> core, and never cuda <-> cpu.
MAY_INCLUDE = {
    "core": {"core"},
    "cpu": {"cpu", "core"},
    "cuda": {"cuda", "cuda/planner", "cuda/device", "cuda/plans", "core"},
    "cuda/planner": {"cuda/planner", "core"},
    "cuda/device": {"cuda/device", "cuda/planner", "core"},
    "cuda/ops": {"cuda/ops", "cuda/device", "core"},
    "cuda/plans": {"cuda/plans", "cuda/ops", "cuda/device", "cuda/planner", "cuda", "core"},
}


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
    csrc = ROOT / "csrc"
    paths = [path for path in CPP if path.parent == csrc / folder]
    assert paths
    for path in paths:
        for included in re.findall(r'#\s*include\s*"([^"]+)"', path.read_text()):
            target = (path.parent / included).resolve().parent
            assert target.relative_to(csrc).as_posix() in MAY_INCLUDE[folder], f"{shown(path)} includes {included}"


def test_every_folder_of_kernels_has_its_dependencies_named():
    folders = {path.parent.relative_to(ROOT / "csrc").as_posix() for path in CPP if ROOT / "csrc" in path.parents}
    assert folders == {*MAY_INCLUDE, "bindings"}


def test_python_does_not_import_upward():
    """From the extension up to what takes whole models."""
    order = ["_toolchain", "_extension", "switch", "operators", "ops", "activation", "aten", "torch_layers", "routes"]
    order += ["transforms", "functional", "checkpointing", "nn", "sync", "conversion", "graph_values"]
    order += ["tracing", "fusion", "statistics", "explanation"]
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
    assert {shown(p) for p in says_so} == {"csrc/cuda/plans/two_pass.cpp"}
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


def test_the_doctor_imports_nothing_but_the_standard_library():
    """At its top: it has to run where torch, or what is built on it, does not import."""
    program = (
        "import sys; sys.orig_argv[1:] = ['-m', 'bnext.doctor']; import bnext.doctor; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def test_formatters_have_one_version():
    """Of `make lint` and of the hooks: each version formats a little differently."""
    pins = dict(
        re.findall(r"^([\w-]+)(?:\[\w+\])?==([\d.]+)$", (ROOT / "requirements-dev.txt").read_text(), re.MULTILINE)
    )
    hooks = re.findall(
        r"additional_dependencies: \[([\w-]+)==([\d.]+)\]", (ROOT / ".pre-commit-config.yaml").read_text()
    )
    assert {name for name, _ in hooks} == {"ruff", "clang-format"}
    assert all(pins[name] == version for name, version in hooks)


def test_everything_is_gated():
    """`make test`, which is all that CI runs, runs each checker."""
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^test:.*\blint\b", makefile, re.MULTILINE)
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)[1]
    for checker in ("ruff check .", "ruff format --check .", "clang-format --dry-run -Werror", "mypy"):
        assert f"/{checker}" in lint


@pytest.mark.parametrize("known_to_git", [True, False])
def test_what_lies_about_in_a_clone_is_not_ours(tmp_path, known_to_git):
    (tmp_path / "ours.py").write_text("")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0")
    if known_to_git:
        if shutil.which("git") is None:
            pytest.skip("needs git")
        subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
        subprocess.run(["git", "-C", str(tmp_path), "add", "."], check=True)
        (tmp_path / "notes.txt").write_text("")
    (tmp_path / "venv" / "lib").mkdir(parents=True)
    (tmp_path / "venv" / "pyvenv.cfg").write_text("")
    (tmp_path / "venv" / "lib" / "theirs.py").write_text("")
    (tmp_path / "core.1").write_bytes(b"ELF\0\xff")
    assert our_files(tmp_path) == [tmp_path / "ours.py"]
