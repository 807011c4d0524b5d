"""Drop-in layers: `torch.nn`'s own classes with a faster forward, a fused activation and a fused sum.

    >>> import torch, bnext
    >>> x, residual = torch.randn(2, 8, 64, 4, 4)
    >>> norm, fused = bnext.BatchNorm2d(64), bnext.BatchNorm2d(64, activation="relu")
    >>> torch.testing.assert_close(norm(x), torch.nn.BatchNorm2d(64)(x))
    >>> torch.testing.assert_close(fused(x), norm(x).relu())
    >>> torch.testing.assert_close(fused(x, residual), (norm(x) + residual).relu())
    >>> swish = bnext.BatchNorm2d(64, activation=torch.nn.SiLU())
    >>> torch.testing.assert_close(swish(x), torch.nn.functional.silu(norm(x)))

Constructor arguments are those of `torch.nn`, plus keywords:

    weight              False for a shift without scale.
    activation          None, a name such as "relu", `nn.SiLU()` or `F.silu`: see `bnext.functional.batch_norm`.
    activation_param    The slope of leaky_relu.
    decay               The weight of the old running statistics, in place of `momentum`, which is 1 - decay; the
                        biased variance of a batch enters then, as in Keras and Flax.
    unbiased            Whether the unbiased one does; by default, where `decay` is not given.
    ghost_batch_size    In training, normalize parts of a batch of at most so many examples, each by its own statistics
                        (Hoffer et al., https://arxiv.org/abs/1705.08741): parts as even as possible, in order, each of
                        which steps the running statistics.

Attributes, buffers, state dicts and pickles are those of `torch.nn`, in both directions.
"""

from __future__ import annotations

from decimal import Decimal
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bnext import routes
from bnext._extension import extension
from bnext.activation import Activation, ActivationName, fusible, has_parameter, is_number, resolve
from bnext.checkpointing import held
from bnext.functional import batch_norm
from bnext.torch_layers import _FrozenBatchNorm2d, _TorchBatchNorm, lost_with_children, member_of

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct2d",
    "FrozenBatchNorm2d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
]


class _BatchNorm(_TorchBatchNorm):
    """The forward of all layers here; `torch.nn`'s class after it says what shapes it takes."""

    # `activation` is always a name, whatever is assigned to it, which also sets `activation_param`.

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
        weight: bool = True,
        bias: bool = True,
        activation: Activation = None,
        activation_param: float | None = None,
        decay: float | None = None,
        unbiased: bool | None = None,
        ghost_batch_size: int | None = None,
    ) -> None:
        # Before anything is made.
        _check_keywords(weight, bias, momentum, activation, activation_param, decay, unbiased, ghost_batch_size)
        # Only the first five have the same positions in nn.SyncBatchNorm.
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self._set_keywords(weight, bias, activation, activation_param, decay, unbiased, ghost_batch_size)
        extension()  # builds or loads now, so that a missing compiler fails here and not in mid-training

    if TYPE_CHECKING:
        # Torch types the call of every module as Any.
        def __call__(self, input: Tensor, residual: Tensor | None = None) -> Tensor: ...

        @property
        def activation(self) -> ActivationName | None: ...

        @activation.setter
        def activation(self, activation: Activation) -> None: ...

    def _batch_norm(
        self,
        input: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        counter: Tensor | None,
        residual: Tensor | None,
        by_batch: bool,
    ) -> Tensor:
        if torch.jit.is_scripting():
            return self._by_torch(input, mean, var, counter, residual, by_batch)
        else:
            if by_batch and held.depth > 0 and not torch.compiler.is_compiling():
                mean = var = counter = None
            return batch_norm(
                input,
                mean,
                var,
                member_of(self, self._parameters, "weight"),
                member_of(self, self._parameters, "bias"),
                by_batch,
                self.momentum,
                self._instance_dict["eps"],
                activation=self.activation,
                activation_param=self.activation_param,
                residual=residual,
                num_batches_tracked=counter,
                unbiased=self.unbiased,
                ghost_batch_size=self.ghost_batch_size,
            )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "activation":  # torch.nn would register a module as a child, where no forward looks for it
            self._set_activation(value)
        else:
            super().__setattr__(name, value)

    def _set_activation(self, activation: Activation, param: float | None = None) -> None:
        name, value = resolve(activation, param)
        object.__setattr__(self, "activation", None if name == "none" else name)
        self.activation_param = value if has_parameter(name) else None

    def _set_keywords(
        self,
        weight: bool,
        bias: bool,
        activation: Activation,
        activation_param: float | None,
        decay: float | None,
        unbiased: bool | None,
        ghost_batch_size: int | None,
    ) -> None:
        for name, keep in (("weight", weight), ("bias", bias)):
            if not keep:
                self.register_parameter(name, None)
        self._set_activation(activation, activation_param)
        if decay is not None:
            self.momentum = float(1 - Decimal(repr(float(decay))))  # 0.1 of 0.9, where floats give 0.09999999999999998
        self.unbiased = decay is None if unbiased is None else unbiased
        self.ghost_batch_size = None if ghost_batch_size is None else int(ghost_batch_size)  # of numpy, say

    def _route(self, input: Tensor, residual: Tensor | None = None, *, compiled: bool) -> routes.Route:
        """Which way `forward` goes, for `bnext.explain`; `compiled` where torch.compile makes a graph of it."""
        mean, var, counter, by_batch = self._statistics()
        operands = (input, self.weight, self.bias, mean, var, counter, residual)
        return routes.while_traced(by_batch, compiled) or routes.of_call(*operands)


def _check_keywords(
    weight: bool,
    bias: bool,
    momentum: float | None,
    activation: Activation,
    activation_param: float | None,
    decay: float | None,
    unbiased: bool | None,
    ghost_batch_size: int | None,
) -> None:
    for name, value in (("weight", weight), ("bias", bias)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} should be True or False, whether the layer has one, not {value!r}")
    if unbiased is not None and not isinstance(unbiased, bool):
        raise TypeError(f"unbiased should be None, True or False, not {unbiased!r}")
    resolve(activation, activation_param)
    if decay is not None and not is_number(decay):
        raise TypeError(f"decay should be None or a number from 0 to 1, not {decay!r}")
    if decay is not None and momentum != 0.1:  # the default
        raise ValueError(f"momentum should be left out where decay is given, which is 1 - momentum, not {momentum!r}")
    if decay is not None and not 0 <= decay <= 1:
        raise ValueError(f"decay should be None or from 0 to 1, not {decay!r}")
    if isinstance(ghost_batch_size, bool):
        raise TypeError(f"ghost_batch_size should be None or a positive integer, not {ghost_batch_size!r}")
    if ghost_batch_size is not None and (not isinstance(ghost_batch_size, Integral) or ghost_batch_size < 1):
        raise ValueError(f"ghost_batch_size should be None or a positive integer, not {ghost_batch_size!r}")


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


class BatchNormAct2d(BatchNorm2d):
    """act(drop(bn(input) + residual)), as `timm.layers.BatchNormAct2d`, of which `bnext.convert` makes it.

    Keeps its children `act` and `drop`, which may be replaced later. `act` is fused where it is one of
    `bnext.activation` and `drop` does nothing.
    """

    def __init__(
        self,
        num_features: int,
        *args: Any,
        act: torch.nn.Module | None = None,
        drop: torch.nn.Module | None = None,
        **keywords: Any,
    ) -> None:
        super().__init__(num_features, *args, **keywords)
        self.drop = torch.nn.Identity() if drop is None else drop
        self.act = torch.nn.Identity() if act is None else act
        self._find_activation()

    def _batch_norm(self, *args: Any) -> Tensor:
        self._find_activation()  # the children may have been replaced, or have got hooks
        y = super()._batch_norm(*args)
        return y if self.activation is not None else self.act(self.drop(y))

    def _find_activation(self) -> None:
        """Sets `activation` to what the children do, if that can be fused."""
        found = fusible(self.act) if type(self.drop) is torch.nn.Identity else None
        activation, param = found or (None, None)
        if self.activation != activation or self.activation_param != param:
            self._set_activation(activation, param)

    def _lost_by(self, evaluates: bool) -> list[str]:
        return lost_with_children(self, evaluates)


class FrozenBatchNorm2d(_FrozenBatchNorm2d):
    """act(drop(bn(input))) by statistics and parameters that are buffers, and never change: what `bnext.convert` makes
    of `torchvision.ops.FrozenBatchNorm2d`, and of timm's and detectron2's."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        *,
        act: torch.nn.Module | None = None,
        drop: torch.nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((num_features,), value))
        self.drop = torch.nn.Identity() if drop is None else drop
        self.act = torch.nn.Identity() if act is None else act

    def forward(self, input: Tensor) -> Tensor:
        """Runs the kernels for evaluation, and their backward, in any mode."""
        drop, act = getattr(self, "drop", None), getattr(self, "act", None)  # torchvision's layer has none
        found = fusible(act) if act is not None and type(drop) is torch.nn.Identity else None
        activation, param = found or (None, None)
        y = batch_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            eps=self.eps,
            activation=activation,
            activation_param=param,
        )
        return y if found or act is None or drop is None else act(drop(y))

    def _route(self, input: Tensor, *, compiled: bool) -> routes.Route:
        """Which way `forward` goes, for `bnext.explain`; `compiled` where torch.compile makes a graph of it."""
        operands = (input, self.weight, self.bias, self.running_mean, self.running_var, None, None)
        return routes.while_traced(False, compiled) or routes.of_call(*operands)


class _Lazy(_BatchNorm):
    """Takes num_features from its first input, and becomes the layer without Lazy then."""

    if TYPE_CHECKING:  # of torch.nn's class, which comes after this one

        def has_uninitialized_params(self) -> bool: ...

    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.types.Device = None,
        dtype: torch.dtype | None = None,
        *,
        weight: bool = True,
        bias: bool = True,
        activation: Activation = None,
        activation_param: float | None = None,
        decay: float | None = None,
        unbiased: bool | None = None,
        ghost_batch_size: int | None = None,
    ) -> None:
        _check_keywords(weight, bias, momentum, activation, activation_param, decay, unbiased, ghost_batch_size)
        lazy = torch.nn.modules.batchnorm._LazyNormBase
        lazy.__init__(self, eps, momentum, affine, track_running_stats, device, dtype)  # type: ignore[arg-type]
        self._set_keywords(weight, bias, activation, activation_param, decay, unbiased, ghost_batch_size)
        extension()

    def reset_parameters(self) -> None:
        if not self.has_uninitialized_params() and self.num_features != 0:
            super().reset_parameters()

    def initialize_parameters(self, input: Tensor, residual: Tensor | None = None) -> None:
        """Gives the parameters and buffers as many elements as `input` has channels."""
        if not self.has_uninitialized_params():
            return
        self.num_features = input.shape[1]
        uninitialized: tuple[Any, ...] = (self.weight, self.bias, self.running_mean, self.running_var)
        for t in uninitialized:
            if t is not None:
                t.materialize((self.num_features,))
        self.reset_parameters()


class LazyBatchNorm1d(_Lazy, torch.nn.LazyBatchNorm1d):
    """`BatchNorm1d` of as many features as its first input has: see `torch.nn.LazyBatchNorm1d`."""

    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(_Lazy, torch.nn.LazyBatchNorm2d):
    """`BatchNorm2d` of as many features as its first input has: see `torch.nn.LazyBatchNorm2d`."""

    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(_Lazy, torch.nn.LazyBatchNorm3d):
    """`BatchNorm3d` of as many features as its first input has: see `torch.nn.LazyBatchNorm3d`."""

    cls_to_become = BatchNorm3d
