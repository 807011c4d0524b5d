"""How exact, and how repeatable: bnext beside torch.nn, on the CPU and on a GPU where there is one.

    python -m examples.accuracy

The errors are of the batch's mean and variance, as the layer leaves them in its buffers, and of the
output, against the same computation in extended precision (float64 for the output), in units in the last
place of float32: the largest over all channels. Data are normal deviates around a mean of so many deviations.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

import bnext

RATIOS = (0, 1e2, 1e3, 1e4)
THREADS = (1, 2, 3, 8)
SHAPE = (16, 32, 56, 56)


LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def data(ratio: float, layout: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SHAPE, generator=generator, dtype=torch.float64) + ratio
    return x.float().contiguous(memory_format=LAYOUTS[layout])


def ulps(actual: Tensor, exact: np.ndarray, size: np.ndarray | None = None) -> float:
    """The largest error, in units in the last place of `size`, which is the result itself if not given."""
    spacing = np.spacing(np.abs(exact if size is None else size).astype(np.float32))
    return float((np.abs(actual.cpu().numpy().astype(np.longdouble) - exact) / spacing).max())


def errors(layers: ModuleType, x: Tensor, device: str) -> tuple[float, float]:
    """Of the mean and of the variance, in ulp. momentum=1 leaves the batch's own in the buffers."""
    layer = layers.BatchNorm2d(x.shape[1], momentum=1.0, device=device)
    layer(x.to(device))
    exact = x.double().numpy().astype(np.longdouble)
    mean, var = exact.mean((0, 2, 3)), exact.var((0, 2, 3), ddof=1)
    # Around 0, where summands cancel, nothing is left of them but their rounding: its size is theirs.
    size = np.maximum(np.abs(mean), np.abs(exact).mean((0, 2, 3)))
    return ulps(layer.running_mean, mean, size), ulps(layer.running_var, var)


def bits(layers: ModuleType, x: Tensor) -> list[Tensor]:
    """All that a training step computes on the CPU."""
    x = x.clone().requires_grad_()
    layer = layers.BatchNorm2d(x.shape[1])
    y = layer(x)
    y.backward(x.detach().cos())
    return [y, x.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var]


def same_bits(layers: ModuleType, layout: str) -> bool:
    """Whether a training step on the CPU gives the same bits for each of THREADS."""
    x, before = data(0, layout), torch.get_num_threads()
    try:
        results = []
        for threads in THREADS:
            torch.set_num_threads(threads)
            results.append(bits(layers, x))
    finally:
        torch.set_num_threads(before)
    return all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def table() -> str:
    lines = ["Largest error, in ulp of float32            torch.nn              bnext"]
    lines += ["device  layout         |mean| / std      mean  variance        mean  variance"]
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        for layout in LAYOUTS:
            for ratio in RATIOS:
                x = data(ratio, layout)
                figures = [figure for layers in (nn, bnext) for figure in errors(layers, x, device)]
                row = "{:6}  {:13}  {:12g}  {:8.1f}  {:8.1f}    {:8.1f}  {:8.1f}"
                lines.append(row.format(device, layout, ratio, *figures))
    lines += ["", f"A training step on {', '.join(map(str, THREADS))} threads: the same bits?"]
    answers = [
        [f"{layout}: {'yes' if same_bits(layers, layout) else 'no'}" for layout in LAYOUTS] for layers in (nn, bnext)
    ]
    lines += [f"{name:8}  {', '.join(answer)}" for name, answer in zip(("torch.nn", "bnext"), answers, strict=True)]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
