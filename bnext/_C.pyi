# The compiled module: csrc/bindings/module.cpp. bnext._extension loads it.

from torch import Tensor

#: Whether it was built with CUDA; without, it has nothing about plans and devices.
with_cuda: bool

#: The names of the activations, in the order of csrc/core/activation.h.
activations: list[str]

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
    activation: str,
    activation_param: float,
    unbiased: bool,
    ghost_batch_size: int | None,
    /,
) -> Tensor: ...
def batch_norm_if_possible(
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
    activation: str,
    activation_param: float,
    unbiased: bool,
    ghost_batch_size: int | None,
) -> Tensor | None: ...
def obstacle(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    residual: Tensor | None,
    /,
) -> str | None: ...
def check_training(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    residual: Tensor | None,
    momentum: float | None,
    eps: float,
    /,
) -> None: ...
def set_enabled(on: bool, /) -> None: ...
def kernels_run() -> int: ...
def plans() -> list[str]: ...
def force_plan(plan: str, /) -> str: ...
def set_sm_margin(multiprocessors: int, /) -> int: ...
def refused_launches(device: int, /) -> list[str]: ...
def device_properties(device: int, /) -> list[int]: ...
def describe_plan(
    x: Tensor, backward: bool, activation: str, residual: bool, device: list[int], plan: str, /
) -> str: ...
