"""Who is measured. A provider builds one module for a problem, called as module(x) or module(x, residual);
what it cannot do it refuses by an exception, whose message becomes the row."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch._functorch.config
from torch import Tensor, nn

from bench.cases import EPS, MOMENTUM, Problem


@dataclass(frozen=True)
class Provider:
    name: str
    what: str
    build: Callable[[Problem, str], nn.Module]  # (problem, device)
    scope: Callable[[], AbstractContextManager] = nullcontext  # entered around every use, outside what is timed


class Chain(nn.Module):
    """act(bn(x) + residual), as model code writes it."""

    def __init__(self, bn: nn.Module):
        super().__init__()
        self.bn = bn

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.bn(x)
        if residual is not None:
            y += residual
        return nn.functional.relu(y, inplace=True)


def _layer(package, problem: Problem, device: str, **options) -> nn.Module:
    kind = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}[len(problem.shape)]
    options |= {"eps": EPS, "momentum": MOMENTUM, "device": device, "dtype": problem.parameter_dtype}
    return getattr(package, kind)(problem.shape[1], **options)


def _eager(problem: Problem, device: str) -> nn.Module:
    bn = _layer(nn, problem, device)
    return bn if problem.epilogue == "none" else Chain(bn)


def _native(problem: Problem, device: str) -> nn.Module:
    if device == "cpu":
        raise NotImplementedError("cuDNN takes no part on the CPU: the same as eager")
    return _eager(problem, device)


def _compiled(problem: Problem, device: str) -> nn.Module:
    # Every problem compiles for its own shape: without the reset, the eighth one would be refused.
    torch.compiler.reset()
    options = {"cpp.threads": torch.get_num_threads()}
    return torch.compile(_eager(problem, device), fullgraph=True, dynamic=False, options=options)


def _compiling() -> AbstractContextManager:
    # Donated buffers allow a backward only once from a forward; here it is repeated.
    return torch._functorch.config.patch(donated_buffer=False)


def _bnext(problem: Problem, device: str) -> nn.Module:
    import bnext

    return _layer(bnext, problem, device, activation=None if problem.epilogue == "none" else "relu")


class _ApexGroupNHWC(nn.Module):
    """apex.contrib.groupbn takes tensors of shape (N, H, W, C)."""

    def __init__(self, bn: nn.Module):
        super().__init__()
        self.bn = bn

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        z = () if residual is None else (residual.permute(0, 2, 3, 1),)
        return self.bn(x.permute(0, 2, 3, 1), *z).permute(0, 3, 1, 2)


def _apex(problem: Problem, device: str) -> nn.Module:
    from apex.contrib.groupbn.batch_norm import BatchNorm2d_NHWC

    if (problem.layout, problem.dtype, problem.parameters) != ("channels_last", "float16", "float32"):
        raise NotImplementedError("apex takes float16 channels_last with float32 parameters only")
    if len(problem.shape) != 4:
        raise NotImplementedError("apex takes 4-D input only")
    bn = BatchNorm2d_NHWC(problem.shape[1], fuse_relu=problem.epilogue != "none").to(device)
    bn.eps, bn.momentum = EPS, MOMENTUM
    return _ApexGroupNHWC(bn)


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("bnext", "bnext's layer, its own choice of plan", _bnext),
        Provider("eager", "torch.nn's layer, then + and relu", _eager),
        Provider("native", "the same with cuDNN off", _native, lambda: torch.backends.cudnn.flags(enabled=False)),
        Provider("compile", "the same under torch.compile, for static shapes", _compiled, _compiling),
        Provider("apex", "apex.contrib.groupbn, where it is installed", _apex),
    )
}


def forced(plan: str) -> Provider:
    """bnext with one plan for all shapes; a shape that the plan cannot take is refused."""

    def scope() -> AbstractContextManager[None]:
        import bnext.cuda

        return bnext.cuda.force_plan(plan)

    return Provider(f"bnext:{plan}", f"bnext with plan {plan} forced", _bnext, scope)


def parse_providers(text: str) -> list[Provider]:
    """'bnext,bnext:resident:cluster=4,stages=2,eager' -> three providers: what has a = and no provider in front
    goes on with the plan before it."""
    names: list[str] = []
    for item in text.split(","):
        if names and ":" in names[-1] and "=" in item and ":" not in item:
            names[-1] += f",{item}"
        else:
            names.append(item)
    providers = []
    for name in names:
        family, _, plan = name.partition(":")
        if plan and family == "bnext":
            providers.append(forced(plan))
        elif name in PROVIDERS:
            providers.append(PROVIDERS[name])
        else:
            raise ValueError(f"no provider {name!r}: there are {', '.join(PROVIDERS)} and bnext:PLAN")
    return providers
