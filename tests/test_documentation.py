"""The examples in README, docs and docstrings are executed; the commands in them exist."""

from __future__ import annotations

import ast
import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bnext
from bnext._extension import extension

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "bench" / "README.md",
    ROOT / "examples" / "README.md",
]
MODULES = sorted(f"bnext.{m.name}" for m in pkgutil.iter_modules(bnext.__path__) if m.name != "_C")
#: Their examples are of plans.
NEED_CUDA = ("kernels.md", "bnext.cuda")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """(line, text) of the fenced blocks in a language."""
    found = re.finditer(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    text = page.read_text()
    return [(text[: m.start(1)].count("\n") + 1, m[1]) for m in found]


def skip_where_it_needs_cuda(name: str) -> None:
    if name in NEED_CUDA and not extension().with_cuda:
        pytest.skip("needs a build with CUDA")


@pages
def test_python_examples_run(page):
    """Those of a page one after the other, in one namespace, as a reader would type them; with prompts, or without."""
    skip_where_it_needs_cuda(page.name)
    namespace: dict[str, object] = {}
    for line, text in blocks(page, "python"):
        if "bnext.cuda.describe_plan" in text and not extension().with_cuda:
            continue  # the tutorial's one example of plans
        if ">>> " in text:
            test = doctest.DocTestParser().get_doctest(text, namespace, page.name, str(page), line - 1)
            assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, clear_globs=False).failed == 0
            namespace |= test.globs
        else:
            exec(compile("\n" * (line - 1) + text, str(page), "exec"), namespace)


def test_readme_has_examples():
    assert len(blocks(ROOT / "README.md", "python")) >= 2


@pytest.mark.parametrize("name", ["bnext", *MODULES])
def test_docstring_examples_run(name):
    skip_where_it_needs_cuda(name)
    outcome = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert outcome.failed == 0
    assert outcome.attempted > 0 or name not in ("bnext", "bnext.nn", "bnext.ops", "bnext.functional")


@pages
def test_commands_exist(page):
    """make TARGET, python FILE, python -m MODULE, and links to files."""
    text = page.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make (?:\w+=\S+ )*([a-z-]+)", text, re.MULTILINE)) <= targets
    for file in re.findall(r"\bpython (\w[\w/]*\.py)", text):
        assert (ROOT / file).is_file(), file
    for module in re.findall(r"\bpython -m ((?:bnext|bench|examples)[\w.]*)", text):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in link:
            assert (page.parent / link).exists(), link


def long_lines(text: str, most: int = 120) -> list[int]:
    """The numbers of the lines of Markdown that are too long and could be wrapped: not those of code, formulas, tables,
    headings and pictures, nor a single word such as a link."""
    found, fence = [], ""
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        opened = re.match(r"\s*(```|\$\$)", line)
        if opened and fence in ("", opened[1]):
            fence = "" if fence else opened[1]
        elif fence or len(line) <= most or re.match(r"\s*(\||#|!\[)", line):
            continue
        elif len(words) > (2 if re.fullmatch(r"[-*+]|\d+\.", words[0]) else 1):
            found.append(number)
    return found


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_prose_is_wrapped(page):
    """At 120 characters, as code is, so that a change of a few words is a diff of a few lines."""
    assert long_lines(page.read_text()) == []


LONG = "word " * 30


@pytest.mark.parametrize(
    "text, lines",
    [
        (f"short\n{LONG}\nshort", [2]),
        (f"- {LONG}", [1]),
        (f"```\n{LONG}\n```\n{LONG}", [4]),
        (f"$$\n{LONG}\n$$\n{LONG}", [4]),
        (f"```py\n$$\n```\n{LONG}", [4]),
        (f"| {LONG} |\n# {LONG}\n![{LONG}](picture.png)", []),
        (f"- [link](https://{'a' * 120})", []),
        (f"1. see [link](https://{'a' * 120})", [1]),
    ],
)
def test_a_long_line_of_prose_is_told_from_others(text, lines):
    assert long_lines(text) == lines


@pages
def test_files_that_are_named_exist(page):
    """`csrc/core/types.h`, also where it is no link."""
    for path in re.findall(r"`((?:csrc|bnext|bench|tests|docs|examples)/[\w./-]*)`", page.read_text()):
        assert (ROOT / path).exists(), path


def python_defines(text: str, name: str) -> bool:
    """Whether the module defines that function or class, or that method: Class.method."""
    scope = ast.parse(text).body
    for part in name.split("."):
        kinds = (ast.FunctionDef, ast.ClassDef)
        found = next((node for node in scope if isinstance(node, kinds) and node.name == part), None)
        if found is None:
            return False
        scope = found.body
    return True


def cpp_defines(text: str, name: str) -> bool:
    """Whether the source defines a function, a type or a kernel of that name: calls and declarations do not count."""
    text = re.sub(r"//.*|/\*[\s\S]*?\*/", "", text)
    kind = r"^[ \t]*(?:template <.*> )?(?:struct|class|enum class) (?:alignas\(.*\) )?"
    if re.search(rf"{kind}{name}\b(?:<[^;{{]*>)?(?: final)?(?: :[^;{{]*)?\s*\{{", text, re.MULTILINE):
        return True
    # NAME(...) and a body, perhaps behind a return type or what members begin with.
    for found in re.finditer(rf"(?<![\w.>]){name}\(", text):
        before = re.split(r"[;{}]", text[: found.start()])[-1]
        if re.search(r"\?|\breturn\b", before):
            continue
        end, depth = found.end(), 1
        while depth and end < len(text):
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        if re.match(r"(?:\s|const\b|noexcept\b|override\b)*(?:->[^;{}]*|:(?!:)[^;{}]*)?\{", text[end:]):
            return True
    return False


def test_the_life_of_x_names_what_there_is():
    """CONTRIBUTING's tables of hops: | `file` | `name` | why |"""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    hops = re.findall(r"^\| `([\w/.]+)` \| `([\w.]+)` \|", text, re.MULTILINE)
    assert len(hops) > 60
    for path, name in hops:
        defines = python_defines if path.endswith(".py") else cpp_defines
        assert defines((ROOT / path).read_text(), name), f"{path} does not define {name}"


@pytest.mark.parametrize(
    "text, defined",
    [
        ("int run(int a) { return a; }", True),
        ("template <class T>\nvoid run(const T& a, int (*b)(int)) const {", True),
        ("__global__ void __launch_bounds__(k, most(1))\n    run(const Params p) {", True),
        ("template <class A>\nTask<A>::run(int a)\n    : a_(a), b_{a} {", True),
        ("auto run(int a) -> int {", True),
        ("struct alignas(2 * sizeof(A)) run {", True),
        ("class run : public Base {", True),
        ("int run(int a);", False),
        ("struct run;\nint f() {", False),
        ("int f() { run(1); each([&] { run(2); }); }", False),
        ("int f() { if (run(1)) { g(); } }", False),
        ("int f(int a) { return a ? run(1) : T{2}; }", False),
        ("template <class run>\nint f() {", False),
        ("// run(a) {\nint f() {", False),
    ],
)
def test_a_definition_is_told_from_a_mention(text, defined):
    assert cpp_defines(text, "run") == defined


def test_methods_are_told_apart():
    """A layer inherits its forward, which tables of hops once looked for where others have theirs."""
    text = (ROOT / "bnext" / "nn.py").read_text()
    assert python_defines(text, "_BatchNorm._batch_norm") and python_defines(text, "FrozenBatchNorm2d.forward")
    assert not python_defines(text, "forward") and not python_defines(text, "_BatchNorm.forward")


def test_the_equivalent_expression_is_equivalent():
    """Of README: what a fused layer computes."""
    from torch.nn import functional as F

    namespace = {"F": F, "training": True, "momentum": 0.1, "eps": 1e-5, "weight": torch.rand(3), "bias": torch.rand(3)}
    namespace |= {"x": torch.randn(2, 3, 4, 4), "residual": torch.randn(2, 3, 4, 4)}
    namespace |= {"running_mean": torch.zeros(3), "running_var": torch.ones(3)}
    ((_, expression),) = blocks(ROOT / "README.md", "py")
    layer = bnext.BatchNorm2d(3, activation="relu")
    layer.load_state_dict(layer.state_dict() | {k: namespace[k].clone() for k in ("weight", "bias")})
    exec(expression, namespace)
    torch.testing.assert_close(layer(namespace["x"], namespace["residual"]), namespace["y"])
    torch.testing.assert_close(layer.running_var, namespace["running_var"])


def pictures(tmp_path: Path, *arguments: str) -> str:
    """Draws into a folder of its own; what docs/pictures.py prints."""
    command = [sys.executable, "docs/pictures.py", str(tmp_path), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def figures(printed: str, line: str) -> dict[float, float]:
    """{0.01: 0.97, ...} of the line that begins so."""
    (found,) = [text for text in printed.splitlines() if text.startswith(line)]
    return {float(at): float(value) for at, value in re.findall(r"(\S+): (\S+)", found)}


def test_pictures_are_those_that_the_tutorial_shows():
    shown = set(re.findall(r"\]\(pictures/([^)]+)\)", (ROOT / "docs" / "tutorial.md").read_text()))
    there = {path.name for path in (ROOT / "docs" / "pictures").iterdir()}
    drawn = set(re.findall(r'^    "(\w+\.png)": \w+,$', (ROOT / "docs" / "pictures.py").read_text(), re.MULTILINE))
    assert shown == there == drawn and len(shown) <= 4
    for name in shown:
        assert (ROOT / "docs" / "pictures" / name).stat().st_size < 60_000, name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shapes.png", "layouts.png"])
def test_a_picture_is_drawn(tmp_path, name):
    pytest.importorskip("matplotlib")
    pictures(tmp_path, "--only", name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_one_pass_loses_what_the_tutorial_says(tmp_path):
    pytest.importorskip("matplotlib")
    printed = pictures(tmp_path, "--only", "cancellation.png")
    one_pass, welford, ours = (figures(printed, name) for name in ("E[x²]", "Welford", "bnext"))
    assert one_pass[1e3] > 1 and one_pass[1e4] > 100
    assert welford[1e1] < 1e-5 and 1e-5 < welford[1e4] < 1e-2
    assert max(ours.values()) < 1e-6


@pytest.mark.slow
def test_training_goes_as_the_tutorial_says(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    printed = pictures(tmp_path, "--only", "training.png")
    rates, without = (figures(printed, f"{name:15}  by rate") for name in ("with batch norm", "without"))
    assert rates[3] > 0.93 and without[0.1] > 0.93 and without[3] < 0.2 and rates[0.003] < without[0.003]
    scales, without = (figures(printed, f"{name:15}  by scale") for name in ("with batch norm", "without"))
    assert min(scales.values()) > 0.6 and [scale for scale, accuracy in without.items() if accuracy > 0.5] == [1]
