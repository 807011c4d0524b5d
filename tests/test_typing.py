"""The types: that checkers find mistakes with them, and that stubs say what is there."""

from __future__ import annotations

import ast
import inspect
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bnext
from bnext._extension import extension

ROOT = Path(__file__).parent.parent
RIGHT, WRONG = ROOT / "tests" / "typing" / "right.py", ROOT / "tests" / "typing" / "wrong.py"


def lines_rejected(checker: str, path: Path) -> set[int]:
    pytest.importorskip(checker)
    options = {"mypy": ["--no-error-summary"], "pyright": ["--pythonpath", sys.executable]}[checker]
    command = [sys.executable, "-m", checker, *options, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = re.findall(r"(\w+\.py):(\d+):(?:\d+ -)? error:", done.stdout)
    assert {name for name, _ in found} <= {path.name}, done.stdout
    assert bool(found) == (done.returncode == 1), done.stdout
    return {int(line) for _, line in found}


@pytest.mark.slow
@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_wrong_calls_are_rejected_and_right_ones_are_not(checker):
    marked = {i for i, line in enumerate(WRONG.read_text().splitlines(), start=1) if "  # wrong" in line}
    assert len(marked) >= 5
    assert lines_rejected(checker, WRONG) == marked
    assert lines_rejected(checker, RIGHT) == set()


def test_right_calls_run():
    assert torch.equal(runpy.run_path(str(RIGHT))["none"].weight, torch.ones(3))


# ---- the stubs


def stub(name: str) -> dict[str, ast.FunctionDef]:
    """The functions of a stub, and the methods of the protocol in it."""
    tree = ast.parse((ROOT / "bnext" / name).read_text())
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def schemas() -> dict[str, torch.FunctionSchema]:
    extension()
    found = {s.name: s for s in torch._C._jit_get_all_schemas() if s.name.startswith("bnext::")}
    return {name.removeprefix("bnext::"): schema for name, schema in found.items()}


PYTHON_OF = {"bool[4]": "Sequence[bool]", "List[bool]": "Sequence[bool]", "number": "float", "SymInt": "int"}


def as_python(kind: object) -> str:
    """Optional[Tensor] -> Tensor | None"""
    text = PYTHON_OF.get(str(kind), str(kind))
    optional = re.fullmatch(r"Optional\[(.*)\]", text)
    return f"{optional[1]} | None" if optional else text


def test_ops_pyi_has_the_operators_schemas():
    declared = stub("ops.pyi")
    assert set(declared) == set(schemas()) == set(bnext.ops.OPERATORS)
    for name, schema in schemas().items():
        arguments = declared[name].args
        assert [a.arg for a in arguments.args] == [a.name for a in schema.arguments], name
        assert [ast.unparse(a.annotation) for a in arguments.args] == [as_python(a.type) for a in schema.arguments], (
            name
        )
        defaults = [ast.literal_eval(d) for d in arguments.defaults]
        assert defaults == [a.default_value for a in schema.arguments if a.has_default_value()], name
        tensors = ["Tensor"] * len(schema.returns)
        returned = tensors[0] if len(tensors) == 1 else f"tuple[{', '.join(tensors)}]"
        assert ast.unparse(declared[name].returns) == returned, name


def test_ops_tells_what_there_is():
    assert dir(bnext.ops) == sorted(bnext.ops.OPERATORS)
    for name in bnext.ops.OPERATORS:
        assert re.search(rf"^- `{name}\(", inspect.getdoc(bnext.ops), re.MULTILINE), f"{name} is not documented"
        assert getattr(bnext.ops, name) is getattr(torch.ops.bnext, name)
    with pytest.raises(
        AttributeError, match="'bnext.ops' has no attribute 'statistics'; there are batch_norm, batch_norm_backward, "
    ):
        _ = bnext.ops.statistics


def test_c_pyi_has_what_the_extension_has():
    there = {name for name in dir(extension()) if not name.startswith("_")} - {"with_cuda", "activations"}
    declared = stub("_C.pyi")
    everywhere = {"batch_norm", "batch_norm_if_possible", "obstacle", "check_training", "set_enabled", "kernels_run"}
    assert there == set(declared) if extension().with_cuda else there == everywhere <= set(declared)
    for name in there:  # pybind writes the signature into the first line
        written = inspect.getdoc(getattr(extension(), name)).splitlines()[0]
        positional = [arg for arg in declared[name].args.posonlyargs if arg.arg != "self"]
        assert len(re.findall(r"\barg\d+:", written)) == len(positional), written


def test_help_on_a_layers_forward_is_ours():
    for layer in (bnext.BatchNorm1d, bnext.BatchNorm2d, bnext.BatchNorm3d):
        assert "activation(bn(input) + residual)" in inspect.getdoc(layer.forward)
        assert "residual: Tensor | None" in str(inspect.signature(layer.forward)).replace("'", "")
