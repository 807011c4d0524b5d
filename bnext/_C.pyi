# The compiled module, csrc/bindings/module.cpp, which bnext._extension loads, as a type: a module that is found at run
# time has none.

from typing import Protocol

from torch import Tensor

class Extension(Protocol):
    #: Whether it was built with CUDA; without, it has nothing about plans and devices.
    with_cuda: bool

    #: The names of the activations, in the order of csrc/core/activation.h.
    activations: list[str]

    def batch_norm(
        self,
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
        self,
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
        self,
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
        self,
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
    def set_enabled(self, on: bool, /) -> None: ...
    def kernels_run(self) -> int: ...
    def plans(self) -> list[str]: ...
    def force_plan(self, plan: str, /) -> str: ...
    def set_sm_margin(self, multiprocessors: int, /) -> int: ...
    def refused_launches(self, device: int, /) -> list[str]: ...
    def device_properties(self, device: int, /) -> list[int]: ...
    def describe_plan(
        self, x: Tensor, backward: bool, activation: str, residual: bool, device: list[int], plan: str, /
    ) -> str: ...
