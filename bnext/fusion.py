"""Finds batch norms that are followed by an activation, or by a sum and an activation, and fuses them."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from bnext import nn as layers
from bnext.activation import ActivationName, fusible, fusible_call
from bnext.conversion import convert

__all__ = ["fuse"]

_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")


def fuse(model: nn.Module, *, tracer: fx.Tracer | None = None) -> fx.GraphModule:
    """Fuses BN -> activation and BN -> sum -> activation: a kernel each, where there were two or three passes.

    >>> import torch, bnext
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
    >>> bnext.fuse(model).get_submodule("1").activation
    'relu'

    Traces `model` by torch.fx, which has to be possible: control flow must not depend on data. Finds activations that
    are modules, functions or methods, in place or not, and sums with either operand first; a result between that
    something else uses too is left alone. Parameters, buffers and their names in state dicts stay those of `model`,
    which is changed as well: its batch norms become bnext's, and those that are fused carry the activation.

    Args:
        model: any module that torch.fx can trace.
        tracer: of your own, where some modules must be leaves.

    Returns:
        A GraphModule in place of `model`.

    Raises:
        torch.fx.proxy.TraceError: and what else tracing raises.
    """
    tracer = fx.Tracer() if tracer is None else tracer
    graph = tracer.trace(model)
    convert(model)
    modules: dict[Any, Any] = dict(model.named_modules())
    calls: dict[Any, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls[node.target] = calls.get(node.target, 0) + 1
    for node in list(graph.nodes):
        found = _activation_of(node, modules)
        if found is not None and node.args and isinstance(node.args[0], fx.Node):
            _fuse_at(graph, node, *found, modules, calls)
    fused = fx.GraphModule(model, graph, type(model).__name__)
    fused.train(model.training)
    return fused


def _fuse_at(
    graph: fx.Graph,
    node: fx.Node,
    name: ActivationName,
    param: float | None,
    modules: dict[Any, Any],
    calls: dict[Any, int],
) -> None:
    """Fuses what comes before the activation at `node`, where it can be."""
    before: Any = node.args[0]
    if len(before.users) > 1:
        return
    operands: tuple[Any, Any] = (before, None)
    if _is_sum(before):
        first, second = before.args
        # Of two batch norms the later one takes the sum in: the other's result is there by then.
        order = {n: i for i, n in enumerate(graph.nodes)}
        candidates = [
            pair for pair in ((first, second), (second, first)) if _is_free_batch_norm(pair[0], modules, calls)
        ]
        if not candidates:
            return
        operands = max(candidates, key=lambda pair: order[pair[0]])
    norm, residual = operands
    if not _is_free_batch_norm(norm, modules, calls):
        return
    layer = modules[norm.target]
    layer._set_activation(name, param)
    with graph.inserting_before(node):
        args = norm.args if residual is None else (*norm.args, residual)
        fused = graph.call_module(norm.target, args)
    fused.meta = dict(node.meta)
    node.replace_all_uses_with(fused)
    for old in dict.fromkeys((node, before, norm)):
        graph.erase_node(old)


def _activation_of(node: fx.Node, modules: dict[Any, Any]) -> tuple[ActivationName, float | None] | None:
    if node.op == "call_module":
        module = modules.get(node.target)
        found = None if module is None or isinstance(module, layers._BatchNorm) else fusible(module)
    elif node.op in ("call_function", "call_method"):
        found = fusible_call(node.target, node.args[1:], node.kwargs)
    else:
        return None
    return None if found is None or found[0] is None else (found[0], found[1])


def _is_sum(node: fx.Node) -> bool:
    return (
        node.op in ("call_function", "call_method")
        and node.target in _SUMS
        and len(node.args) == 2
        and not node.kwargs
        and all(isinstance(a, fx.Node) for a in node.args)
    )


def _is_free_batch_norm(node: Any, modules: dict[Any, Any], calls: dict[Any, int]) -> bool:
    """A call of one of our layers that has no activation yet, runs once, and whose result nothing else uses."""
    if not (isinstance(node, fx.Node) and node.op == "call_module" and len(node.users) == 1):
        return False
    layer: Any = modules.get(node.target)
    plain = type(layer) in (layers.BatchNorm1d, layers.BatchNorm2d, layers.BatchNorm3d)
    return plain and calls[node.target] == 1 and layer.activation is None and len(node.args) == 1 and not node.kwargs
