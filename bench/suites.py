"""What is measured: the batch-norm layers of networks, and shapes that are hard for other reasons."""

from __future__ import annotations

import importlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch


class Layer(NamedTuple):
    """The input of a batch-norm layer without its batch dimension, and how often its network has it."""

    features: tuple[int, ...]  # (C, *spatial)
    count: int


class Workload(NamedTuple):
    """An input's shape, and how often it occurs: sums over a suite are weighted by that."""

    shape: tuple[int, ...]
    count: int


def _layers(inputs: Iterable[tuple[int, ...]]) -> list[Layer]:
    return [Layer(*item) for item in Counter(inputs).items()]


def _resnet50():
    # Stem, then four stages of bottleneck blocks. A stage's first block has its stride in the 3x3
    # convolution, so that its first batch norm still sees the previous stage's size.
    yield 64, 112, 112
    size = 56
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            yield width, size, size
            if block == 0:
                size //= stride
            yield width, size, size
            yield 4 * width, size, size
            if block == 0:
                yield 4 * width, size, size  # the shortcut's


def _resnet18():
    # Input 1x224x224; two basic blocks a stage. The 1x1 convolution of a shortcut has no batch norm.
    yield 64, 112, 112
    for width, size in ((64, 56), (128, 28), (256, 14), (512, 7)):
        yield from 4 * [(width, size, size)]


def _densenet():
    # Input 1x96x96, growth rate 32, four dense blocks of four convolutions, halving transitions.
    yield 64, 48, 48
    channels, size = 64, 24
    for block in range(4):
        for _ in range(4):
            yield channels, size, size
            channels += 32
        yield channels, size, size  # the transition's, or the last one
        if block < 3:
            channels, size = channels // 2, size // 2


def _lenet():
    return [(6, 24, 24), (16, 8, 8), (120,), (84,)]


def _mobilenet():
    # MobileNetV2 on 224x224. Its inverted residuals normalize after the expansion, after the
    # depthwise convolution (which has the stride), and after the projection.
    yield 32, 112, 112
    channels, size = 32, 112
    for expansion, out, blocks, stride in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)
    ):  # fmt: skip
        for block in range(blocks):
            wide = expansion * channels
            if expansion != 1:
                yield wide, size, size
            if block == 0:
                size //= stride
            yield wide, size, size
            yield out, size, size
            channels = out
    yield 1280, size, size


def _r3d18():
    # 3-D ResNet-18 on clips of 16 frames, 112x112: the stem keeps time and halves space.
    channels, frames, size = 64, 16, 56
    yield from 5 * [(channels, frames, size, size)]
    for _ in range(3):
        channels, frames, size = 2 * channels, frames // 2, size // 2
        yield from 5 * [(channels, frames, size, size)]  # two blocks and a shortcut


NETWORKS: dict[str, list[Layer]] = {
    "resnet50": _layers(_resnet50()),
    "resnet18": _layers(_resnet18()),
    "densenet": _layers(_densenet()),
    "lenet": _layers(_lenet()),
    "mobilenet": _layers(_mobilenet()),
    "video": _layers(_r3d18()),
}

# A clip is as much work as several images: video takes an eighth of the batch.
CLIP = 8

# Shapes with a batch dimension of their own.
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "bn1d": [
        (32, 4096), (128, 1024), (1024, 1024), (4096, 512), (2048, 8192), (65536, 64),
        (16, 512, 200), (32, 64, 1000), (64, 256, 128), (8, 80, 3000), (64, 128, 1024),
    ],
    "tiny": [
        (2, 8, 4, 4), (4, 16, 8, 8), (16, 6, 24, 24), (32, 16, 8, 8), (1, 64, 14, 14), (1, 2048, 7, 7),
        (8, 32, 28, 28), (4, 512, 7, 7), (64, 84), (64, 120), (256, 256),
    ],
    "awkward": [
        (7, 13, 17, 19),  # primes
        (31, 127, 7, 7), (13, 67, 7, 7), (64, 513, 7, 7), (64, 30, 14, 14),  # planes of less than whole vectors
        (64, 255, 27, 27), (1, 61, 55, 55), (2, 7, 33, 65), (3, 1021, 3, 3),
        (64, 1, 28, 28), (1, 1, 1009, 1013), (5, 3, 5, 5), (16, 3, 224, 224),  # few channels
        (128, 513, 1, 1), (8, 1000, 1, 1), (257, 131), (1024, 3),  # S = 1
        (2, 3, 1000), (5, 17, 3, 5, 7),
    ],
}  # fmt: skip

SUITES = [*NETWORKS, *SHAPES]


def suite(name: str, batch: int) -> list[Workload]:
    """The workloads of a suite. `batch` is the batch size of networks; other shapes bring their own."""
    if name in SHAPES:
        return [Workload(shape, 1) for shape in SHAPES[name]]
    size = max(1, batch // CLIP) if name == "video" else batch
    return [Workload((size, *layer.features), layer.count) for layer in NETWORKS[name]]


def parse_shapes(text: str) -> list[Workload]:
    """'64x256x56x56,64x64x112x112*3' -> workloads, the second one occurring three times."""
    workloads = []
    for item in text.split(","):
        shape, _, count = item.partition("*")
        try:
            workloads.append(Workload(tuple(int(size) for size in shape.split("x")), int(count or 1)))
        except ValueError:
            raise ValueError(f"{item!r} is no shape: it should look like 64x256x56x56 or 64x256x56x56*3") from None
        if not is_legal(workloads[-1].shape):
            raise ValueError(f"{item!r}: training needs (N, C) or (N, C, ...) and more than one value for each channel")
    return workloads


def is_legal(shape: tuple[int, ...]) -> bool:
    """Whether torch.nn trains on it."""
    return 2 <= len(shape) <= 5 and min(shape) >= 1 and torch.Size(shape).numel() > shape[1]


def model_layers(spec: str, input_shape: tuple[int, ...]) -> list[Workload]:
    """The inputs of the batch-norm layers of a user's model, met in one forward.

    `spec` is module:function. The function returns a model, or a model and the tuple of its inputs;
    a model alone gets one tensor of `input_shape`. It is run on meta tensors, which cost nothing,
    and once more on the CPU if that fails.
    """
    build = _named(spec)
    try:
        return _collect(build, input_shape, "meta")
    except Exception:  # data-dependent models, and operators without a meta kernel
        try:
            return _collect(build, input_shape, "cpu")
        except Exception as error:
            shape = "x".join(map(str, input_shape))
            raise ValueError(f"{spec} does not run on {shape}: {type(error).__name__}: {error}") from error


def _named(spec: str) -> Callable:
    """The function that module:function names, in the working directory or installed."""
    module, _, function = spec.partition(":")
    if not module or not function:
        raise ValueError(f"{spec!r} is not of the form module:function")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        build = getattr(importlib.import_module(module), function, None)
    except Exception as error:
        raise ValueError(f"importing {module} raised {type(error).__name__}: {error}") from error
    if not callable(build):
        raise ValueError(f"module {module} has no function {function!r}")
    return build


def _collect(build, input_shape: tuple[int, ...], device: str) -> list[Workload]:
    seen: Counter[tuple[int, ...]] = Counter()
    with torch.device(device), torch.no_grad():
        model = build()
        model, inputs = model if isinstance(model, tuple) else (model, (torch.zeros(input_shape),))
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"the function returned {type(model).__name__}, no torch.nn.Module")
        for module in model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.register_forward_pre_hook(lambda _, args: seen.update([tuple(args[0].shape)]))
        model.to(device).train()(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in inputs))
    if not seen:
        raise ValueError("the model has no batch-norm layer, or runs none")
    return [Workload(*item) for item in seen.items()]
