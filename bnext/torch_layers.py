"""Batch norms with an activation, a residual or frozen statistics, by torch's operators alone: what `bnext.revert`
makes of layers that `torch.nn` has no class for. They are scripted, exported and quantized as such, and what is saved
of that runs without bnext."""

from __future__ import annotations

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


class _TorchBatchNorm(nn.modules.batchnorm._BatchNorm):
    """activation(bn(input) + residual), by torch's operators; bnext's own layers put the kernels in their place."""

    activation: ActivationName | None = None
    activation_param: float | None = None
    frozen: bool = False  # evaluates in training mode, too
    unbiased: bool = True  # what running_var takes of a batch
    ghost_batch_size: int | None = None
    __constants__ = ["activation", "activation_param", "frozen", "unbiased", "ghost_batch_size"]  # for TorchScript

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
        training = self.training and not self.frozen
        track = self.track_running_stats or not training
        mean = self.running_mean if track else None
        var = self.running_var if track else None
        counter = self.num_batches_tracked if training and self.track_running_stats else None
        by_batch = training or (mean is None and var is None)
        return self._batch_norm(input, mean, var, counter, residual, by_batch)

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

    def extra_repr(self) -> str:
        text = super().extra_repr()
        for name, usual in OWN_ATTRIBUTES.items():
            if getattr(self, name) != usual:
                text += f", {name}={getattr(self, name)!r}"
        return text


def _leaf(layer: nn.Module, input: Proxy, residual: Proxy | None) -> Proxy:
    """A call of the layer in the graph of torch.fx, which traces into the forward of layers that are not torch.nn's."""
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
    """A reverted `bnext.SyncBatchNorm`; the only one that cannot be scripted, as torch's own."""

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

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.act(self.drop(super().forward(input, residual)))


class TorchFrozenBatchNorm2d(nn.Module):
    """A reverted `bnext.nn.FrozenBatchNorm2d`."""

    if TYPE_CHECKING:
        running_mean: Tensor
        running_var: Tensor
        weight: Tensor
        bias: Tensor
        eps: float
        act: nn.Module
        drop: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        y = nn.functional.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )
        return self.act(self.drop(y)) if hasattr(self, "act") else y  # torchvision's layer has no activation
