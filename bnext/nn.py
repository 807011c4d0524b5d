"""Drop-in layers: `torch.nn`'s own classes with a faster forward, a fused activation and a fused sum.

    >>> import torch, bnext
    >>> x, residual = torch.randn(2, 8, 64, 4, 4)
    >>> norm, fused = bnext.BatchNorm2d(64), bnext.BatchNorm2d(64, activation="relu")
    >>> torch.testing.assert_close(norm(x), torch.nn.BatchNorm2d(64)(x))
    >>> torch.testing.assert_close(fused(x), norm(x).relu())
    >>> torch.testing.assert_close(fused(x, residual), (norm(x) + residual).relu())

Constructor arguments are those of the installed torch, plus the keyword `activation`. Attributes,
buffers, state dicts and pickles are those of `torch.nn`, in both directions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bnext._activation import Activation, operator_name
from bnext._extension import extension
from bnext.functional import batch_norm

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]


class _BatchNorm(torch.nn.modules.batchnorm._BatchNorm):
    """The forward of all layers here; `torch.nn`'s class after it says what shapes it takes."""

    activation: Activation = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.types.Device = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: Activation = None,
    ) -> None:
        operator_name(activation)  # raises before anything is made
        # Older torch has no `bias`: its own TypeError answers whoever asks for a layer without one.
        without_bias = {} if bias else {"bias": False}
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **without_bias)
        self.activation = activation
        extension()  # builds or loads now, so that a missing compiler fails here and not in mid-training

    if TYPE_CHECKING:  # torch types the call of every module as Any

        def __call__(self, input: Tensor, residual: Tensor | None = None) -> Tensor: ...

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """activation(bn(input) + residual), in the shape, dtype and memory format of `input`.

        Call the layer, not this: `layer(input)` or `layer(input, residual)` runs its hooks too. In
        training mode it updates the running statistics. `residual` has the shape, dtype and device
        of `input`; it is not broadcast.
        """
        self._check_input_dim(input)
        training = self.training
        mean = var = counter = None
        if self.track_running_stats or not training:
            mean, var = self.running_mean, self.running_var
            if training:
                counter = self.num_batches_tracked
        return batch_norm(
            input,
            mean,
            var,
            self.weight,
            self.bias,
            training or (mean is None and var is None),
            self.momentum,
            self.eps,
            activation=self.activation,
            residual=residual,
            num_batches_tracked=counter,
        )

    def extra_repr(self) -> str:
        activation = "" if self.activation is None else f", activation={self.activation!r}"
        return super().extra_repr() + activation


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    """Batch normalization of (N, C) or (N, C, L): see `torch.nn.BatchNorm1d`.

    `activation` is None or "relu"; `forward(input, residual=None)` returns
    activation(bn(input) + residual) in the shape of `input`. Raises what `torch.nn.BatchNorm1d`
    raises, and what `bnext.functional.batch_norm` lists.
    """


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    """Batch normalization of (N, C, H, W): see `torch.nn.BatchNorm2d`.

    `activation` is None or "relu"; `forward(input, residual=None)` returns
    activation(bn(input) + residual) in the shape of `input`. Raises what `torch.nn.BatchNorm2d`
    raises, and what `bnext.functional.batch_norm` lists.
    """


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    """Batch normalization of (N, C, D, H, W): see `torch.nn.BatchNorm3d`.

    `activation` is None or "relu"; `forward(input, residual=None)` returns
    activation(bn(input) + residual) in the shape of `input`. Raises what `torch.nn.BatchNorm3d`
    raises, and what `bnext.functional.batch_norm` lists.
    """
