"""LeNet, ResNet-18 and DenseNet, of torch.nn's layers alone; `without_norms` takes the batch norms out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Network = TypeVar("Network", bound=nn.Module)


def without_norms(network: Network) -> Network:
    """Puts an identity in the place of each batch norm of `network`, which is changed."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                setattr(module, name, nn.Identity())
    return network


class LeNet(nn.Sequential):
    """(N, channels, size, size) -> (N, classes)."""

    def __init__(self, channels: int = 1, classes: int = 10, size: int = 28) -> None:
        side = ((size - 4) // 2 - 4) // 2
        super().__init__(
            *(nn.Conv2d(channels, 6, 5), nn.BatchNorm2d(6), nn.Sigmoid(), nn.MaxPool2d(2)),
            *(nn.Conv2d(6, 16, 5), nn.BatchNorm2d(16), nn.Sigmoid(), nn.MaxPool2d(2)),
            nn.Flatten(),
            *(nn.Linear(16 * side**2, 120), nn.BatchNorm1d(120), nn.Sigmoid()),
            *(nn.Linear(120, 84), nn.BatchNorm1d(84), nn.Sigmoid()),
            nn.Linear(84, classes),
        )


class ResidualBlock(nn.Module):
    """conv-BN-ReLU-conv-BN, the shortcut added, ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.norm2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet18(nn.Sequential):
    """(N, channels, size, size) -> (N, classes), for any size; in stages."""

    def __init__(self, channels: int = 1, classes: int = 10) -> None:
        def stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            return nn.Sequential(ResidualBlock(inputs, outputs, stride), ResidualBlock(outputs, outputs))

        super().__init__(
            OrderedDict(
                stem=nn.Sequential(nn.Conv2d(channels, 64, 7, 2, padding=3), nn.BatchNorm2d(64), nn.ReLU()),
                pool=nn.MaxPool2d(3, 2, padding=1),
                stage1=stage(64, 64, 1),
                stage2=stage(64, 128, 2),
                stage3=stage(128, 256, 2),
                stage4=stage(256, 512, 2),
                head=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes)),
            )
        )


class DenseBlock(nn.Module):
    """BN-ReLU-conv, several times, each on all that came before it."""

    def __init__(self, convolutions: int, inputs: int, growth: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(inputs + i * growth),
                nn.ReLU(),
                nn.Conv2d(inputs + i * growth, growth, 3, padding=1),
            )
            for i in range(convolutions)
        )

    def forward(self, x: Tensor) -> Tensor:
        for convolution in self.convolutions:
            x = torch.cat((x, convolution(x)), dim=1)
        return x


def transition(inputs: int, outputs: int) -> nn.Sequential:
    """Fewer channels, half the size."""
    return nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, outputs, 1), nn.AvgPool2d(2))


class DenseNet(nn.Sequential):
    """(N, channels, size, size) -> (N, classes), for sizes from 32 on; in stages."""

    def __init__(
        self, channels: int = 1, classes: int = 10, growth: int = 32, blocks: tuple[int, ...] = (4, 4, 4, 4)
    ) -> None:
        width = 64
        stages: OrderedDict[str, nn.Module] = OrderedDict(
            stem=nn.Sequential(
                nn.Conv2d(channels, width, 7, 2, padding=3),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.MaxPool2d(3, 2, padding=1),
            )
        )
        for i, convolutions in enumerate(blocks, start=1):
            stages[f"block{i}"] = DenseBlock(convolutions, width, growth)
            width += convolutions * growth
            if i < len(blocks):
                stages[f"transition{i}"] = transition(width, width // 2)
                width //= 2
        stages["head"] = nn.Sequential(
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(width, classes),
        )
        super().__init__(stages)


#: What makes a network for (channels, classes, size), and the smallest size that it takes.
NETWORKS: dict[str, tuple[Callable[[int, int, int], nn.Module], int]] = {
    "lenet": (LeNet, 16),
    "resnet18": (lambda channels, classes, size: ResNet18(channels, classes), 1),
    "densenet": (lambda channels, classes, size: DenseNet(channels, classes), 32),
}
