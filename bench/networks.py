"""Networks as their papers have them, of torch.nn's layers alone, so that torchvision need not be there: what the
benchmarks of whole training steps convert and fuse. Each takes (N, 3, H, W); numbers of parameters are torchvision's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["NETWORKS", "densenet121", "lenet", "mobilenet_v2", "resnet18", "resnet50", "UNet"]


def convolution(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=False)


def head(features: int, classes: int = 1000) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, classes))


# ---- LeNet, with rectifiers


def lenet() -> nn.Sequential:
    """For (N, 3, 32, 32)."""
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 5), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.BatchNorm1d(120), nn.ReLU()),
        *(nn.Linear(120, 84), nn.BatchNorm1d(84), nn.ReLU(), nn.Linear(84, 10)),
    )


# ---- residual networks (He et al., https://arxiv.org/abs/1512.03385)


class Residual(nn.Module):
    """Convolutions of these sizes and widths; the stride is that of the first of 3x3. The shortcut is added before the
    last ReLU."""

    def __init__(self, inputs: int, widths: Sequence[int], sizes: Sequence[int], stride: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before, left = inputs, stride
        for width, size in zip(widths, sizes, strict=True):
            step, left = (left, 1) if size == 3 else (1, left)
            layers += [convolution(before, width, size, step), nn.BatchNorm2d(width), nn.ReLU()]
            before = width
        self.layers = nn.Sequential(*layers[:-1])
        self.shortcut = (
            nn.Sequential(convolution(inputs, before, 1, stride), nn.BatchNorm2d(before))
            if stride > 1 or inputs != before
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layers(x) + self.shortcut(x))


def resnet(blocks: Sequence[int], sizes: Sequence[int], expansion: int) -> nn.Sequential:
    layers: list[nn.Module] = [convolution(3, 64, 7, 2), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for stage, count in enumerate(blocks):
        width = 64 << stage
        widths = [width] * (len(sizes) - 1) + [width * expansion]
        for block in range(count):
            layers.append(Residual(inputs, widths, sizes, 2 if stage and not block else 1))
            inputs = widths[-1]
    return nn.Sequential(*layers, *head(inputs))


def resnet18() -> nn.Sequential:
    return resnet([2, 2, 2, 2], [3, 3], 1)


def resnet50() -> nn.Sequential:
    return resnet([3, 4, 6, 3], [1, 3, 1], 4)


# ---- dense networks (Huang et al., https://arxiv.org/abs/1608.06993)


class Dense(nn.Module):
    """Its input, and 32 more channels."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.BatchNorm2d(inputs), nn.ReLU(), convolution(inputs, 128, 1)),
            *(nn.BatchNorm2d(128), nn.ReLU(), convolution(128, 32, 3)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.layers(x)], 1)


def densenet121() -> nn.Sequential:
    layers: list[nn.Module] = [convolution(3, 64, 7, 2), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for count in (6, 12, 24, 16):
        for _ in range(count):
            layers.append(Dense(channels))
            channels += 32
        if count != 16:
            layers += [nn.BatchNorm2d(channels), nn.ReLU(), convolution(channels, channels // 2, 1), nn.AvgPool2d(2)]
            channels //= 2
    return nn.Sequential(*layers, nn.BatchNorm2d(channels), nn.ReLU(), *head(channels))


# ---- inverted residuals (Sandler et al., https://arxiv.org/abs/1801.04381)


class Inverted(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        layers: list[nn.Module] = []
        if expansion > 1:
            layers += [convolution(inputs, wide, 1), nn.BatchNorm2d(wide), nn.ReLU6()]
        layers += [convolution(wide, wide, 3, stride, groups=wide), nn.BatchNorm2d(wide), nn.ReLU6()]
        self.layers = nn.Sequential(*layers, convolution(wide, outputs, 1), nn.BatchNorm2d(outputs))
        self.same = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.same else self.layers(x)


def mobilenet_v2() -> nn.Sequential:
    layers: list[nn.Module] = [convolution(3, 32, 3, 2), nn.BatchNorm2d(32), nn.ReLU6()]
    channels = 32
    table = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    for expansion, outputs, count, stride in table:
        for i in range(count):
            layers.append(Inverted(channels, outputs, 1 if i else stride, expansion))
            channels = outputs
    return nn.Sequential(*layers, convolution(channels, 1280, 1), nn.BatchNorm2d(1280), nn.ReLU6(), *head(1280))


# ---- U-Net (Ronneberger et al., https://arxiv.org/abs/1505.04597), with batch norm and padding


class UNet(nn.Module):
    """(N, 3, H, W), sizes multiples of 16 -> (N, 2, H, W)."""

    def __init__(self, width: int = 32, depth: int = 4) -> None:
        super().__init__()

        def twice(inputs: int, outputs: int) -> nn.Sequential:
            one = (convolution(inputs, outputs, 3), nn.BatchNorm2d(outputs), nn.ReLU())
            return nn.Sequential(*one, convolution(outputs, outputs, 3), nn.BatchNorm2d(outputs), nn.ReLU())

        widths = [width << i for i in range(depth + 1)]
        self.down = nn.ModuleList(twice(a, b) for a, b in zip([3, *widths], widths, strict=False))
        self.enlarge = nn.ModuleList(nn.ConvTranspose2d(w, w // 2, 2, 2) for w in widths[:0:-1])
        self.up = nn.ModuleList(twice(w, w // 2) for w in widths[:0:-1])
        self.last = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for i, layers in enumerate(self.down):
            x = layers(F.max_pool2d(x, 2) if i else x)
            skips.append(x)
        skips.pop()
        for enlarge, layers in zip(self.enlarge, self.up, strict=True):
            x = layers(torch.cat([skips.pop(), enlarge(x)], 1))
        return self.last(x)


#: A network and the height and width of its images.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "lenet": (lenet, 32),
    "resnet18": (resnet18, 224),
    "resnet50": (resnet50, 224),
    "densenet121": (densenet121, 224),
    "mobilenet_v2": (mobilenet_v2, 224),
    "unet": (UNet, 128),
}
