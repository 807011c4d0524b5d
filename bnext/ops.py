"""The operators `torch.ops.bnext.*`, as attributes of this module; the first use loads them.

    >>> import torch, bnext
    >>> mean, var = bnext.ops.batch_norm_stats(torch.ones(4, 3))
    >>> var.tolist()
    [0.0, 0.0, 0.0]

The stages, of which synchronised and other statistics can be composed:

- `batch_norm_stats(x) -> (mean, var)`: over all axes but 1; var is biased.
- `batch_norm_local_stats(x) -> stats`: the same as one row (3C + 2,): mean, what rounding took from it, var, and the
  count of values a channel as count // 2^24 and count % 2^24, both exact in any float.
- `batch_norm_merge(stats, running_mean, running_var, num_batches_tracked, momentum, eps, unbiased)
  -> (mean, invstd, count)`: the statistics of several processes, a row each, merged, and their step into the running
  ones; count is int64, of shape ().
- `batch_norm_normalize(x, mean, invstd, weight, bias, residual, activation, activation_param, save_mask)
  -> (y, mask)`.
- `batch_norm_backward_reduce(dy, x, mean, invstd, weight, bias, mask, residual, activation, activation_param)
  -> (sum_dy, sum_dy_xmu, dweight, dbias)`.
- `batch_norm_backward_input(dy, x, mean, invstd, weight, bias, mask, residual, sum_dy, sum_dy_xmu, count, activation,
  activation_param) -> (dx, dresidual)`.

The fusions that the layers use:

- `batch_norm_forward(...) -> (y, mean, invstd, mask)`: training, with the step of the running statistics; by ghost
  batches where `ghost_batch_size` is given.
- `batch_norm_forward_eval(...) -> (y, mean, invstd, mask)`: by the running statistics.
- `batch_norm_backward(...) -> (dx, dweight, dbias, dresidual)`.
- `batch_norm(...) -> y`: all of it, differentiable twice.

`torch.ops.bnext.batch_norm_stats.default._schema` and so on give the full signatures. x is float32, float64,
float16 or bfloat16 of shape (N, C, *); mean, var, invstd and sums are (C,), float64 for float64 x
and float32 for all others. `activation` is "none" or one of `bnext.activation.NAMES`; `activation_param` is
leaky_relu's slope, and 0 for all others. With a `ghost_batch_size` mean and invstd are (B, C), a row for each of the B
ghost batches, and the mask of each begins a byte of its own; `batch_norm_normalize` and `batch_norm_backward` take such
statistics. Behind a residual a backward takes what says where the activation was: the
`mask` of relu, relu6 and leaky_relu, uint8 with one bit for each element in memory order, set where the derivative
is 1, which `save_mask` asks for; or, for any activation, the `residual` itself. Without a residual it follows from x,
and there is no mask. All but `batch_norm` know no autograd.
"""

import torch

from bnext._extension import extension
from bnext.operators import OPERATORS  # ops.pyi has their signatures, for type checkers and editors


def __getattr__(name: str):
    if name not in OPERATORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; there are {', '.join(sorted(OPERATORS))}")
    extension()
    return getattr(torch.ops.bnext, name)


def __dir__() -> list[str]:
    return sorted(OPERATORS)
