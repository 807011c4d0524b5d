# What torch.ops.bnext.* take: the schemas of bnext/operators.py, as Python. A test compares them.

from collections.abc import Sequence

from torch import Tensor

def batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    residual: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    activation: str = "none",
    activation_param: float = 0.0,
    unbiased: bool = True,
    ghost_batch_size: int | None = None,
) -> Tensor: ...
def batch_norm_stats(x: Tensor) -> tuple[Tensor, Tensor]: ...
def batch_norm_local_stats(x: Tensor) -> Tensor: ...
def batch_norm_merge(
    stats: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    unbiased: bool = True,
) -> tuple[Tensor, Tensor, Tensor]: ...
def batch_norm_normalize(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    activation: str = "none",
    activation_param: float = 0.0,
    save_mask: bool = False,
) -> tuple[Tensor, Tensor]: ...
def batch_norm_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    residual: Tensor | None,
    momentum: float | None,
    eps: float,
    activation: str = "none",
    activation_param: float = 0.0,
    save_mask: bool = False,
    unbiased: bool = True,
    ghost_batch_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
def batch_norm_forward_eval(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    residual: Tensor | None,
    eps: float,
    activation: str = "none",
    activation_param: float = 0.0,
    save: bool = False,
    save_mask: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
def batch_norm_backward_reduce(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    activation_param: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
def batch_norm_backward_input(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    residual: Tensor | None,
    sum_dy: Tensor,
    sum_dy_xmu: Tensor,
    count: int,
    activation: str = "none",
    activation_param: float = 0.0,
) -> tuple[Tensor, Tensor]: ...
def batch_norm_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    mask: Tensor | None,
    residual: Tensor | None,
    activation: str,
    activation_param: float,
    training: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
