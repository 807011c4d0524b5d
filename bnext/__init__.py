"""Batch normalization for PyTorch on hand-written CUDA and CPU kernels.

    model.bn1 = bnext.BatchNorm2d(64, activation="relu")    # in place of nn.BatchNorm2d(64) and nn.ReLU()

The layers are `torch.nn`'s own classes with another forward: checkpoints, `isinstance`, autocast
and `torch.compile` work as before. Importing this package compiles nothing; the compiled
extension is loaded, or compiled where there is none, when the first layer is made or run.
"""

from bnext import cuda, functional, nn, ops, reference
from bnext.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d

__version__ = "0.1.0"

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "cuda", "functional", "nn", "ops", "reference"]
