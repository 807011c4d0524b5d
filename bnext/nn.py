"""Drop-in layers: `torch.nn`'s own classes with a faster forward, a fused activation and a fused sum.

    bnext.BatchNorm2d(64)                                  torch.nn.BatchNorm2d(64)
    bnext.BatchNorm2d(64, activation="relu")(x)            relu(bn(x))
    bnext.BatchNorm2d(64, activation="relu")(x, residual)  relu(bn(x) + residual)

Constructor arguments are those of the installed torch, plus the keyword `activation`. Attributes,
buffers, state dicts and pickles are those of `torch.nn`, in both directions.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from bnext._extension import extension
from bnext.functional import batch_norm, check_activation

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]


def _follow_torch(init):
    """Gives `init` the signature of the installed torch's constructor, plus the keyword `activation`."""
    theirs = inspect.signature(torch.nn.modules.batchnorm._BatchNorm.__init__)
    ours = inspect.signature(init).parameters["activation"]
    init.__signature__ = theirs.replace(parameters=[*theirs.parameters.values(), ours])
    return init


class _BatchNorm(torch.nn.modules.batchnorm._BatchNorm):
    """The forward of all layers here; `torch.nn`'s class after it says what shapes it takes."""

    activation: str | None = None

    @_follow_torch
    def __init__(self, *args, activation: str | None = None, **kwargs) -> None:
        check_activation(activation)
        super().__init__(*args, **kwargs)
        self.activation = activation
        extension()  # a missing compiler is news for now, not for the middle of training

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
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
