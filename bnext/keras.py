"""Batch norms of Keras, Flax and TensorFlow: their convention is `decay=` of a layer, and here are their weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["load_weights"]


@torch.no_grad()
def load_weights(
    layer: nn.Module,
    *,
    gamma: Any = None,
    beta: Any = None,
    moving_mean: Any = None,
    moving_variance: Any = None,
) -> None:
    """Copies weights of a Keras `BatchNormalization` into a batch norm of bnext or torch.nn.

    >>> import bnext
    >>> layer = bnext.BatchNorm2d(2, eps=1e-3, decay=0.99)  # Keras' defaults
    >>> bnext.keras.load_weights(layer, gamma=[1, 2], beta=[0, 1], moving_mean=[3, 4], moving_variance=[5, 6])
    >>> layer.running_var
    tensor([5., 6.])

    In Flax they are called scale, bias, mean and var. A layer made with
    `scale=False` has no gamma, and is one with `weight=False` here.

    Args:
        layer: has running statistics, and a `weight` and a `bias` where `gamma` and `beta` are given.
        gamma, beta, moving_mean, moving_variance: (C,): arrays, tensors or lists. The last two are needed.

    Raises:
        ValueError: one is missing, not wanted by `layer`, not finite, negative (`moving_variance`) or of another
            shape. Nothing has changed then.
    """
    pairs = []
    for theirs, value, ours in (
        ("gamma", gamma, "weight"),
        ("beta", beta, "bias"),
        ("moving_mean", moving_mean, "running_mean"),
        ("moving_variance", moving_variance, "running_var"),
    ):
        target: Tensor | None = getattr(layer, ours)
        if (value is None) != (target is None):
            has, missing = (theirs, ours) if target is None else (ours, theirs)
            raise ValueError(f"load_weights: {has} is given, but {missing} is not: {layer!r}")
        if target is None:
            continue
        source = torch.as_tensor(value)
        if source.shape != target.shape:
            raise ValueError(f"load_weights: {theirs} should be {list(target.shape)}, not {list(source.shape)}")
        if not source.isfinite().all() or (theirs == "moving_variance" and (source < 0).any()):
            raise ValueError(f"load_weights: {theirs} has values that are not finite, or negative")
        pairs.append((target, source))
    for target, source in pairs:
        target.copy_(source)
