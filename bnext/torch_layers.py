"""What `bnext.revert` makes of layers that `torch.nn` has no class for: batch norms with an activation, a residual or
frozen statistics, by torch's operators alone. They are scripted, exported and quantized as such, and what is saved of
that runs without bnext."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from bnext import aten
from bnext.activation import apply

__all__ = [
    "TorchBatchNorm1d",
    "TorchBatchNorm2d",
    "TorchBatchNorm3d",
    "TorchBatchNormAct2d",
    "TorchFrozenBatchNorm2d",
    "TorchSyncBatchNorm",
]


class _TorchBatchNorm(nn.modules.batchnorm._BatchNorm):
    """activation(bn(input) + residual), as the layer of bnext that it stands for."""

    activation: str | None = None
    activation_param: float | None = None
    frozen: bool = False
    __constants__ = ["activation", "activation_param", "frozen"]

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        self._check_input_dim(input)
        training = self.training and not self.frozen
        track = self.track_running_stats or not training
        mean = self.running_mean if track else None
        var = self.running_var if track else None
        return aten.batch_norm(
            input,
            self.weight,
            self.bias,
            mean,
            var,
            self.num_batches_tracked if training and self.track_running_stats else None,
            residual,
            training or (mean is None and var is None),
            self.momentum,
            self.eps,
            "none" if self.activation is None else self.activation,
            0.0 if self.activation_param is None else self.activation_param,
        )

    def extra_repr(self) -> str:
        fused = "" if self.activation is None else f", activation={self.activation!r}"
        return super().extra_repr() + fused + (", frozen=True" if self.frozen else "")


class TorchBatchNorm1d(_TorchBatchNorm, nn.BatchNorm1d):
    """A reverted `bnext.BatchNorm1d`."""


class TorchBatchNorm2d(_TorchBatchNorm, nn.BatchNorm2d):
    """A reverted `bnext.BatchNorm2d`."""


class TorchBatchNorm3d(_TorchBatchNorm, nn.BatchNorm3d):
    """A reverted `bnext.BatchNorm3d`."""


class TorchSyncBatchNorm(nn.SyncBatchNorm):
    """A reverted `bnext.SyncBatchNorm`; the only one that cannot be scripted, as torch's own."""

    activation: str | None = None
    activation_param: float | None = None
    frozen: bool = False

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.frozen:
            y = nn.functional.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        else:
            y = super().forward(input)
        if residual is not None:
            y = y + residual
        return apply(self.activation or "none", self.activation_param or 0.0, y)


class TorchBatchNormAct2d(nn.BatchNorm2d):
    """A reverted `bnext.nn.BatchNormAct2d`: act(drop(bn(input)))."""

    if TYPE_CHECKING:
        act: nn.Module
        drop: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


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
