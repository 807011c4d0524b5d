"""Whole models in one line: `convert` to bnext's layers, `convert_sync_batchnorm` to those over several processes, and
`revert` to torch's."""

from __future__ import annotations

import copy
import inspect
import operator
from typing import Any, TypeVar

from torch import Tensor, fx, nn

from bnext import nn as layers
from bnext import torch_layers
from bnext._extension import extension
from bnext.activation import module_of
from bnext.inspection import copied
from bnext.sync import SyncBatchNorm

__all__ = ["Report", "convert", "convert_sync_batchnorm", "revert"]

Model = TypeVar("Model", bound=nn.Module)


class Report(dict[str, str]):
    """What became of each batch norm, by its name; `unconverted` has those that stayed, with the reason."""

    unconverted: dict[str, str]

    def __init__(self) -> None:
        super().__init__()
        self.unconverted = {}

    def __str__(self) -> str:
        rows = [*self.items(), *((name, f"not converted: {why}") for name, why in self.unconverted.items())]
        width = max((len(name) for name, _ in rows), default=0)
        return "\n".join(f"{name:{width}}  {what}" for name, what in rows)


#: Classes whose forward bnext has, and ours in their places. A subclass that changes nothing of it counts, too.
_OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: layers.BatchNorm1d,
    nn.BatchNorm2d: layers.BatchNorm2d,
    nn.BatchNorm3d: layers.BatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
    nn.LazyBatchNorm1d: layers.LazyBatchNorm1d,
    nn.LazyBatchNorm2d: layers.LazyBatchNorm2d,
    nn.LazyBatchNorm3d: layers.LazyBatchNorm3d,
    torch_layers.TorchBatchNorm1d: layers.BatchNorm1d,
    torch_layers.TorchBatchNorm2d: layers.BatchNorm2d,
    torch_layers.TorchBatchNorm3d: layers.BatchNorm3d,
    torch_layers.TorchSyncBatchNorm: SyncBatchNorm,
    torch_layers.TorchBatchNormAct2d: layers.BatchNormAct2d,
    torch_layers.TorchFrozenBatchNorm2d: layers.FrozenBatchNorm2d,
}
#: Those of libraries that need not be there.
_OTHERS = {
    ("timm.layers.norm_act", "BatchNormAct2d"): layers.BatchNormAct2d,
    ("timm.layers.norm_act", "FrozenBatchNormAct2d"): layers.FrozenBatchNorm2d,
    ("torchvision.ops.misc", "FrozenBatchNorm2d"): layers.FrozenBatchNorm2d,
    ("detectron2.layers.batch_norm", "FrozenBatchNorm2d"): layers.FrozenBatchNorm2d,
}
#: And back, where a layer computes nothing that `torch.nn`'s does not.
_TORCHS = {ours: theirs for theirs, ours in _OURS.items() if theirs.__module__.startswith("torch.nn")}
_REVERTED = {ours: theirs for theirs, ours in _OURS.items() if theirs.__module__ == torch_layers.__name__}

#: Those that `SyncBatchNorm` can stand for: it has no children to call.
_SYNCHRONISABLE = {*_OURS, *_OURS.values()} - {torch_layers.TorchBatchNormAct2d, layers.BatchNormAct2d}

#: What makes a batch norm compute what it does. A subclass, or a layer, with one of its own is not ours to replace.
_BEHAVIOUR = ("forward", "_batch_norm", "__call__", "_check_input_dim", "_load_from_state_dict", "train")
#: What else a subclass may define and would lose: what the forward reads, and what makes, moves and saves that.
_STATE = (
    *torch_layers.MEMBERS,
    "momentum",
    "eps",
    "training",
    "track_running_stats",
    "reset_parameters",
    "reset_running_stats",
    "eval",
    "_apply",
    "get_extra_state",
    "set_extra_state",
    "state_dict",
    "load_state_dict",
    "_save_to_state_dict",
    "__setattr__",
)


def _class_for(layer: nn.Module) -> tuple[type[nn.Module] | None, str]:
    """Ours for it; or None, and why it cannot be converted where it is a batch norm of somebody else's."""
    kind = type(layer)
    if isinstance(layer, (layers._BatchNorm, layers.FrozenBatchNorm2d)):
        return None, ""
    for base in kind.__mro__:
        ours = _OURS.get(base) or _OTHERS.get((base.__module__, base.__name__))
        if ours is None:
            continue
        own = _own_behaviour(layer, base)
        return None if own else ours, own
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        return None, f"bnext has no layer for {spelled(kind)}"
    return None, ""


def _own_behaviour(layer: nn.Module, base: type[nn.Module]) -> str:
    """What it does that its class `base` does not, and that another class in place of `base` would lose; or nothing."""
    if nn.utils.parametrize.is_parametrized(layer):
        return "it is parametrized: convert the model before that"
    kind = type(layer)
    if any(c.__module__.startswith("torch.distributed.fsdp") for c in kind.__mro__):
        return "fully_shard has changed its class: convert the model before that"
    changed = [name for name in (*_BEHAVIOUR, *_STATE, *_settings(base)) if _redefines(layer, base, name)]
    if changed:
        return f"{spelled(kind)} has its own {', '.join(changed)}"
    return _meant_otherwise(layer, base) or _set_on_it(layer, "convert")


def _settings(base: type[nn.Module]) -> tuple[str, ...]:
    """Those that bnext's layers have and torch's do not, if `base` is one of ours, or was."""
    return tuple(torch_layers.OWN_ATTRIBUTES) if issubclass(base, torch_layers._TorchBatchNorm) else ()


def _redefines(layer: nn.Module, base: type[nn.Module], name: str) -> bool:
    """Whether the class of `layer` has another `name` than `base`, and the layer none of its own that comes before."""
    absent = object()
    own = getattr(type(layer), name, absent)
    hidden = name in vars(layer) and not inspect.isdatadescriptor(own)
    return own is not getattr(base, name, absent) and not hidden


def _meant_otherwise(layer: nn.Module, base: type[nn.Module]) -> str:
    """What attributes it has that would mean something to a class of ours, although it was never of one; or nothing."""
    if _settings(base) or not issubclass(base, nn.modules.batchnorm._BatchNorm):
        return ""
    places = (vars(layer), layer._parameters, layer._buffers, layer._modules)
    names = [name for name in torch_layers.OWN_ATTRIBUTES if any(name in place for place in places)]
    return f"it has an attribute {', '.join(names)} of its own, which bnext's layers compute with" if names else ""


def _set_on_it(layer: nn.Module, what: str) -> str:
    """What of its behaviour somebody has set on the layer itself, as accelerate does, and which would go on calling the
    methods of its old class; or nothing."""
    changed = [name for name in _BEHAVIOUR if name in vars(layer)]
    return f"it has its own {', '.join(changed)}, set on the layer: {what} the model before that" if changed else ""


def is_batch_norm(module: nn.Module) -> bool:
    """Whether it is a batch norm of any kind: bnext's, torch.nn's, one derived from it, or one that `convert` knows."""
    return isinstance(module, (nn.modules.batchnorm._BatchNorm, layers.FrozenBatchNorm2d)) or any(_class_for(module))


def is_watched(layer: nn.Module, arguments: bool = False) -> bool:
    """Whether a hook sees what the layer returns, or a gradient of it; with `arguments`, also where it sees those."""
    hooks = [layer._forward_hooks, layer._backward_hooks, layer._backward_pre_hooks]
    return any(hooks) or (arguments and bool(layer._forward_pre_hooks))


def convert(model: Model, *, inplace: bool = True, strict: bool = False, report: Report | None = None) -> Model:
    """Makes every batch norm of `model` one of bnext's.

    >>> import torch, bnext
    >>> model = bnext.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()))
    >>> type(model[1])
    <class 'bnext.nn.BatchNorm2d'>

    Converts `torch.nn`'s layers, lazy and synchronised ones among them, timm's `BatchNormAct2d` with its activation and
    drop layer, and the frozen layers of timm, torchvision and detectron2; of subclasses, those that change neither what
    a batch norm does nor how its state is initialized, moved or saved. They stay the objects that they were:
    parameters, buffers, hooks, names, training mode, dtype, device and `requires_grad` are kept, optimizers go on, and
    state dicts have the same keys.

    Args:
        model: any module, a batch norm itself too.
        inplace: change `model`; otherwise convert a copy, which shares its parameters and buffers.
        strict: raise where a batch norm cannot be converted.
        report: is filled with what became of each.

    Returns:
        `model`, or the copy.

    Raises:
        ValueError: with `strict`, some could not be converted: their names and reasons. Nothing has changed then.
    """
    extension()
    model = model if inplace else _sharing_copy(model)
    found = [(name, layer, *_class_for(layer)) for name, layer in model.named_modules()]
    report = Report() if report is None else report
    report.unconverted.update({name: why for name, _, kind, why in found if kind is None and why})
    if strict and report.unconverted:
        raise ValueError("bnext.convert: " + "; ".join(f"{name}: {why}" for name, why in report.unconverted.items()))
    for name, layer, kind, _ in found:
        if kind is not None:
            report[name] = f"{spelled(type(layer))} -> {spelled(kind)}"
            layer.__class__ = kind
            if isinstance(layer, layers.BatchNormAct2d):
                layer._find_activation()
    return model


def convert_sync_batchnorm(module: nn.Module, process_group: Any | None = None) -> nn.Module:
    """Replaces every batch norm layer of `module`, torch.nn's and bnext's, by a `SyncBatchNorm`.

    Like `torch.nn.SyncBatchNorm.convert_sync_batchnorm`, but nothing is lost: the new layers have the activation, hooks
    and attributes of the old ones, and take a residual. They share parameters and buffers with them. A layer that the
    model has in several places stays one layer.

    Args:
        module: a model, which is changed, or a batch norm layer.
        process_group: the processes to synchronise with; all of them where it is None.

    Returns:
        `module`; where it is itself a batch norm layer, the one that replaces it.

    Raises:
        TypeError: a layer with a forward or another method or property of its own that decides what a batch norm does,
            be it of its class or set on it, or a parametrization, which the new one would not have; or one of torch.nn
            with an attribute that means something to bnext's layers alone. Nothing has been changed then.
        ValueError: a lazy layer before its first batch, or one with `ghost_batch_size`; likewise.
    """
    replaced: dict[nn.Module, nn.Module] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            replaced[layer] = _synchronised(layer, process_group, name)
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if child in replaced:
                replaced.get(parent, parent).add_module(name, replaced[child])
    return replaced.get(module, module)


def _synchronised(layer: nn.Module, process_group: Any | None, name: str) -> SyncBatchNorm:
    where, kind = f"bnext.convert_sync_batchnorm: {name or 'the layer'}", type(layer)
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin) and layer.has_uninitialized_params():
        raise ValueError(f"{where}: {spelled(kind)} should have seen a batch before it is converted")
    if getattr(layer, "ghost_batch_size", None) is not None:
        raise ValueError(f"{where}: with ghost_batch_size it normalizes parts of a batch, and not several batches")
    base = next((base for base in kind.__mro__ if base in _SYNCHRONISABLE), nn.modules.batchnorm._BatchNorm)
    own = _own_behaviour(layer, base)
    if own:
        raise TypeError(f"{where}: {own}")
    new = SyncBatchNorm.__new__(SyncBatchNorm)
    _share_with(new, layer)
    new.process_group = process_group
    new._name = name or None
    extension()  # as the constructor does
    return new


def revert(model: Model, *, inplace: bool = True) -> Model:
    """Makes every layer of bnext one of torch.

    A layer without activation becomes its class of `torch.nn`, which takes no residual; one with an activation, or with
    what else `torch.nn` does not have, becomes one of `bnext.torch_layers`, which computes the same by torch's
    operators. The result can be scripted and exported, and a program saved from it runs without bnext. `convert` undoes
    it.

    Tools that fold a batch norm, or replace it, know its class of `torch.nn` alone. So where a graph calls the layers,
    as in what `fuse` and `torch.fx.symbolic_trace` return, a layer's sum and its activation become nodes of the graph,
    and it becomes one of `torch.nn`; names in state dicts stay. Elsewhere nobody but the layer can run its activation,
    and the tools that are known raise an error.

    >>> import torch, bnext
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), bnext.BatchNorm2d(8, activation="relu"))
    >>> reverted = bnext.revert(torch.fx.symbolic_trace(model))
    >>> [(name, type(layer).__name__) for name, layer in reverted.named_children()]
    [('0', 'Conv2d'), ('1', 'BatchNorm2d'), ('1_activation', 'ReLU')]

    Args:
        model: any module.
        inplace: change `model`; otherwise revert a copy, which shares its parameters and buffers.

    Raises:
        ValueError: a layer is of a class derived from bnext's, has a forward set on it, or is lazy and fused. Nothing
            has changed then.
    """
    model = model if inplace else _sharing_copy(model)
    _find_reverted(model)  # raises before anything has changed
    for module in list(model.modules()):
        if isinstance(module, fx.GraphModule):
            _take_out_activations(module)
    for layer, kind in _find_reverted(model).items():
        layer.__class__ = kind
        _forget(layer, _ACTIVATION if kind is torch_layers.TorchBatchNormAct2d else ())  # found in its children
    return model


_ACTIVATION = ("activation", "activation_param")


def _find_reverted(model: nn.Module) -> dict[nn.Module, type[nn.Module]]:
    ours = (layers._BatchNorm, layers.FrozenBatchNorm2d)
    return {layer: _reverted(name, layer) for name, layer in model.named_modules() if isinstance(layer, ours)}


def _reverted(name: str, layer: nn.Module) -> type[nn.Module]:
    kind = type(layer)
    reverted = (None if _has_own(layer) else _TORCHS.get(kind)) or _REVERTED.get(kind)
    why = "which torch has nothing for" if reverted is None else _set_on_it(layer, "revert")
    if reverted is None or why:
        raise ValueError(f"bnext.revert: {name or 'the layer'} is {layer!r} of {spelled(kind)}, {why}")
    return reverted


def _has_own(layer: nn.Module, but: tuple[str, ...] = ()) -> bool:
    """Whether it computes what no layer of `torch.nn` does."""
    usual = torch_layers.OWN_ATTRIBUTES.items()
    return any(layer.__dict__.get(key, value) != value for key, value in usual if key not in but)


def _forget(layer: nn.Module, names: tuple[str, ...]) -> None:
    """Deletes these attributes, and of a layer of `torch.nn` all that such a layer does not have."""
    for name in (*names, *(torch_layers.OWN_ATTRIBUTES if type(layer) in _TORCHS.values() else ())):
        layer.__dict__.pop(name, None)


def _take_out_activations(module: fx.GraphModule) -> None:
    """Makes nodes of the graph of what the batch norms that it calls do at their end. They become new layers, of the
    same tensors: those that they were may be another model's, too, which needs their activation."""
    calls: dict[str, list[fx.Node]] = {}
    for node in module.graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    parts: dict[nn.Module, nn.Module] = {}
    for path, nodes in calls.items():
        layer: Any = module.get_submodule(path)
        kind = _without_activation(layer)
        residuals = [_residual_of(node) for node in nodes]
        inside = any(path.startswith(f"{target}.") for target in calls)  # of what calls it by its own code
        if kind is None or inside or any(r is NotImplemented for r in residuals):
            continue
        if is_watched(layer, arguments=any(r is not None for r in residuals)):
            continue
        if layer not in parts:
            new = parts[layer] = kind.__new__(kind)
            _share_with(new, layer)
            _forget(new, _ACTIVATION)
        name = f"{path}_activation"
        while name in calls or _has_submodule(module, name):
            name += "_"
        module.set_submodule(path, parts[layer])
        module.add_submodule(name, module_of(layer.activation, layer.activation_param).train(layer.training))
        for node, residual in zip(nodes, residuals, strict=True):
            _add_to_graph(module.graph, node, residual, name)
    if parts:
        module.recompile()


def _without_activation(layer: nn.Module) -> type[nn.Module] | None:
    """Torch's class for a layer with an activation, without it."""
    kind = _OURS.get(type(layer), type(layer))
    if kind not in _TORCHS or getattr(layer, "activation", None) is None:
        return None
    return _REVERTED.get(kind) if _has_own(layer, but=_ACTIVATION) else _TORCHS[kind]


def _residual_of(node: fx.Node) -> Any:
    """What a call of a batch norm adds, or None; NotImplemented where it is called in another way."""
    rest = [*node.args[1:], *(value for key, value in node.kwargs.items() if key == "residual")]
    if not node.args or set(node.kwargs) - {"residual"} or len(rest) > 1:
        return NotImplemented
    return rest[0] if rest else None


def _add_to_graph(graph: fx.Graph, node: fx.Node, residual: Any, activation: str) -> None:
    """activation(node + residual) in place of a `node` that did it all."""
    with graph.inserting_before(node.next):
        argument = node if residual is None else graph.call_function(operator.add, (node, residual))
        result = graph.call_module(activation, (argument,))
    result.meta = dict(node.meta)
    node.replace_all_uses_with(result, delete_user_cb=lambda user: user not in (argument, result))
    node.args, node.kwargs = node.args[:1], {}


def _has_submodule(module: nn.Module, path: str) -> bool:
    parent, _, name = path.rpartition(".")
    return hasattr(module.get_submodule(parent), name)


def _share_with(new: nn.Module, layer: nn.Module) -> None:
    """Gives `new` all that `layer` has; in containers of its own, but for hooks, whose handles go on working."""
    containers = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
    new.__dict__.update({key: copy.copy(value) if key in containers else value for key, value in vars(layer).items()})


def _sharing_copy(model: Model) -> Model:
    return copied(model, (t for module in model.modules() for t in _own_tensors(module)))


def _own_tensors(module: nn.Module) -> list[Tensor]:
    return [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]


def spelled(kind: type) -> str:
    """The name that people import it by: torch.nn.BatchNorm2d."""
    module = kind.__module__.removesuffix(".modules.batchnorm").removesuffix(
        ".nn" if "bnext" in kind.__module__ else ""
    )
    return f"{module}.{kind.__name__}"
