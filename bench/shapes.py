"""The batch-norm layers of well-known networks: the shapes that plans and benchmarks are judged by."""

from __future__ import annotations

from typing import NamedTuple


class Layer(NamedTuple):
    """A batch-norm layer's input without its batch dimension, and how often the network has it."""

    channels: int
    size: int  # height and width; 0 for (N, C) inputs
    count: int

    def input(self, batch: int) -> tuple[int, ...]:
        return (batch, self.channels, self.size, self.size) if self.size else (batch, self.channels)


def _resnet50() -> list[Layer]:
    # Stem, then four stages of bottleneck blocks. A stage's first block has its stride in the 3x3
    # convolution, so that its first batch norm still sees the previous stage's size.
    layers = [Layer(64, 112, 1)]
    size = 56
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        out = size // stride
        if stride == 1:
            layers += [Layer(width, size, 2 * blocks)]
        else:
            layers += [Layer(width, size, 1), Layer(width, out, 2 * blocks - 1)]
        layers += [Layer(4 * width, out, blocks + 1)]  # and the shortcut's
        size = out
    return layers


# Input 1x224x224; two basic blocks a stage, and a shortcut's batch norm where the shape changes is
# left out: the 1x1 convolution there has none.
_RESNET18 = [Layer(64, 112, 1), Layer(64, 56, 4), Layer(128, 28, 4), Layer(256, 14, 4), Layer(512, 7, 4)]


def _densenet() -> list[Layer]:
    # Input 1x96x96, growth rate 32, four dense blocks of four convolutions, halving transitions.
    layers = [Layer(64, 48, 1)]
    channels, size = 64, 24
    for block in range(4):
        for _ in range(4):
            layers.append(Layer(channels, size, 1))
            channels += 32
        layers.append(Layer(channels, size, 1))  # the transition's, or the last one
        if block < 3:
            channels, size = channels // 2, size // 2
    return layers


NETWORKS: dict[str, list[Layer]] = {
    "resnet50": _resnet50(),
    "resnet18": _RESNET18,
    "densenet": _densenet(),
    "lenet": [Layer(6, 24, 1), Layer(16, 8, 1), Layer(120, 0, 1), Layer(84, 0, 1)],
}
