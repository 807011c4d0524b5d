"""Batch norms with an activation, a residual or frozen statistics, by torch's operators alone: what `bnext.revert`
makes of layers that `torch.nn` has no class for. They are scripted, exported and quantized as such, and what is saved
of that runs without bnext."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from bnext import aten
from bnext.activation import ActivationName, apply

__all__ = [
    "TorchBatchNorm1d",
    "TorchBatchNorm2d",
    "TorchBatchNorm3d",
    "TorchBatchNormAct2d",
    "TorchFrozenBatchNorm2d",
    "TorchSyncBatchNorm",
]


#: What layers have that those of torch.nn do not, and what it is in a layer that computes the same as torch.nn's.
OWN_ATTRIBUTES = {
    "activation": None,
    "activation_param": None,
    "frozen": False,
    "unbiased": True,
    "ghost_batch_size": None,
}

#: What a subclass may define to have its own parameters and buffers.
MEMBERS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked", "__getattr__", "__getattribute__")

#: The modules of functions that make another layer of a batch norm's attributes, or fold it into a convolution. They
#: know none of OWN_ATTRIBUTES, and all of them read `eps`.
_REBUILDERS = {
    "apex.parallel",
    "detectron2.layers.batch_norm",
    "timm.layers.norm_act",
    "timm.layers.split_batchnorm",
    "torch.nn.modules.batchnorm",  # SyncBatchNorm.convert_sync_batchnorm, Lightning's too
    "torch.nn.utils.fusion",
    "torch.utils.mkldnn",
}
#: Those whose result is for evaluation alone, where an activation is all that a layer has to lose.
_FOR_EVALUATION = {
    "__init__",  # of MkldnnBatchNorm
    "convert_frozen_batchnorm",
    "freeze_batch_norm_2d",
    "fuse_conv_bn_eval",
    "fuse_linear_bn_eval",
}


class _TorchBatchNorm(nn.modules.batchnorm._BatchNorm):
    """activation(bn(input) + residual), by torch's operators; bnext's own layers put the kernels in their place."""

    activation: ActivationName | None = None
    activation_param: float | None = None
    frozen: bool = False  # evaluates in training mode, too
    unbiased: bool = True  # what running_var takes of a batch
    ghost_batch_size: int | None = None
    __constants__ = ["activation", "activation_param", "frozen", "unbiased", "ghost_batch_size"]  # for TorchScript
    __jit_unused_properties__ = ["eps"]  # TorchScript would compile it
    _has_own_members = False  # whether a subclass has a property, say, in place of a parameter or buffer

    # `__dict__` by another name: Dynamo of torch 2.11 takes `self.__dict__["eps"]` for the property again, without end.
    # All reads and writes go by it, since Dynamo sees two dictionaries.
    _instance_dict: dict[str, Any] = nn.Module.__dict__["__dict__"]

    if not TYPE_CHECKING:  # torch.nn declares it as an attribute

        @property
        def eps(self):
            """Added to the variance."""
            if not torch.compiler.is_compiling():
                _refuse_rebuilding(self, sys._getframe(1))
            return self._instance_dict["eps"]

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        own = [vars(base) for base in cls.__mro__ if not issubclass(nn.Module, base)]
        cls._has_own_members = any(name in members for members in own for name in MEMBERS)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "eps":  # stays where torch.nn has it, and so do pickles
            self._instance_dict["eps"] = value
        else:
            super().__setattr__(name, value)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """activation(bn(input) + residual), in the shape, dtype and memory format of `input`.

        Call the layer, not this: `layer(input)` or `layer(input, residual)` runs its hooks too. In
        training mode it updates the running statistics. `residual` is fused where it has the shape and dtype of
        `input`, and otherwise broadcast and promoted as in `y + residual`.
        """
        if not torch.jit.is_scripting():  # on its own: TorchScript leaves out what is below such a line # noqa: SIM102
            if type(input) is not Tensor and isinstance(input, Proxy):
                return _leaf(self, input, residual)
        self._check_input_dim(input)
        mean, var, counter, by_batch = self._statistics()
        return self._batch_norm(input, mean, var, counter, residual, by_batch)

    def _statistics(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, bool]:
        """The buffers that the forward takes, and whether it normalizes by the batch."""
        training = self.training and not self.frozen
        track, counts = self.track_running_stats or not training, self.track_running_stats and training
        if torch.jit.is_scripting():
            mean = self.running_mean if track else None
            var = self.running_var if track else None
            counter = self.num_batches_tracked if counts else None
        else:
            mean = member_of(self, self._buffers, "running_mean") if track else None
            var = member_of(self, self._buffers, "running_var") if track else None
            counter = member_of(self, self._buffers, "num_batches_tracked") if counts else None
        return mean, var, counter, training or (mean is None and var is None)

    def _batch_norm(
        self,
        input: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        counter: Tensor | None,
        residual: Tensor | None,
        by_batch: bool,
    ) -> Tensor:
        # On its own: TorchScript reaches no overridden method but `forward`, and none by two names.
        return self._by_torch(input, mean, var, counter, residual, by_batch)

    def _by_torch(
        self,
        input: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        counter: Tensor | None,
        residual: Tensor | None,
        by_batch: bool,
    ) -> Tensor:
        return aten.batch_norm(
            input,
            self.weight,
            self.bias,
            mean,
            var,
            counter,
            residual,
            by_batch,
            self.momentum,
            self.eps,
            "none" if self.activation is None else self.activation,
            0.0 if self.activation_param is None else self.activation_param,
            self.unbiased,
            self.ghost_batch_size,
        )

    def reset_running_stats(self) -> None:
        """As before the first batch. Those of a frozen layer do not change: `torch.optim.swa_utils.update_bn` calls
        this of every batch norm, and then trains."""
        if not self.frozen:
            super().reset_running_stats()

    def reset_parameters(self) -> None:
        """weight = 1, bias = 0, and the running statistics as before the first batch, in a frozen layer too."""
        super().reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        for name in ("weight", "bias"):  # what torch.nn has no word for; newer ones say `bias`
            if self.affine and getattr(self, name) is None and f"{name}=" not in text:
                text += f", {name}=False"
        return ", ".join((text, *_unusual(self, OWN_ATTRIBUTES)))

    def _lost_by(self, evaluates: bool) -> list[str]:
        """What a layer of torch.nn with the same parameters and statistics does not do."""
        return _unusual(self, {"activation": None} if evaluates else OWN_ATTRIBUTES)


def member_of(layer: _TorchBatchNorm, own: Mapping[str, Tensor | None], name: str) -> Tensor | None:
    """`layer.name`, from `own`, its parameters or its buffers, past `nn.Module.__getattr__`, where the five that a call
    asks for took a quarter of its time, for a tiny tensor. It is an attribute of another kind where something took its
    place: a parametrization, a property of a subclass, an entry of the object's dictionary."""
    if layer._has_own_members or name in layer._instance_dict or name not in own:
        return getattr(layer, name)
    return own[name]


def _unusual(layer: nn.Module, usual: Mapping[str, object]) -> list[str]:
    return [f"{name}={getattr(layer, name)!r}" for name, value in usual.items() if getattr(layer, name) != value]


def lost_with_children(layer: nn.Module, evaluates: bool) -> list[str]:
    """`_lost_by` of a layer whose activation is its child `act`, after its child `drop`, which evaluates to nothing."""
    children = {name: getattr(layer, name, None) for name in (("act",) if evaluates else ("act", "drop"))}
    lost = [f"{name}={child!r}" for name, child in children.items() if not isinstance(child, (nn.Identity, type(None)))]
    own = {} if evaluates else {name: usual for name, usual in OWN_ATTRIBUTES.items() if "activation" not in name}
    return lost + _unusual(layer, own)


def _refuse_rebuilding(layer: _TorchBatchNorm, reader: Any) -> None:
    """Raises where the function that reads `eps` would make a layer of it that computes something else."""
    module, function = reader.f_globals.get("__name__"), reader.f_code.co_name
    if module not in _REBUILDERS or function == "forward":  # that of nn.SyncBatchNorm only computes
        return
    lost = layer._lost_by(function in _FOR_EVALUATION)
    if lost:
        raise RuntimeError(
            f"{module}.{function} would drop {', '.join(lost)} of {layer!r}: "
            "use bnext.convert_sync_batchnorm(model) to synchronise, bnext.freeze(model) to freeze, "
            "or bnext.revert(torch.fx.symbolic_trace(model)) first, which makes the activation a layer of its own"
        )


def _leaf(layer: nn.Module, input: Proxy, residual: Proxy | None) -> Proxy:
    """A call of the layer in the graph of torch.fx, which traces into the forward of layers that are not torch.nn's."""
    if layer._forward_pre_hooks or layer._forward_hooks:
        raise RuntimeError(
            f"torch.fx would run the hooks of {layer!r} twice, while it traces and in the graph: trace with a Tracer "
            "whose is_leaf_module is true of this layer, or remove the hooks first"
        )
    tracer: Any = input.tracer
    args = (input,) if residual is None else (input, residual)
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), args, {})


class TorchBatchNorm1d(_TorchBatchNorm, nn.BatchNorm1d):
    """A reverted `bnext.BatchNorm1d`."""


class TorchBatchNorm2d(_TorchBatchNorm, nn.BatchNorm2d):
    """A reverted `bnext.BatchNorm2d`."""


class TorchBatchNorm3d(_TorchBatchNorm, nn.BatchNorm3d):
    """A reverted `bnext.BatchNorm3d`."""


class TorchSyncBatchNorm(_TorchBatchNorm, nn.SyncBatchNorm):
    """A reverted `bnext.SyncBatchNorm`; it cannot be scripted, as torch's own."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.frozen or not self.training or isinstance(input, Proxy):
            return super().forward(input, residual)
        y = nn.SyncBatchNorm.forward(self, input)
        if residual is not None:
            y = y + residual
        return apply(self.activation or "none", self.activation_param or 0.0, y)


class TorchBatchNormAct2d(_TorchBatchNorm, nn.BatchNorm2d):
    """A reverted `bnext.nn.BatchNormAct2d`: act(drop(bn(input) + residual)), whose `activation` is None."""

    if TYPE_CHECKING:
        act: nn.Module
        drop: nn.Module

    def _batch_norm(
        self,
        input: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        counter: Tensor | None,
        residual: Tensor | None,
        by_batch: bool,
    ) -> Tensor:
        return self.act(self.drop(self._by_torch(input, mean, var, counter, residual, by_batch)))

    def _lost_by(self, evaluates: bool) -> list[str]:
        return lost_with_children(self, evaluates)


class _FrozenBatchNorm2d(nn.Module):
    """The state of a batch norm whose statistics and parameters are buffers, and never change."""

    if TYPE_CHECKING:
        running_mean: Tensor
        running_var: Tensor
        weight: Tensor
        bias: Tensor
        eps: float

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(prefix + "num_batches_tracked", None)  # of a checkpoint from before it was frozen
        super()._load_from_state_dict(state_dict, prefix, *args)


class TorchFrozenBatchNorm2d(_FrozenBatchNorm2d):
    """A reverted `bnext.nn.FrozenBatchNorm2d`."""

    if TYPE_CHECKING:
        act: nn.Module
        drop: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        y = nn.functional.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )
        return self.act(self.drop(y)) if hasattr(self, "act") else y  # torchvision's layer has no activation
