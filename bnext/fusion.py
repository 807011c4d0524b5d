"""Finds batch norms that are followed by an activation, or by a sum and an activation, and fuses them."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from functools import reduce
from typing import Any

import torch
from torch import fx, nn

from bnext import nn as layers
from bnext.activation import ActivationName, fusible, fusible_call
from bnext.conversion import convert, is_watched
from bnext.graph_values import Memory, may_be_number
from bnext.recomputation import is_recomputed, recompute
from bnext.tracing import trace

__all__ = ["fuse"]

_SUMS_IN_PLACE = (operator.iadd, "add_")
_SUMS = (operator.add, torch.add, "add", *_SUMS_IN_PLACE)


def fuse(model: nn.Module, *, tracer: fx.Tracer | None = None) -> fx.GraphModule:
    """Fuses BN -> activation and BN -> sum -> activation: a kernel each, where there were two or three passes.

    >>> import torch, bnext
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
    >>> bnext.fuse(model).get_submodule("1").activation
    'relu'

    Traces `model` by torch.fx, which has to be possible: control flow must not depend on data. Finds activations that
    are modules, functions or methods, in place or not, and sums with either operand first; a result between that
    something else uses too, or a hook sees, is left alone. The fused call stands where the activation stood, so a batch
    norm is left alone, too, where something between them may write into what the call reads, or where the graph uses
    the layer's parameters or statistics elsewhere. A residual has to be a tensor, as far as the graph tells: an
    argument of `forward` is one where it is annotated as such, or where a layer takes it.

    Parameters, buffers, their names in state dicts and their order stay those of `model`, which is changed as well: its
    batch norms become bnext's, and those that are fused carry the activation. What `forward` does not use is kept, and
    so is `bnext.recompute` of `model`.

    Every module keeps its mode, and follows `train` and `eval`. A graph has no mode: a module that computes otherwise
    in evaluation is a call in it, as a layer of torch.nn is, and so is one with hooks, and a batch norm of a class that
    `convert` leaves alone. Nothing inside a call is fused.

    Args:
        model: any module that torch.fx can trace, in both modes.
        tracer: of your own, where other modules must be calls than batch norms and the layers of torch.nn, which it
            should take for leaves, too.

    Returns:
        A GraphModule in place of `model`: its forward, with no other method of its class.

    Raises:
        ValueError: `model`, or a module of it that holds batch norms, computes otherwise in evaluation, as by
            `F.dropout(x, training=self.training)`, or has what a graph would drop: hooks, or a class's own `train`,
            `state_dict` or `get_extra_state`. Nothing has changed then.
        torch.fx.proxy.TraceError: and what else tracing raises, likewise.
    """
    graph = trace(model, tracer)
    convert(model)
    fuser = _Fuser(graph, model)
    for node in list(graph.nodes):
        fuser.fuse_before(node)
    fused = fx.GraphModule(model, graph, type(model).__name__)
    _complete(fused, model, fuser.absorbed_modules())
    if is_recomputed(model):
        recompute(fused)
    fuser.set_activations()
    return fused


def _complete(fused: fx.GraphModule, model: nn.Module, absorbed: set[nn.Module]) -> None:
    """Gives `fused` what else `model` has, under all its names. torch.fx takes what the graph names, makes new modules
    of those that only hold it, and buffers of all tensors."""
    pairs = ((model.get_submodule(path), new) for path, new in fused.named_modules())
    made: dict[Any, nn.Module] = {old: new for old, new in pairs if new is not old}
    for old, new in made.items():
        new.training = old.training
        new._parameters, new._buffers = dict(old._parameters), dict(old._buffers)
        new._non_persistent_buffers_set = set(old._non_persistent_buffers_set)
        new._modules = {name: made.get(m, m) for name, m in old._modules.items() if m not in absorbed}
    for node in fused.graph.nodes:
        path, _, name = str(node.target).rpartition(".")
        if node.op == "get_attr" and not hasattr(fused.get_submodule(path), name):  # a tensor, but no state of `model`
            tensor = getattr(model.get_submodule(path), name)
            fused.get_submodule(path).register_buffer(name, tensor, persistent=False)


class _Fuser:
    """The graph of a model whose batch norms are bnext's."""

    def __init__(self, graph: fx.Graph, model: nn.Module) -> None:
        self.graph = graph
        self.modules: dict[Any, Any] = dict(model.named_modules(remove_duplicate=False))
        self.memory = Memory(graph, self.modules)
        self.uses = Counter(id(part) for node in graph.nodes for part in self._parts_used_by(node, model))
        self.activations: dict[Any, tuple[ActivationName, float | None]] = {}
        self._absorbed: list[Any] = []

    def set_activations(self) -> None:
        """Changes the layers. This comes last, so that the model computes the same if something else fails."""
        for layer, found in self.activations.items():
            layer._set_activation(*found)

    def absorbed_modules(self) -> set[nn.Module]:
        """Activations that are parts of batch norms now, and that nothing calls any more."""
        called = {self.modules.get(node.target) for node in self.graph.nodes if node.op == "call_module"}
        return {self.modules[target] for target in self._absorbed} - called

    def fuse_before(self, node: fx.Node) -> None:
        """Fuses what comes before `node`, if that is an activation, where it can be."""
        found = self._activation_of(node)
        before: Any = node.args[0] if node.args else None
        if found is None or not isinstance(before, fx.Node) or len(before.users) > 1:
            return
        pairs = _operands_of_sum(before) or [(before, None)]
        # Where two batch norms meet, either may take the sum in: it runs where the activation was.
        free = [
            (norm, residual)
            for norm, residual in pairs
            if self._is_free_batch_norm(norm, residual) and self._can_be_read_at(node, norm, before, residual)
        ]
        if not free:
            return
        norm, residual = free[-1]
        with self.graph.inserting_before(node):
            args = norm.args if residual is None else (*norm.args, residual)
            fused = self.graph.call_module(str(norm.target), args)
        fused.meta = dict(node.meta)
        self.memory.replace(node, fused)
        if node.op == "call_module":
            self._absorbed.append(node.target)
        node.replace_all_uses_with(fused)
        for old in dict.fromkeys((node, before, norm)):
            self.graph.erase_node(old)
        self.activations[self.modules[norm.target]] = found

    def _activation_of(self, node: fx.Node) -> tuple[ActivationName, float | None] | None:
        if node.op == "call_module":
            module = self.modules.get(node.target)
            found = None if module is None or isinstance(module, layers._BatchNorm) else fusible(module)
        elif node.op in ("call_function", "call_method"):
            found = fusible_call(node.target, node.args[1:], node.kwargs)
        else:
            return None
        return None if found is None or found[0] is None else (found[0], found[1])

    def _is_free_batch_norm(self, node: fx.Node, residual: fx.Node | None) -> bool:
        """A call of one of our layers that has no activation yet, and whose result nothing else sees: no other node,
        and no hook. With a residual, no hook that sees the arguments either. Nothing else uses the layer, its
        parameters or its statistics."""
        if node.op != "call_module" or len(node.users) > 1 or len(node.args) != 1 or node.kwargs:
            return False
        layer: Any = self.modules.get(node.target)
        plain = type(layer) in (layers.BatchNorm1d, layers.BatchNorm2d, layers.BatchNorm3d)
        if not plain or "forward" in vars(layer) or layer.activation is not None or layer in self.activations:
            return False
        if is_watched(layer, arguments=residual is not None):
            return False
        return all(self.uses[id(part)] == 1 for part in (layer, *layer.parameters(), *layer.buffers()))

    def _can_be_read_at(self, node: fx.Node, norm: fx.Node, before: fx.Node, residual: fx.Node | None) -> bool:
        """Whether the input of `norm`, and the residual that `before` adds, are still the same where `node` stands."""
        reads = [(norm, norm.args[0]), (before, residual)]
        return not any(
            self.memory.may_write(other, value)
            for start, value in reads
            if isinstance(value, fx.Node)
            for other in _between(start, node)
            if other is not before
        )

    def _parts_used_by(self, node: fx.Node, model: nn.Module) -> list[object]:
        """Modules, parameters and buffers."""
        if node.op == "get_attr":
            return [reduce(getattr, str(node.target).split("."), model)]
        if node.op != "call_module":
            return []
        module = self.modules[node.target]
        return [*module.modules(), *module.parameters(), *module.buffers()]


def _between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    node = first.next
    while node is not last:
        yield node
        node = node.next


def _operands_of_sum(node: fx.Node) -> list[tuple[fx.Node, fx.Node | None]]:
    """What a batch norm's result may be in a sum, and what is added to it: another tensor. A sum in place
    changes its first operand, which somebody else may see, unless that is the batch norm's result."""
    if node.op not in ("call_function", "call_method") or node.target not in _SUMS or node.kwargs:
        return []
    operands = [a for a in node.args if isinstance(a, fx.Node)]
    if len(node.args) != 2 or len(set(operands)) != 2:
        return []
    first, second = operands
    pairs = [(first, second)] if node.target in _SUMS_IN_PLACE else [(first, second), (second, first)]
    return [(norm, residual) for norm, residual in pairs if not may_be_number(residual)]
