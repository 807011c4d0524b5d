"""Whole models in one line: `convert` to bnext's layers, `convert_sync_batchnorm` to those over several processes, and
`revert` to torch's."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import Tensor, nn

from bnext import nn as layers
from bnext import torch_layers
from bnext._extension import extension
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

#: What makes a batch norm compute what it does. A subclass with one of its own is not ours to replace.
_BEHAVIOUR = ("forward", "__call__", "_check_input_dim", "_load_from_state_dict", "train")


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
    changed = [name for name in _BEHAVIOUR if getattr(kind, name, None) is not getattr(base, name, None)]
    return f"{spelled(kind)} has its own {', '.join(changed)}" if changed else ""


def convert(model: Model, *, inplace: bool = True, strict: bool = False, report: Report | None = None) -> Model:
    """Makes every batch norm of `model` one of bnext's.

    >>> import torch, bnext
    >>> model = bnext.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()))
    >>> type(model[1])
    <class 'bnext.nn.BatchNorm2d'>

    Converts `torch.nn`'s layers, lazy and synchronised ones among them, timm's `BatchNormAct2d` with its activation and
    drop layer, and the frozen layers of timm, torchvision and detectron2; of subclasses, those that do not change what
    a batch norm does. They stay the objects that they were: parameters, buffers, hooks, names, training mode, dtype,
    device and `requires_grad` are kept, optimizers go on, and state dicts have the same keys.

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
        TypeError: a layer with a forward or another method of its own that decides what a batch norm does, or a
            parametrization, which the new one would not have; nothing has been changed then.
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
    # All that it has; containers of its own, but for hooks, whose handles go on working.
    containers = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
    new.__dict__.update({key: copy.copy(value) if key in containers else value for key, value in vars(layer).items()})
    new.process_group = process_group
    new._name = name or None
    extension()  # as the constructor does
    return new


def revert(model: Model, *, inplace: bool = True) -> Model:
    """Makes every layer of bnext one of torch.

    A layer without activation becomes its class of `torch.nn`, which takes no residual; one with an activation, or with
    what else `torch.nn` does not have, becomes one of `bnext.torch_layers`, which computes the same by torch's
    operators. The result can be scripted, exported and quantized, and a program saved from it runs without bnext.
    `convert` undoes it.

    Args:
        model: any module.
        inplace: change `model`; otherwise revert a copy, which shares its parameters and buffers.

    Raises:
        ValueError: a layer is of a class derived from bnext's, or lazy and fused. Nothing has changed then.
    """
    model = model if inplace else _sharing_copy(model)
    ours = (layers._BatchNorm, layers.FrozenBatchNorm2d)
    found: dict[nn.Module, type[nn.Module]]
    found = {layer: _reverted(name, layer) for name, layer in model.named_modules() if isinstance(layer, ours)}
    for layer, kind in found.items():
        layer.__class__ = kind
        own = torch_layers.OWN_ATTRIBUTES if kind in _TORCHS.values() else ()
        found_in_children = ("activation", "activation_param") if kind is torch_layers.TorchBatchNormAct2d else ()
        for name in (*own, *found_in_children):
            layer.__dict__.pop(name, None)
    return model


def _reverted(name: str, layer: nn.Module) -> type[nn.Module]:
    kind = type(layer)
    own = any(layer.__dict__.get(key, usual) != usual for key, usual in torch_layers.OWN_ATTRIBUTES.items())
    reverted = (None if own else _TORCHS.get(kind)) or _REVERTED.get(kind)
    if reverted is None:
        raise ValueError(
            f"bnext.revert: {name or 'the layer'} is {layer!r} of {spelled(kind)}, which torch has nothing for"
        )
    return reverted


def _sharing_copy(model: Model) -> Model:
    tensors: Iterator[Tensor] = (t for module in model.modules() for t in _own_tensors(module))
    return copy.deepcopy(model, {id(t): t for t in tensors})


def _own_tensors(module: nn.Module) -> list[Tensor]:
    return [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]


def spelled(kind: type) -> str:
    """The name that people import it by: torch.nn.BatchNorm2d."""
    module = kind.__module__.removesuffix(".modules.batchnorm").removesuffix(
        ".nn" if "bnext" in kind.__module__ else ""
    )
    return f"{module}.{kind.__name__}"
