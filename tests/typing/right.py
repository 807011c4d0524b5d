"""Calls that type checkers have to accept. tests/test_typing.py also runs this file."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import bnext
from bnext.activation import ActivationName
from bnext.functional import batch_norm

x = torch.randn(2, 3, 4, 4)

plain: nn.BatchNorm2d = bnext.BatchNorm2d(3)
like_torch: nn.BatchNorm2d = bnext.BatchNorm2d(3, 1e-3, 0.2, True, True, None, torch.float32)
named = bnext.BatchNorm2d(3, momentum=None, affine=False, track_running_stats=False, device="cpu", dtype=torch.float64)
without_bias = bnext.BatchNorm2d(3, bias=False)
activation: bnext.Activation = "relu"
fused = bnext.BatchNorm2d(3, activation=activation)
none = bnext.BatchNorm1d(3, activation=None)
none.activation = nn.SiLU()
none.activation = torch.relu
name: ActivationName | None = none.activation
none.activation = None
volume: nn.BatchNorm3d = bnext.BatchNorm3d(3, activation="relu")

y: Tensor = fused(x)
y = fused(x, x)
y = fused(x, residual=x)
y = batch_norm(x, None, None, training=True, activation="relu", residual=x)
mean, var = bnext.ops.batch_norm_stats(x)
y, mask = bnext.ops.batch_norm_normalize(x, mean, var.rsqrt(), None, None, activation="relu", save_mask=True)


class Wide(bnext.BatchNorm2d):
    def __init__(self, factor: int) -> None:
        super().__init__(3 * factor, activation="relu")


synchronised: nn.SyncBatchNorm = bnext.SyncBatchNorm(3, process_group=None, activation="relu")
y = bnext.SyncBatchNorm(3, activation=nn.SiLU())(x, x)
model: nn.Module = bnext.convert_sync_batchnorm(nn.Sequential(fused))

report = bnext.conversion.Report()
unconverted: dict[str, str] = report.unconverted


def block(layer: bnext.BatchNorm2d, x: Tensor) -> Tensor:
    return layer(x, residual=x).relu()


y = block(Wide(1), x)
