"""What a torch.fx graph tells of its values: which of them may share memory, which nodes may write into it, and which
may be numbers. Where it does not tell, the answer is that they may."""

from __future__ import annotations

import builtins
import math
import operator
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from bnext.conversion import is_watched

__all__ = ["Memory", "may_be_number"]

#: Whose functions write into an operand only where their names or arguments say so.
_LIBRARIES = (torch, F, operator, math, builtins)

#: Functions and methods that return new memory.
_FRESH = re.compile(
    r"add|sub|mul|div|truediv|neg|matmul|cat|stack|clone|mean|sum|relu6?|leaky_relu|silu|gelu|elu|hardswish|hardsigmoid|"
    r"sigmoid|tanh|softmax|linear|conv(_transpose)?[123]d|(batch|layer|group)_norm|(adaptive_)?(avg|max)_pool[123]d"
)
#: The modules whose layers do, all but nn.Identity.
_FRESH_LAYERS = {
    *(f"torch.nn.modules.{name}" for name in ("activation", "batchnorm", "conv", "instancenorm", "linear")),
    *(f"torch.nn.modules.{name}" for name in ("normalization", "pooling")),
    *(f"bnext.{name}" for name in ("nn", "sync", "torch_layers")),
}

#: Where memory comes from that the graph does not allocate: arguments, parameters and buffers, any of which may be a
#: view of another, and what functions return that nothing is known of.
_OUTSIDE = object()

#: Methods, attributes and functions of tensors that give no tensor.
_NUMBERS = {
    *("size", "shape", "dim", "ndim", "ndimension", "numel", "nelement", "stride", "storage_offset", "item", "tolist"),
    *("element_size", "itemsize", "nbytes", "get_device", "data_ptr", "requires_grad", "dtype", "device", "layout"),
    *(name for library in (torch, torch.Tensor) for name in dir(library) if name.startswith("is_")),
}
_NUMBER_TYPE = re.compile(r"\b(bool|int|float|complex|Number)\b")


class Memory:
    """Which values of a graph may share memory: those that may have a common origin."""

    def __init__(self, graph: fx.Graph, modules: Mapping[Any, nn.Module]) -> None:
        self._modules = modules
        self._origins: dict[fx.Node, frozenset[object]] = {}
        for node in graph.nodes:
            self._origins[node] = self._origins_of(node)

    def may_write(self, node: fx.Node, value: fx.Node) -> bool:
        """Whether `node` may change what is in the memory of `value`."""
        written = node.all_input_nodes if self._writes(node) else []
        return any(self._origins[operand] & self._origins[value] for operand in written)

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """`new`, which was not in the graph yet, takes the place of `old`."""
        self._origins[new] = self._origins[old]

    def _origins_of(self, node: fx.Node) -> frozenset[object]:
        if self._is_fresh(node):
            return frozenset({node})
        own = node if self._is_known(node) else _OUTSIDE
        return frozenset({own}).union(*(self._origins[operand] for operand in node.all_input_nodes))

    def _is_fresh(self, node: fx.Node) -> bool:
        if not self._is_known(node) or self._writes(node):
            return False
        if node.op == "call_module":
            module = self._modules[node.target]
            return type(module).__module__ in _FRESH_LAYERS and not isinstance(module, nn.Identity)
        if node.target in (operator.add, operator.mul):  # of two tuples, too, whose elements stay what they are
            return any(self._origins[operand] == {operand} for operand in node.all_input_nodes)
        return _FRESH.fullmatch(_name(node)) is not None

    def _writes(self, node: fx.Node) -> bool:
        if not self._is_known(node):
            return True
        if node.op == "call_module":
            return any(getattr(module, "inplace", False) for module in self._modules[node.target].modules())
        name = _name(node)
        by_keyword = node.kwargs.get("inplace") or node.kwargs.get("out") is not None
        in_place = node.target is getattr(operator, name, None) and name.startswith(("i", "setitem"))
        return bool(name.endswith("_") or in_place or by_keyword)

    def _is_known(self, node: fx.Node) -> bool:
        """A call of something whose name and arguments say whether it writes into an operand."""
        if node.op == "call_module":
            module = self._modules.get(node.target)
            return module is not None and all(map(_is_plain, module.modules()))
        if node.op == "call_function":
            return any(getattr(library, _name(node), None) is node.target for library in _LIBRARIES)
        return _is_method_of_tensors(node)


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _is_method_of_tensors(node: fx.Node) -> bool:
    return node.op == "call_method" and hasattr(torch.Tensor, _name(node))


def _is_plain(module: nn.Module) -> bool:
    """A layer of torch.nn's or ours, with nothing of the user's in it."""
    ours = type(module).__module__.startswith(("torch.nn.", "bnext."))
    return ours and "forward" not in vars(module) and not is_watched(module, arguments=True)


def may_be_number(value: Any) -> bool:
    """Whether an operand of a sum may be something else than a tensor."""
    if not isinstance(value, fx.Node):
        return True
    if any(_takes_tensor(user, value) for user in value.users):
        return False
    if value.op == "placeholder":
        return not _is_declared_tensor(value)
    if value.op == "call_method":
        return not _is_method_of_tensors(value) or value.target in _NUMBERS
    if value.op != "call_function":  # layers return tensors
        return False
    if value.target is getattr:
        return value.args[1] in _NUMBERS or may_be_number(value.args[0])
    library = str(getattr(value.target, "__module__", "")).split(".")[0]
    if library == "_operator":
        return all(map(may_be_number, value.args))
    return library != "torch" or _name(value) in _NUMBERS


def _takes_tensor(user: fx.Node, value: fx.Node) -> bool:
    """Whether `user` does with `value` what only a tensor is for."""
    by_function = user.op == "call_function" and user.target is getattr(F, _name(user), None)
    return user.args[:1] == (value,) and (user.op == "call_module" or by_function or _is_method_of_tensors(user))


def _is_declared_tensor(argument: fx.Node) -> bool:
    annotation = str(argument.type)
    return "Tensor" in annotation and not _NUMBER_TYPE.search(annotation) and argument.args in ((), (None,))
