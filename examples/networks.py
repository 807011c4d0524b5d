"""LeNet, ResNet-18 and DenseNet, each over the normalization layers of a module of your choice:
`torch.nn`, or `bnext`, whose layers take the same arguments and the same state dict.
"""

from __future__ import annotations

from collections import OrderedDict
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LeNet(nn.Sequential):
    """(N, 1, 28, 28) -> (N, 10). Without normalization where `layers` is None."""

    def __init__(self, layers: ModuleType | None):
        def norm1d(channels: int) -> list[nn.Module]:
            return [layers.BatchNorm1d(channels)] if layers else []

        def norm2d(channels: int) -> list[nn.Module]:
            return [layers.BatchNorm2d(channels)] if layers else []

        super().__init__(
            *(nn.Conv2d(1, 6, 5), *norm2d(6), nn.Sigmoid(), nn.MaxPool2d(2)),
            *(nn.Conv2d(6, 16, 5), *norm2d(16), nn.Sigmoid(), nn.MaxPool2d(2)),
            nn.Flatten(),
            *(nn.Linear(256, 120), *norm1d(120), nn.Sigmoid()),
            *(nn.Linear(120, 84), *norm1d(84), nn.Sigmoid()),
            nn.Linear(84, 10),
        )


class ResidualBlock(nn.Module):
    """conv-BN-ReLU-conv-BN, the shortcut added, ReLU."""

    def __init__(self, layers: ModuleType, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride)
        self.norm1 = layers.BatchNorm2d(outputs)
        self.norm2 = layers.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class FusedResidualBlock(ResidualBlock):
    """The same function, parameters and names; bnext's layers add the shortcut and apply ReLU in
    the kernel that normalizes, which saves two thirds of the block's element-wise memory traffic."""

    def __init__(self, layers: ModuleType, inputs: int, outputs: int, stride: int = 1):
        super().__init__(layers, inputs, outputs, stride)
        self.norm1 = layers.BatchNorm2d(outputs, activation="relu")
        self.norm2 = layers.BatchNorm2d(outputs, activation="relu")

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x))
        return self.norm2(self.conv2(y), residual=self.shortcut(x))


class ResNet18(nn.Sequential):
    """(N, 1, 224, 224) -> (N, 10), in stages."""

    def __init__(self, layers: ModuleType, block: type[ResidualBlock] = ResidualBlock):
        def stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            return nn.Sequential(block(layers, inputs, outputs, stride), block(layers, outputs, outputs))

        super().__init__(
            OrderedDict(
                stem=nn.Sequential(nn.Conv2d(1, 64, 7, 2, padding=3), layers.BatchNorm2d(64), nn.ReLU()),
                pool=nn.MaxPool2d(3, 2, padding=1),
                stage1=stage(64, 64, 1),
                stage2=stage(64, 128, 2),
                stage3=stage(128, 256, 2),
                stage4=stage(256, 512, 2),
                head=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)),
            )
        )


class DenseBlock(nn.Module):
    """BN-ReLU-conv, several times, each on all that came before it."""

    def __init__(self, layers: ModuleType, convolutions: int, inputs: int, growth: int):
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Sequential(
                layers.BatchNorm2d(inputs + i * growth),
                nn.ReLU(),
                nn.Conv2d(inputs + i * growth, growth, 3, padding=1),
            )
            for i in range(convolutions)
        )

    def forward(self, x: Tensor) -> Tensor:
        for convolution in self.convolutions:
            x = torch.cat((x, convolution(x)), dim=1)
        return x


def transition(layers: ModuleType, inputs: int, outputs: int) -> nn.Sequential:
    """Fewer channels, half the size."""
    return nn.Sequential(layers.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, outputs, 1), nn.AvgPool2d(2))


class DenseNet(nn.Sequential):
    """(N, 1, 96, 96) -> (N, 10), in stages."""

    def __init__(self, layers: ModuleType, growth: int = 32, blocks: tuple[int, ...] = (4, 4, 4, 4)):
        channels = 64
        stages: OrderedDict[str, nn.Module] = OrderedDict(
            stem=nn.Sequential(
                nn.Conv2d(1, channels, 7, 2, padding=3),
                layers.BatchNorm2d(channels),
                nn.ReLU(),
                nn.MaxPool2d(3, 2, padding=1),
            )
        )
        for i, convolutions in enumerate(blocks, start=1):
            stages[f"block{i}"] = DenseBlock(layers, convolutions, channels, growth)
            channels += convolutions * growth
            if i < len(blocks):
                stages[f"transition{i}"] = transition(layers, channels, channels // 2)
                channels //= 2
        stages["head"] = nn.Sequential(
            layers.BatchNorm2d(channels),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels, 10),
        )
        super().__init__(stages)
