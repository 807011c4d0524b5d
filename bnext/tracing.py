"""Traces a model for `fuse`: to a graph that holds in training and in evaluation, without what a graph would drop."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from bnext.conversion import is_batch_norm
from bnext.recomputation import is_hook_of_recompute, is_recomputed

__all__ = ["trace"]

#: What a graph of a module's forward does not have, and would compute or save something else without: hooks, and a
#: class's own methods that set modes or name what is saved.
_HOOKS = {
    "_forward_pre_hooks": "a forward pre-hook",
    "_forward_hooks": "a forward hook",
    "_backward_pre_hooks": "a backward pre-hook",
    "_backward_hooks": "a backward hook",
    "_state_dict_pre_hooks": "a pre-hook of state_dict",
    "_state_dict_hooks": "a hook of state_dict",
    "_load_state_dict_pre_hooks": "a pre-hook of load_state_dict",
    "_load_state_dict_post_hooks": "a post-hook of load_state_dict",
}
_METHODS = ("train", "state_dict", "_save_to_state_dict", "get_extra_state")


def trace(model: nn.Module, tracer: fx.Tracer | None = None) -> fx.Graph:
    """The graph of `model`, in which batch norms of all kinds are calls.

    A graph has no `training`: what depends on that, without a batch norm inside, is a call as well, and so is what has
    hooks.

    Raises:
        ValueError: something with batch norms inside depends on `training`, or has what no graph has.
    """
    lost = _lost_by_tracing(model, but_recompute=True)
    if "forward" in vars(model):  # torch.fx traces that of the class
        lost.append("a forward set on it")
    _refuse(lost, "", model)
    return _Tracing(model, fx.Tracer() if tracer is None else tracer).run()


class _Tracing:
    """Decides with the user's tracer which modules are calls."""

    def __init__(self, model: nn.Module, tracer: Any) -> None:
        self._model = model
        self._tracer = copy.copy(tracer)
        self._is_leaf_of_tracer = self._tracer.is_leaf_module
        self._tracer.is_leaf_module = self._is_leaf
        self._depend_on_mode: set[type[nn.Module]] = set()  # as far as graphs have differed

    def run(self) -> fx.Graph:
        while True:
            graph, constants = self._trace()
            with _other_mode(self._model):
                other = self._trace()
            different = _difference((graph, constants), other)
            if different is None:
                self._check_what_holds_calls(graph)
                vars(self._model).update(constants)
                return graph
            owners = {path: self._model.get_submodule(path) for path in map(_owner, different)}
            found = {type(m) for path, m in owners.items() if path and _may_depend_on_mode(m)}
            if found <= self._depend_on_mode:
                raise ValueError(self._differs(*different))
            self._depend_on_mode |= found

    def _is_leaf(self, module: nn.Module, path: str) -> bool:
        if is_batch_norm(module) or self._is_leaf_of_tracer(module, path):
            return True
        lost = _lost_by_tracing(module)
        if _holds_batch_norm(module):
            _refuse(lost, path, module)
            return False
        return bool(lost) or type(module) in self._depend_on_mode

    def _check_what_holds_calls(self, graph: fx.Graph) -> None:
        """Refuses also what tracing has not called, such as an nn.ModuleList."""
        targets = {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}
        for path in targets:
            while (path := path.rpartition(".")[0]) and path not in targets:
                module = self._model.get_submodule(path)
                _refuse(_lost_by_tracing(module), path, module)

    def _trace(self) -> tuple[fx.Graph, dict[str, Any]]:
        """A graph, and its constants, which torch.fx leaves on the model: there they would change the next graph."""
        attributes = vars(self._model)
        before = set(attributes)
        try:
            graph = self._tracer.trace(self._model)
        finally:
            constants = {name: attributes.pop(name) for name in [*attributes] if name not in before}
        return graph, constants

    def _differs(self, node: fx.Node, other: fx.Node) -> str:
        modes = ("training", "evaluation") if self._model.training else ("evaluation", "training")
        found = [f"{n.name} of {_owner(n) or 'model'} in {mode}" for n, mode in zip((node, other), modes, strict=True)]
        return (
            "bnext.fuse: model should compute the same in training and in evaluation, as a graph has one mode, except "
            f"in modules without batch norms, such as nn.Dropout; the first difference is {' and '.join(found)}"
        )


@contextmanager
def _other_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    try:
        for module, training in modes.items():
            module.training = not training
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _difference(
    one: tuple[fx.Graph, dict[str, Any]], other: tuple[fx.Graph, dict[str, Any]]
) -> tuple[fx.Node, fx.Node] | None:
    """The first nodes that differ. Before them the names of nodes are the same."""
    (graph, constants), (other_graph, other_constants) = one, other
    for a, b in zip(graph.nodes, other_graph.nodes, strict=False):  # the output, which is the last, ends both
        if _call(a) != _call(b) or not _is_same(constants.get(a.target), other_constants.get(b.target)):
            return a, b
    return None


def _call(node: fx.Node) -> tuple[Any, ...]:
    return node.op, node.target, repr(node.args), repr(node.kwargs)


def _is_same(constant: Any, other: Any) -> bool:
    return not isinstance(constant, Tensor) or (isinstance(other, Tensor) and torch.equal(constant, other))


def _owner(node: fx.Node) -> str:
    """The path of the module in whose forward the node is."""
    stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    if stack and node.op == "call_module":
        stack.pop()  # the module that is called
    return stack[-1] if stack else ""


def _holds_batch_norm(module: nn.Module) -> bool:
    return any(map(is_batch_norm, module.modules()))


def _may_depend_on_mode(module: nn.Module) -> bool:
    """Whether it can be a call, and its own forward may read `training`."""
    return not _holds_batch_norm(module) and type(module).forward is not nn.Sequential.forward


def _lost_by_tracing(module: nn.Module, but_recompute: bool = False) -> list[str]:
    """What the module has that a graph of its forward has not."""
    lost = [kind for name, kind in _HOOKS.items() if not all(map(is_hook_of_recompute, getattr(module, name).values()))]
    if is_recomputed(module) and not but_recompute:
        lost.append("hooks of bnext.recompute, which takes what fuse returns instead")
    methods = [name for name in _METHODS if getattr(type(module), name) is not getattr(nn.Module, name)]
    return [*lost, *(f"its own {name}" for name in methods)]


def _refuse(lost: list[str], path: str, module: nn.Module) -> None:
    if lost:
        raise ValueError(
            f"bnext.fuse: {path or 'model'} should have nothing that its graph would drop, but this "
            f"{type(module).__name__} has {', '.join(lost)}"
        )
