"""Drop-in layers: `torch.nn`'s own classes with a faster forward, a fused activation and a fused sum.

    >>> import torch, bnext
    >>> x, residual = torch.randn(2, 8, 64, 4, 4)
    >>> norm, fused = bnext.BatchNorm2d(64), bnext.BatchNorm2d(64, activation="relu")
    >>> torch.testing.assert_close(norm(x), torch.nn.BatchNorm2d(64)(x))
    >>> torch.testing.assert_close(fused(x), norm(x).relu())
    >>> torch.testing.assert_close(fused(x, residual), (norm(x) + residual).relu())
    >>> swish = bnext.BatchNorm2d(64, activation=torch.nn.SiLU())
    >>> torch.testing.assert_close(swish(x), torch.nn.functional.silu(norm(x)))

Constructor arguments are those of the installed torch, plus the keywords `activation` and, for the slope of
leaky_relu, `activation_param`; `bnext.functional.batch_norm` says what they may be. Attributes,
buffers, state dicts and pickles are those of `torch.nn`, in both directions.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bnext._extension import extension
from bnext.activation import Activation, ActivationName, has_parameter, resolve
from bnext.functional import batch_norm

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]


class _BatchNorm(torch.nn.modules.batchnorm._BatchNorm):
    """The forward of all layers here; `torch.nn`'s class after it says what shapes it takes."""

    activation: ActivationName | None = None  # always a name, whatever is assigned to it
    activation_param: float | None = None  # assigning to `activation` sets it, too

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
        activation_param: float | None = None,
    ) -> None:
        resolve(activation, activation_param)  # raises before anything is made
        # Older torch has no `bias`: its own TypeError answers whoever asks for a layer without one.
        without_bias = {} if bias else {"bias": False}
        # Only the first five have the same positions in nn.SyncBatchNorm.
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype, **without_bias
        )
        self._set_activation(activation, activation_param)
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
            activation_param=self.activation_param,
            residual=residual,
            num_batches_tracked=counter,
        )

    def __setattr__(self, name: str, value: Any) -> None:
        # torch.nn would register a module as a child, where no forward looks for it.
        if name == "activation":
            self._set_activation(value)
        else:
            super().__setattr__(name, value)

    @property
    def qconfig(self) -> Any:
        """Of torch.ao.quantization, as any module has it once it is set.

        torch's own converter to synchronised layers builds others from attributes that it knows, and the activation is
        not among them. It asks every layer whether it has this one: that is where it can be told.
        """
        converter = torch.nn.SyncBatchNorm.convert_sync_batchnorm.__func__  # type: ignore[attr-defined]
        if self.activation is not None and sys._getframe(1).f_code is converter.__code__:
            raise TypeError(
                f"torch.nn.SyncBatchNorm.convert_sync_batchnorm would drop activation={self.activation!r} of "
                f"{type(self).__name__}: use bnext.convert_sync_batchnorm"
            )
        if "qconfig" not in vars(self):
            raise AttributeError  # from which torch.nn makes its own
        return vars(self)["qconfig"]

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        vars(self)["qconfig"] = value

    @qconfig.deleter
    def qconfig(self) -> None:
        del vars(self)["qconfig"]

    def _set_activation(self, activation: Activation, param: float | None = None) -> None:
        name, value = resolve(activation, param)
        object.__setattr__(self, "activation", None if name == "none" else name)
        self.activation_param = value if has_parameter(name) else None

    def extra_repr(self) -> str:
        text = super().extra_repr()
        for name in ("activation", "activation_param"):
            if getattr(self, name) is not None:
                text += f", {name}={getattr(self, name)!r}"
        return text


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    """Batch normalization of (N, C) or (N, C, L): see `torch.nn.BatchNorm1d`.

    `activation` is None, a name such as "relu", `nn.SiLU()` or `F.silu`; `forward(input, residual=None)` returns
    activation(bn(input) + residual) in the shape of `input`. Raises what `torch.nn.BatchNorm1d`
    raises, and what `bnext.functional.batch_norm` lists.
    """


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    """Batch normalization of (N, C, H, W): see `torch.nn.BatchNorm2d`.

    `activation` is None, a name such as "relu", `nn.SiLU()` or `F.silu`; `forward(input, residual=None)` returns
    activation(bn(input) + residual) in the shape of `input`. Raises what `torch.nn.BatchNorm2d`
    raises, and what `bnext.functional.batch_norm` lists.
    """


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    """Batch normalization of (N, C, D, H, W): see `torch.nn.BatchNorm3d`.

    `activation` is None, a name such as "relu", `nn.SiLU()` or `F.silu`; `forward(input, residual=None)` returns
    activation(bn(input) + residual) in the shape of `input`. Raises what `torch.nn.BatchNorm3d`
    raises, and what `bnext.functional.batch_norm` lists.
    """
