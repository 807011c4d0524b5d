"""Finding a compiler, choosing what to compile, and loading or compiling the extension."""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from compiler import PATIENCE

from bnext import _extension, _toolchain, doctor

ROOT = Path(__file__).parent.parent


# ---- the CUDA compiler


def make_toolkit(home: Path, version: str = "13.0", headers: bool = True) -> Path:
    """A folder that looks like a CUDA toolkit, with an nvcc that answers what bnext asks it."""
    (home / "bin").mkdir(parents=True)
    (home / "lib64").mkdir()
    if headers:
        (home / "include").mkdir()
        (home / "include" / "cuda_runtime.h").touch()
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        f'--version) echo "Cuda compilation tools, release {version}, V{version}.88" ;;\n'
        "--list-gpu-arch) printf 'compute_75\\ncompute_80\\ncompute_90\\ncompute_120\\n' ;;\n"
        "esac\n"
    )
    nvcc.chmod(0o755)
    return home


def find(tmp_path: Path, torch_cuda: str | None = "13.0", search: tuple[Path, ...] = (), **environ):
    """find_toolkit in a world of tmp_path alone; the conventional prefix is tmp_path/prefix."""
    environ = {name: str(value) for name, value in environ.items()}
    places = [str(folder) for folder in search]
    return _toolchain.find_toolkit(torch_cuda, environ=environ, prefix=tmp_path / "prefix", search=places)


def test_cuda_home_comes_first(tmp_path):
    home = make_toolkit(tmp_path / "home")
    on_path = make_toolkit(tmp_path / "other")
    make_toolkit(tmp_path / "prefix")
    toolkit, passed_over = find(tmp_path, CUDA_HOME=home, PATH=on_path / "bin")
    assert (toolkit.home, toolkit.origin, toolkit.version) == (home, "CUDA_HOME", "13.0")
    assert passed_over == []


def test_nvcc_on_path(tmp_path):
    on_path = make_toolkit(tmp_path / "other")
    make_toolkit(tmp_path / "prefix")
    assert find(tmp_path, PATH=on_path / "bin")[0].home == on_path


def test_a_wrapper_outside_the_toolkit_is_passed_over(tmp_path):
    """torch answers the folder above the wrapper, which holds no headers."""
    wrapper = make_toolkit(tmp_path / "local", headers=False)
    prefix = make_toolkit(tmp_path / "prefix")
    toolkit, passed_over = find(tmp_path, PATH=wrapper / "bin")
    assert toolkit.home == prefix
    assert passed_over == [f"nvcc on PATH: {wrapper} has no include/cuda_runtime.h"]


def test_a_link_into_the_toolkit_is_followed(tmp_path):
    real = make_toolkit(tmp_path / "real")
    (tmp_path / "local" / "bin").mkdir(parents=True)
    (tmp_path / "local" / "bin" / "nvcc").symlink_to(real / "bin" / "nvcc")
    assert find(tmp_path, PATH=tmp_path / "local" / "bin")[0].home == real


def test_nvidias_packages_come_last(tmp_path):
    packaged = make_toolkit(tmp_path / "site-packages" / "nvidia" / "cu13")
    search = (tmp_path / "elsewhere", tmp_path / "site-packages")
    assert find(tmp_path, search=search)[0].home == packaged
    prefix = make_toolkit(tmp_path / "prefix")
    assert find(tmp_path, search=search)[0].home == prefix


def test_a_toolkit_of_another_major_version_is_passed_over(tmp_path):
    home = make_toolkit(tmp_path / "home", version="12.8")
    prefix = make_toolkit(tmp_path / "prefix", version="13.1")
    toolkit, passed_over = find(tmp_path, torch_cuda="13.0", CUDA_HOME=home)
    assert toolkit.home == prefix
    assert passed_over == [f"CUDA_HOME: {home} is CUDA 12.8, and torch is built for CUDA 13.0"]
    assert find(tmp_path, torch_cuda=None, CUDA_HOME=home)[0].home == home


def test_a_broken_nvcc_is_passed_over(tmp_path):
    home = make_toolkit(tmp_path / "home")
    (home / "bin" / "nvcc").write_text("#!/bin/sh\nexit 3\n")
    toolkit, passed_over = find(tmp_path, CUDA_HOME=home)
    assert toolkit is None
    assert "does not run" in passed_over[0]


def test_no_compiler_at_all(tmp_path):
    toolkit, passed_over = find(tmp_path, CUDA_HOME=tmp_path / "gone")
    assert toolkit is None
    assert passed_over[0] == f"CUDA_HOME: {tmp_path / 'gone'} has no bin/nvcc"


def test_cudart_without_its_plain_name_gets_one(tmp_path):
    toolkit = find(tmp_path, CUDA_HOME=make_toolkit(tmp_path / "home"))[0]
    (toolkit.home / "lib").mkdir()
    library = toolkit.home / "lib" / "libcudart.so.13"
    library.touch()
    assert _toolchain.link_folder(toolkit, tmp_path / "made") == tmp_path / "made"
    assert (tmp_path / "made" / "libcudart.so").resolve() == library
    (toolkit.home / "lib64" / "libcudart.so").touch()
    assert _toolchain.link_folder(toolkit, tmp_path / "made") == toolkit.home / "lib64"


# ---- what to compile


@pytest.mark.parametrize(
    "known, visible, of_torch, chosen",
    [
        (
            ["7.5", "8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "11.0", "12.0", "12.1"],
            [],
            None,
            ["7.5", "8.0", "9.0", "10.0", "11.0", "12.0"],
        ),
        (["5.0", "7.5", "8.0", "9.0"], [], None, ["7.5", "8.0", "9.0"]),
        (["7.5", "8.0", "9.0", "10.0", "11.0"], [], "sm_80 sm_86 sm_90a sm_100", ["8.0", "9.0", "10.0"]),
        (["7.5", "9.0", "12.0"], [(9, 0)], "sm_75 sm_90", ["9.0"]),
        (["7.5", "9.0", "12.0"], [(12, 0), (7, 5), (12, 0)], None, ["7.5", "12.0"]),
        (["7.5", "9.0"], [(10, 3)], None, ["9.0"]),  # newer than the compiler: runs the newest's PTX
        (["9.0", "10.0", "12.0"], [(11, 0)], None, ["10.0"]),  # or that of the newest before it
        (["7.5", "9.0"], [(7, 0)], None, ["7.5", "9.0"]),  # one that this compiler no longer knows says nothing
    ],
)
def test_architectures(known, visible, of_torch, chosen):
    assert _toolchain.choose_architectures(known, visible, of_torch) == chosen


def test_architectures_of_the_compiler(tmp_path):
    toolkit = find(tmp_path, CUDA_HOME=make_toolkit(tmp_path / "home"))[0]
    assert _toolchain.known_architectures(toolkit) == ["7.5", "8.0", "9.0", "12.0"]


def test_architectures_of_a_stage_share_its_ptx():
    assert _toolchain.gencode(["8.0", "8.6", "9.0", "12.0"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=sm_86",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=sm_120",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    assert _toolchain.gencode(["8.9"]) == [
        "-gencode=arch=compute_89,code=sm_89",
        "-gencode=arch=compute_89,code=compute_89",
    ]
    assert _toolchain.gencode([]) == []


def test_stages_are_what_the_sources_tell_apart():
    told_apart = {_toolchain.STAGES[0].replace(".", "") + "0"}  # the oldest that nvcc 13 knows
    for path in [p for part in ("core", "cuda") for p in (ROOT / "csrc" / part).glob("**/*") if p.is_file()]:
        text = re.sub(r"defined\(__CUDA_ARCH__\)", "", path.read_text())
        found = re.findall(r"__CUDA_ARCH__ >= (\d+)", text)
        assert len(found) == text.count("__CUDA_ARCH__"), path
        told_apart.update(found)
    assert told_apart == {stage.replace(".", "") + "0" for stage in _toolchain.STAGES}


@pytest.mark.skipif(_toolchain.find_toolkit()[0] is None, reason="no CUDA compiler")
def test_every_generation_that_this_compiler_knows_gets_an_image():
    """What is compiled where no GPU is visible is machine code for each: the PTX is that of the newest stage."""
    known = _toolchain.known_architectures(_toolchain.find_toolkit()[0])
    built_for = _toolchain.describe("", "", TOOLKIT, _toolchain.choose_architectures(known, []))["gpus"]
    for architecture in known:
        major, minor = map(int, architecture.split("."))
        assert (_toolchain.code_for(built_for, (major, minor)) or "").startswith("machine code"), architecture
    assert _toolchain.code_for(built_for, (20, 0)) == f"PTX of {_toolchain.STAGES[-1]}"


@pytest.mark.parametrize(
    "built_for, capability, code",
    [
        ("8.0+PTX", (8, 0), "machine code of 8.0"),
        ("8.0+PTX", (8, 9), "machine code of 8.0"),
        ("8.0;8.6;9.0+PTX", (8, 9), "machine code of 8.6"),
        ("8.0/8.6/9.0+PTX", (9, 0), "machine code of 9.0"),  # as read from a file
        ("8.0+PTX", (9, 0), "PTX of 8.0"),
        ("8.0+PTX/9.0", (12, 0), "PTX of 8.0"),
        ("8.0/9.0+PTX", (12, 1), "PTX of 9.0"),
        ("8.6+PTX", (8, 0), None),
        ("9.0+PTX", (8, 9), None),
        ("8.0/9.0", (10, 0), None),
        ("9.0a+PTX", (9, 0), "machine code of 9.0a"),
        ("9.0a+PTX", (10, 0), None),
        ("10.0a", (10, 3), None),
        ("10.0f", (10, 3), "machine code of 10.0f"),
        ("Hopper", (9, 0), ""),
    ],
)
def test_which_code_a_gpu_runs(built_for, capability, code):
    assert _toolchain.code_for(built_for, capability) == code


def test_torch_cuda_arch_list_is_left_to_torch(tmp_path, monkeypatch):
    toolkit = find(tmp_path, CUDA_HOME=make_toolkit(tmp_path / "home"))[0]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    assert _toolchain.architectures_for(toolkit, [(7, 5)], None) == []
    assert not any("arch" in flag for flag in _toolchain.recipe(ROOT / "csrc", {}, toolkit, []).nvcc)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "native")
    assert _toolchain.architectures_for(toolkit, [(7, 5)], None) == ["7.5"]


def test_cuda_sources_need_a_toolkit(tmp_path):
    toolkit = find(tmp_path, CUDA_HOME=make_toolkit(tmp_path / "home"))[0]
    without, with_cuda = (_toolchain.recipe(ROOT / "csrc", {}, t, []) for t in (None, toolkit))
    cuda = {source for source in with_cuda.sources if "cuda" in source.parts}
    assert {source.suffix for source in cuda} == {".cpp", ".cu"}
    assert set(with_cuda.sources) - set(without.sources) == cuda
    assert "-DBNEXT_WITH_CUDA" in with_cuda.cxx
    assert "-DBNEXT_WITH_CUDA" not in without.cxx


def test_what_a_binary_was_built_for_can_be_read_from_it(tmp_path):
    info = {"torch": "2.14.0+cu130", "torch_cuda": "13.0", "nvcc": "13.1", "gpus": "7.5;9.0+PTX"}
    flags = [flag for flag in _toolchain.recipe(ROOT / "csrc", info, None, []).cxx if flag.startswith("-D")]
    source, binary = ROOT / "csrc" / "bindings" / "build_info.cpp", tmp_path / "build_info.o"
    subprocess.run(["c++", "-c", *flags, str(source), "-o", str(binary)], check=True)
    assert _toolchain.read_info(binary) == {**info, "gpus": "7.5/9.0+PTX"}
    assert _toolchain.read_info(Path(__file__)) == {}


# ---- which extension


@pytest.mark.parametrize(
    "built, running, cuda, fits",
    [
        ("2.14.0", "2.14.0", "13.0", True),
        ("2.14.0+cu130", "2.14.1", "13.0", True),
        ("2.14.0", "2.13.0", "13.0", False),
        ("2.14.0", "2.14.0", "12.8", False),
        ("2.14.0", "2.14.0+cpu", None, False),
        ("2.15.0.dev20260101", "2.15.0.dev20260101", "13.0", True),
        ("2.15.0.dev20260101", "2.15.0.dev20260102", "13.0", False),
    ],
)
def test_an_extension_must_match_the_running_torch(built, running, cuda, fits):
    assert _extension.matches({"torch": built, "torch_cuda": "13.0"}, running, cuda) is fits


def test_an_unmarked_extension_matches_nothing():
    assert not _extension.matches({}, torch.__version__, torch.version.cuda)


def test_bnext_build_is_checked(monkeypatch):
    monkeypatch.setenv("BNEXT_BUILD", "yes")
    with pytest.raises(ValueError, match="BNEXT_BUILD must be 'aot', 'jit' or unset, got 'yes'"):
        _extension.find()


def test_just_in_time_cache_is_per_torch_and_sources(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(_extension, "sources_folder", lambda: tmp_path / "csrc")
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    paths = []
    for text in ("int a;", "int b;"):
        (tmp_path / "csrc" / "cpu" / "a.cpp").write_text(text)
        paths.append(_extension.just_in_time("").path)
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    paths.append(_extension.just_in_time("").path)
    assert len(set(paths)) == 3
    assert "torch9.9.9" in str(paths[2])


# ---- the build itself, of a package whose extension is one small file

SMALL_MODULE = """
#include <Python.h>
static PyObject* answer(PyObject*, PyObject*) { return PyLong_FromLong(ANSWER); }
static PyMethodDef methods[] = {{"answer", answer, METH_NOARGS, ""}, {}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "", -1, methods};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
"""
LOAD = "from bnext import _extension as e; print(e.extension().answer(), e.extension().__file__)"
SMALL_LAYERS = """
from bnext._extension import extension
class BatchNorm1d:
    def __init__(self, features, device): extension().answer()
    def __call__(self, x): return x
"""


@pytest.fixture
def package(tmp_path):
    """A source tree like this one, except for what it compiles."""
    root = tmp_path / "package"
    (root / "bnext").mkdir(parents=True)
    for name in ("_extension.py", "_toolchain.py", "doctor.py", "py.typed"):
        shutil.copy(ROOT / "bnext" / name, root / "bnext")
    (root / "bnext" / "__init__.py").write_text('__version__ = "0"\n')
    (root / "bnext" / "nn.py").write_text(SMALL_LAYERS)
    for name in ("setup.py", "pyproject.toml", "requirements-dev.txt", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, root)
    (root / "csrc" / "bindings").mkdir(parents=True)
    shutil.copy(ROOT / "csrc" / "bindings" / "build_info.cpp", root / "csrc" / "bindings")
    (root / "csrc" / "bindings" / "module.cpp").write_text(SMALL_MODULE.replace("ANSWER", "42"))
    return root


def environment(package: Path, **more: str) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if k not in ("BNEXT_BUILD", "PYTHONPATH")}
    return {**inherited, "TORCH_EXTENSIONS_DIR": str(package.parent / "cache"), **more}


def python(package: Path, *arguments: str, check: bool = True, **more: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, cwd=package, env=environment(package, **more), capture_output=True, text=True, timeout=PATIENCE
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def compilations(done: subprocess.CompletedProcess) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("bnext:") and "compiling" in line]


@pytest.mark.slow
def test_pip_install_compiles_ahead_of_time(package, tmp_path):
    site = tmp_path / "site"
    pip = ("-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--no-index")
    python(package, *pip, "--target", str(site), ".")
    shutil.copytree(site, tmp_path / "installed" / "package")
    done = python(tmp_path / "installed" / "package", "-c", LOAD, BNEXT_BUILD="aot")
    answer, file = done.stdout.split()
    assert answer == "42"
    assert Path(file).parent == tmp_path / "installed" / "package" / "bnext"
    assert compilations(done) == []
    shipped = {p.name for p in (site / "bnext" / "csrc").rglob("*.cpp")}
    assert shipped == {"build_info.cpp", "module.cpp"}


@pytest.mark.slow
def test_first_use_compiles_once_and_says_so(package):
    first = python(package, "-c", LOAD)
    assert first.stdout.split()[0] == "42"
    (line,) = compilations(first)
    assert "no extension was compiled ahead of time" in line
    assert f"for torch {torch.__version__}" in line
    assert "takes two or three minutes" in line
    second = python(package, "-c", LOAD)
    assert second.stdout == first.stdout
    assert compilations(second) == []


@pytest.mark.slow
def test_importing_and_asking_the_doctor_compile_nothing(package):
    done = python(package, "-c", "import bnext, bnext._extension")
    doctor_says = python(package, "-m", "bnext.doctor")
    assert compilations(done) == compilations(doctor_says) == []
    assert "at first use" in doctor_says.stdout
    assert not (package.parent / "cache").exists()


@pytest.mark.slow
def test_an_extension_of_another_torch_is_replaced_not_loaded(package):
    python(package, "setup.py", "-q", "build_ext", "--inplace")
    (binary,) = (package / "bnext").glob("_C*.so")
    running = torch.__version__.encode()
    stale = b"0" + running[1:]
    binary.write_bytes(binary.read_bytes().replace(b"torch:" + running, b"torch:" + stale))
    done = python(package, "-c", LOAD)
    (line,) = compilations(done)
    assert f"is for torch {stale.decode()}" in line
    assert f"this is torch {torch.__version__}" in line
    assert str(package.parent / "cache") in done.stdout
    refused = python(package, "-c", LOAD, check=False, BNEXT_BUILD="aot")
    assert "BNEXT_BUILD=aot forbids compiling" in refused.stderr


@pytest.mark.slow
def test_an_extension_with_undefined_symbols_is_replaced(package):
    source = package / "csrc" / "bindings" / "module.cpp"
    good = source.read_text()
    source.write_text("long gone();" + good.replace("42", "gone()"))
    python(package, "setup.py", "-q", "build_ext", "--inplace")
    source.write_text(good)
    done = python(package, "-c", LOAD)
    assert done.stdout.split()[0] == "42"
    (line,) = compilations(done)
    assert "undefined symbol" in line


@pytest.mark.slow
def test_a_killed_compilation_does_not_block_the_next(package, tmp_path):
    """torch's own lock file outlives a killed process, and torch then waits for ever."""
    started = tmp_path / "started"
    slow = tmp_path / "slow-c++"
    hold = tmp_path / "hold"  # ninja's children are in groups of their own, and survive it
    hold.touch()
    wait = f"touch {started}; while [ -e {hold} ]; do sleep 0.1; done; exit 1"
    slow.write_text(f'#!/bin/sh\ncase "$*" in *-c*) {wait};; esac\nexec c++ "$@"\n')
    slow.chmod(0o755)
    victim = subprocess.Popen(
        [sys.executable, "-c", LOAD],
        cwd=package,
        env=environment(package, CXX=str(slow)),
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + PATIENCE
    while not started.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()
    hold.unlink()
    assert started.exists()
    (lock,) = (tmp_path / "cache").glob("bnext/*/bnext.lock")
    (lock.parent / "lock").touch()  # what torch 2.14 and older leave; later ones hold a real lock
    done = python(package, "-c", LOAD)
    assert done.stdout.split()[0] == "42"


@pytest.mark.slow
def test_processes_that_start_together_compile_once(package):
    command = [sys.executable, "-c", LOAD]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, cwd=package, env=environment(package), **pipes) for _ in range(3)]
    outputs = [process.communicate(timeout=PATIENCE) for process in processes]
    assert [out.split()[0] for out, _ in outputs] == ["42"] * 3
    assert sum(err.count(": compiling") for _, err in outputs) == 1


@pytest.mark.slow
def test_a_failing_compilation_says_why(package):
    (package / "csrc" / "bindings" / "module.cpp").write_text("#error out of order\n")
    done = python(package, "-c", LOAD, check=False)
    assert "compiling one now failed; `python -m bnext.doctor` says how to repair it" in done.stderr
    assert "out of order" in done.stderr


@pytest.mark.slow
def test_a_missing_compiler_is_named(package):
    done = python(package, "-c", LOAD, check=False, CXX="no-such-compiler")
    assert "to compile one now no-such-compiler is missing" in done.stderr
    verdict = python(package, "-m", "bnext.doctor", check=False, CXX="no-such-compiler")
    assert verdict.returncode == 1
    assert "install a C++ compiler" in verdict.stdout


@pytest.mark.parametrize("command, said", [("", "'' is not on PATH"), ("false", "`false --version` fails")])
def test_the_doctor_tries_the_compiler(monkeypatch, command, said):
    monkeypatch.setenv("CXX", command)
    problems = []
    assert doctor._cxx(problems).startswith(said)
    assert len(problems) == 1 and "CXX" in problems[0]


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is built without CUDA")
@pytest.mark.skipif(_toolchain.find_toolkit(torch.version.cuda)[0] is None, reason="no CUDA compiler")
@pytest.mark.parametrize("how", ["aot", "jit"])
def test_cuda_sources_are_compiled_where_they_can_be(package, how):
    (package / "csrc" / "cuda").mkdir()
    (package / "csrc" / "cuda" / "plan.cpp").touch()
    (package / "csrc" / "cuda" / "answer.cu").write_text(
        "__global__ void kernel(int* out) { *out = 42; }\n"
        "long answer() { return reinterpret_cast<void*>(kernel) ? 42 : 0; }\n"
    )
    (package / "csrc" / "bindings" / "module.cpp").write_text(
        "#ifdef BNEXT_WITH_CUDA\n#include <c10/cuda/CUDAGuard.h>\n#include <c10/cuda/CUDAStream.h>\n#endif\n"
        "long answer();\n"
        + SMALL_MODULE.replace("ANSWER", "answer()").replace(" answer(Py", " call(Py").replace("answer, M", "call, M")
    )
    architectures = {"TORCH_CUDA_ARCH_LIST": "9.0+PTX"}
    if how == "aot":
        python(package, "setup.py", "-q", "build_ext", "--inplace", **architectures)
    done = python(package, "-c", LOAD, BNEXT_BUILD=how, **architectures)
    answer, file = done.stdout.split()
    assert answer == "42"
    assert _toolchain.read_info(Path(file))["gpus"] == "9.0+PTX"
    assert "on the CPU and on CUDA" in python(package, "-m", "bnext.doctor", BNEXT_BUILD=how, **architectures).stdout


# ---- the real extension, from the sources that an installed package ships


@pytest.mark.slow
@pytest.mark.long
def test_an_installed_package_compiles_itself_at_first_use(tmp_path):
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("setup.py", "pyproject.toml", "requirements-dev.txt", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, tree)
    for name in ("bnext", "csrc"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    site = tmp_path / "site"
    pip = ("-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--no-index", "--target", str(site))
    python(tree, *pip, ".", BNEXT_BUILD="jit")
    assert not list(site.rglob("*.so"))
    # Whether all is there that compiles and works does not depend on -O3, which takes half of the time.
    compiler = tmp_path / "unoptimized"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0\n')
    compiler.chmod(0o755)
    program = (
        "import torch, bnext\n"
        "x = torch.randn(4, 3, 5, 5)\n"
        "torch.testing.assert_close(bnext.BatchNorm2d(3)(x), torch.nn.BatchNorm2d(3)(x))\n"
        "print(bnext.__file__)\n"
    )
    done = python(site, "-c", program, CXX=str(compiler))
    assert done.stdout.startswith(str(site))
    assert len(compilations(done)) == 1
    assert compilations(python(site, "-c", program)) == []


def test_the_sdist_has_what_its_tests_need(tmp_path):
    from test_house_rules import our_files

    tree = tmp_path / "tree"
    files = [path.relative_to(ROOT) for path in our_files(ROOT) if not path.relative_to(ROOT).parts[0].startswith(".")]
    for path in files:
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tree / path)
    python(tree, "setup.py", "-q", "sdist", "--dist-dir", str(tmp_path), BNEXT_BUILD="jit")
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        packed = {Path(*Path(name).parts[1:]) for name in archive.getnames()}
    assert not set(files) - packed


# ---- the doctor


def build(tmp_path: Path, kind: str = "aot", nvcc: str = "none", compiled: bool = False) -> _extension.Build:
    info = {"torch": "2.14.0", "nvcc": nvcc, "gpus": "8.0+PTX"}
    made = _extension.Build(kind, tmp_path / "_C.so", info, "because")
    if compiled:
        made.done.touch()
    return made


TOOLKIT = _toolchain.Toolkit(Path("/somewhere"), "CUDA_HOME", "13.0")
A100, H100, T4 = {"A100": (8, 0)}, {"H100": (9, 0)}, {"T4": (7, 5)}
JIT, DONE = {"kind": "jit"}, {"kind": "jit", "compiled": True}


@pytest.mark.parametrize(
    "kind, toolkit, torch_cuda, gpus, problems, works, says, advises",
    [
        ({"nvcc": "13.0"}, TOOLKIT, "13.0", A100, [], True, "on the CPU and on CUDA.", ""),
        ({"nvcc": "13.0"}, TOOLKIT, "13.0", {}, [], True, "no GPU is visible", ""),
        ({}, None, None, {}, [], True, "this torch is built without CUDA", ""),
        ({}, None, "13.0", A100, [], True, "no CUDA compiler was found", "set CUDA_HOME to a CUDA 13 toolkit"),
        ({}, TOOLKIT, "13.0", A100, [], True, "although a CUDA compiler is there now", "reinstall bnext"),
        ({}, None, None, {}, ["pip install ninja"], True, "runs on the CPU", ""),  # nothing to compile
        (JIT, TOOLKIT, "13.0", {}, [], True, "where a GPU is visible", "to compile for CUDA here"),
        (JIT, None, None, {}, ["pip install ninja"], False, "it cannot be compiled", "pip install ninja"),
        (DONE, None, None, {}, ["pip install ninja"], True, "runs on the CPU", ""),
    ],
)
def test_the_doctors_verdict(monkeypatch, tmp_path, kind, toolkit, torch_cuda, gpus, problems, works, says, advises):
    monkeypatch.delenv("BNEXT_BUILD", raising=False)
    monkeypatch.setattr(shutil, "which", lambda command: None)  # no nvidia-smi
    verdict = doctor.diagnose(build(tmp_path, **kind), toolkit, torch_cuda, gpus, problems)
    assert verdict.works is works
    assert says in verdict.text
    assert any(advises in remedy for remedy in verdict.remedies) if advises else verdict.remedies == []


@pytest.mark.parametrize(
    "gpus, works, says, advice",
    [
        (A100, True, "bnext runs on the CPU and on CUDA.", ""),
        (
            A100 | H100,
            True,
            "bnext runs on the CPU and on CUDA.",
            "H100 runs the PTX of 8.0, which the driver compiles",
        ),
        (A100 | T4, False, "bnext does not run on T4: it was compiled for 8.0+PTX alone.", "where that GPU is visible"),
    ],
)
def test_the_doctor_on_a_build_that_came_from_another_machine(tmp_path, gpus, works, says, advice):
    verdict = doctor.diagnose(build(tmp_path, nvcc="13.0"), TOOLKIT, "13.0", gpus, [])
    assert (verdict.works, verdict.text) == (works, says)
    assert [advice in remedy for remedy in verdict.remedies] == ([True] if advice else [])


@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_compiled_at_first_use_is_refused_where_that_is_forbidden(monkeypatch, tmp_path, capsys, compiled):
    """Also what was compiled before: where it is forbidden, another process's cache is none to rely on."""
    monkeypatch.setenv("BNEXT_BUILD", "aot")
    monkeypatch.setattr(_extension, "find", lambda: build(tmp_path, "jit", compiled=compiled))
    with pytest.raises(ImportError, match="bnext: because, and BNEXT_BUILD=aot forbids compiling one now; `python -m"):
        _extension.load()
    assert doctor.main() == 1
    verdict = "bnext does not work: ImportError: bnext: because, and BNEXT_BUILD=aot forbids compiling one now."
    assert capsys.readouterr().out.endswith(f"\n{verdict}\n  - {doctor.AHEAD_OF_TIME}\n")


@pytest.mark.parametrize("works", [True, False])
def test_the_doctors_exit_status_is_the_verdict(monkeypatch, capsys, works):
    monkeypatch.setattr(doctor, "examine", lambda report: doctor.Verdict(works, "so it is", ["do this"]))
    assert doctor.main() == (0 if works else 1)
    assert capsys.readouterr().out.endswith("\nso it is\n  - do this\n")


def test_a_doctor_that_fails_still_reports(monkeypatch, capsys):
    def fail(problems):
        raise OSError("out of order")

    monkeypatch.setattr(doctor, "_cxx", fail)
    assert doctor.main() == 1
    said = capsys.readouterr().out
    assert torch.__version__ in said and "a bug of bnext: OSError: out of order" in said


@pytest.mark.parametrize(
    "missing, remedy", [("ninja", "pip install ninja"), ("c++", "install a C++ compiler"), (None, None)]
)
def test_the_doctor_misses_what_a_compilation_needs(monkeypatch, missing, remedy):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(_toolchain, "put_ninja_on_path", lambda: None)
    monkeypatch.setattr(shutil, "which", lambda command: None if command == missing else sys.executable)
    monkeypatch.setattr(doctor.subprocess, "run", lambda *args, **how: subprocess.CompletedProcess(args, 0, "", ""))
    problems = []
    lines = [doctor._cxx(problems), doctor._ninja(problems)]
    assert [line for line in lines if "not on PATH" in line] == lines[:1] * (missing == "c++") + lines[1:] * (
        missing == "ninja"
    )
    assert [problem.startswith(remedy) for problem in problems] == [True] * (missing is not None)


def test_the_doctor_on_this_machine(capsys):
    assert doctor.main() == 0
    said = capsys.readouterr().out
    assert torch.__version__ in said
    assert "bnext runs on the CPU" in said


def test_the_doctor_runs_where_torch_does_not_import(package):
    """Not there at all, or there and broken, as with a library that is missing."""
    (package / "torch.py").write_text("raise OSError('libcublas.so.13: cannot open shared object file')\n")
    done = python(package, "-m", "bnext.doctor", check=False)
    assert (done.returncode, done.stderr) == (1, "")
    assert "does not import: OSError: libcublas.so.13" in done.stdout
    assert "bnext does not work: torch does not import." in done.stdout
    (package / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")\n")
    done = python(package, "-m", "bnext.doctor", check=False)
    assert done.returncode == 1
    assert f"{sys.executable} -m pip install torch" in done.stdout


@pytest.fixture
def package_without_torch(tmp_path):
    """A folder with the real package in it, where torch does not import."""
    shutil.copytree(ROOT / "bnext", tmp_path / "bnext", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "torch.py").write_text("raise ImportError('no such luck')\n")
    return tmp_path


@pytest.mark.parametrize(
    "arguments",
    [
        "-m bnext.doctor",
        "-m bnext.doctor and more",
        "-mbnext.doctor",
        "-u -m bnext.doctor",
        "-B -s -m bnext.doctor -m pytest",
        "-X dev -W ignore -m bnext.doctor",
        "-Bum bnext.doctor",
        "-Bumbnext.doctor",
    ],
)
def test_the_doctor_runs_on_the_real_package_where_torch_does_not_import(package_without_torch, arguments):
    """However Python is told to run it."""
    done = python(package_without_torch, *arguments.split(), check=False)
    assert (done.returncode, done.stderr) == (1, "")
    assert "no such luck" in done.stdout
    assert "bnext does not work: torch does not import." in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("-c", "import bnext"),
        ("-c", "import bnext.doctor"),
        ("-c", "import bnext", "-m", "bnext.doctor"),
        ("-m", "bnext.nn"),
        ("-m", "bnext.nn", "-m", "bnext.doctor"),
    ],
)
def test_the_package_is_whole_wherever_the_doctor_is_not_what_runs(package_without_torch, arguments):
    """It then fails with torch, instead of going without half of its names."""
    done = python(package_without_torch, *arguments, check=False)
    assert done.returncode == 1
    assert done.stderr.endswith("ImportError: no such luck\n")


def test_the_doctor_runs_where_the_package_does_not_import(package):
    (package / "bnext" / "nn.py").write_text("import torch.gone\n")
    done = python(package, "-m", "bnext.doctor", check=False)
    assert (done.returncode, done.stderr) == (1, "")
    assert "No module named 'torch.gone'" in done.stdout
    assert f"it does not import with torch {torch.__version__}" in done.stdout


def test_the_doctor_refuses_a_wrong_bnext_build(package):
    done = python(package, "-m", "bnext.doctor", check=False, BNEXT_BUILD="maybe")
    assert done.returncode == 1
    assert "BNEXT_BUILD must be 'aot', 'jit' or unset, got 'maybe'" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "cache, says",
    [
        ("{}/file", "{}/file is not a folder"),
        ("{}/link", "{}/link is not a folder"),
        # As root, whom no permission stops: "no file can be written in". Anybody else: "/proc is not writable".
        ("/proc/nowhere", "/proc"),
    ],
)
def test_a_cache_that_cannot_be_written_is_said_and_refused(package, tmp_path, cache, says):
    """Users of any rights cannot make a folder below a file, behind a link to nothing, or in /proc."""
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    cache, says = cache.format(tmp_path), says.format(tmp_path)
    done = python(package, "-m", "bnext.doctor", check=False, TORCH_EXTENSIONS_DIR=cache)
    assert done.returncode == 1
    assert re.search(rf"^  cache .*{says}", done.stdout, re.MULTILINE)
    assert "bnext does not work: there is nothing to load, and it cannot be compiled." in done.stdout
    assert "set TORCH_EXTENSIONS_DIR to a folder that you can write to" in done.stdout
    refused = python(package, "-c", LOAD, check=False, TORCH_EXTENSIONS_DIR=cache)
    error = "ImportError: bnext: no extension was compiled ahead of time, and one cannot be compiled into "
    assert error + cache in refused.stderr
    assert says in refused.stderr.partition(error + cache)[2]
    assert refused.stderr.rstrip().endswith("set TORCH_EXTENSIONS_DIR to a folder of yours")


@pytest.mark.parametrize("call", ["mkdir", "open"])
@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC, errno.EACCES])
def test_whether_a_cache_can_be_written_is_tried_not_asked(monkeypatch, tmp_path, call, code):
    """Folders and files both; and whatever comes of it, nothing is left behind."""
    folder = tmp_path / "not" / "yet"
    assert _extension.unwritable(folder) is None
    assert _extension.unwritable(tmp_path) is None
    assert list(tmp_path.iterdir()) == []

    def refuse(path, *args, **kwargs):
        raise OSError(code, os.strerror(code), str(path))

    with monkeypatch.context() as patched:
        if call == "mkdir":
            patched.setattr(os, "mkdir", refuse)
        else:
            patched.setattr(Path, "write_bytes", refuse)
        reason = _extension.unwritable(folder)
    if code == errno.EACCES:
        assert reason == f"{tmp_path} is not writable for this user"
    else:
        assert reason == f"no file can be written in {tmp_path}: {os.strerror(code)}"
    assert list(tmp_path.iterdir()) == []


def test_a_cache_of_somebody_else_is_refused_with_a_name(monkeypatch, tmp_path):
    """As when root compiled first: the folders are there, and files in them cannot be made."""

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    theirs = os.stat_result((0o040755, 0, 0, 1, os.getuid() + 1, 0, 0, 0, 0, 0))
    monkeypatch.setattr(_extension, "open", denied, raising=False)
    monkeypatch.setattr(os, "mkdir", denied)
    assert _extension.unwritable(tmp_path) == f"{tmp_path} is not writable for this user"
    monkeypatch.setattr(Path, "owner", lambda self: "somebody")
    stat = Path.stat
    monkeypatch.setattr(Path, "stat", lambda self, **kw: theirs if self == tmp_path else stat(self, **kw))
    with pytest.raises(
        ImportError, match=f"{tmp_path} is not writable for this user, and belongs to somebody; set TORCH_"
    ):
        _extension._compiled(build(tmp_path, "jit"))


@pytest.mark.slow
def test_the_doctor_tries_the_first_layer(package):
    python(package, "setup.py", "-q", "build_ext", "--inplace")
    done = python(package, "-m", "bnext.doctor")
    assert "layer on cpu" in done.stdout and "runs" in done.stdout
    (package / "bnext" / "nn.py").write_text(SMALL_LAYERS.replace("return x", "raise RuntimeError('out of order')"))
    done = python(package, "-m", "bnext.doctor", check=False)
    assert done.returncode == 1
    assert "a layer on cpu fails: RuntimeError: out of order." in done.stdout


def test_the_doctor_says_which_bnext_it_is_about(package, tmp_path):
    site = tmp_path / "site"
    (site / "bnext" / "csrc").mkdir(parents=True)
    for path in (package / "bnext").glob("*.py"):
        shutil.copy(path, site / "bnext")
    inside = python(package, "-m", "bnext.doctor", PYTHONPATH=str(site)).stdout
    assert f"the sources of a clone in {package / 'bnext'}" in inside
    assert "because" in inside and "python -m looks into the working directory first" in inside
    assert f"an installed package in {site / 'bnext'}; to ask about it, run this in another folder" in inside
    outside = python(tmp_path, "-m", "bnext.doctor", PYTHONPATH=str(site)).stdout
    assert f"an installed package in {site / 'bnext'}" in outside
    assert "hidden" not in outside and "working directory" not in outside


def test_a_compilation_shows_progress(tmp_path, capsys):
    (tmp_path / "one.o").touch()
    with _extension._progress(tmp_path, 3, seconds=0.01):
        time.sleep(0.2)
    assert capsys.readouterr().err.splitlines()[0] == "bnext: 1 of 3 files are compiled"


def test_setup_loads_the_toolchain_without_the_package():
    """setup.py runs before there is a package to import."""
    spec = importlib.util.spec_from_file_location("bnext_toolchain_alone", ROOT / "bnext" / "_toolchain.py")
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.ARCHITECTURES == _toolchain.ARCHITECTURES


def test_setup_asks_for_a_newer_setuptools(package, tmp_path):
    """Without build isolation, pip takes the one that is there."""
    older = tmp_path / "older" / "setuptools"
    older.mkdir(parents=True)
    (older / "__init__.py").write_text('__version__ = "65.5.0"\n')
    done = python(package, "setup.py", "--version", check=False, PYTHONPATH=str(older.parent))
    needed = re.search(r'requires = \["setuptools>=(\d+)"', (package / "pyproject.toml").read_text())[1]
    assert done.returncode == 1
    assert done.stderr == (
        f"bnext needs setuptools {needed} or later to be built, and there is 65.5.0: "
        f"{sys.executable} -m pip install --upgrade 'setuptools>={needed}'\n"
    )
