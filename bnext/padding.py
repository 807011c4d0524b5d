"""Batch normalization of padded batches: by the statistics of what is no padding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["masked"]


def masked(layer: nn.Module, input: Tensor, mask: Tensor, residual: Tensor | None = None) -> Tensor:
    """Applies `layer` to the positions of `input` where `mask` is true; elsewhere the result, and all gradients, are 0.

    >>> import torch, bnext
    >>> layer, x = bnext.BatchNorm1d(4), torch.randn(3, 4, 5)
    >>> y = bnext.masked(layer, x, torch.tensor([5, 2, 3]))
    >>> valid = torch.cat([x[0], x[1, :, :2], x[2, :, :3]], dim=1).T
    >>> torch.testing.assert_close(y[1, :, :2].T, torch.nn.BatchNorm1d(4)(valid)[5:7])

    The valid positions are packed, so that time and memory go by their number and not by the padded length. This number
    is known when the call runs: `torch.compile` breaks its graph here, and neither `fullgraph=True` nor `torch.export`
    takes the call.

    Args:
        layer: a batch norm that takes (M, C): `bnext.BatchNorm1d`, `bnext.SyncBatchNorm`, or one of torch.nn.
        input: (N, C, L).
        mask: bool (N, L); or lengths, integer (N,): position l of example n is valid where l < mask[n]. So a length
            beyond L counts as L, and a negative one as 0: to find one, a GPU would have to be waited for once more.
        residual: (N, C, L), of which the valid positions are added before the layer's activation.

    Raises:
        ValueError: a shape or dtype is another one; or what `layer` raises, of M valid positions.
    """
    if input.dim() != 3:
        raise ValueError(f"masked: input should be (N, C, L), not {list(input.shape)}")
    n, _, length = input.shape
    if mask.shape == (n,) and not mask.is_floating_point() and mask.dtype is not torch.bool:
        mask = torch.arange(length, device=mask.device) < mask.unsqueeze(1)
    if mask.shape != (n, length) or mask.dtype is not torch.bool:
        raise ValueError(
            f"masked: mask should be bool {[n, length]} or integer lengths {[n]}, not {mask.dtype} {list(mask.shape)}"
        )
    if residual is not None and residual.shape != input.shape:
        raise ValueError(f"masked: residual should be {list(input.shape)}, as input is, not {list(residual.shape)}")
    where = mask.nonzero(as_tuple=True)  # looked for once: on a GPU it waits for it
    rows = [] if residual is None else [residual.transpose(1, 2)[where]]
    packed = layer(input.transpose(1, 2)[where], *rows)
    y = packed.new_zeros(n, length, packed.shape[1])
    return y.index_put_(where, packed).transpose(1, 2)  # in place: nobody else has y
