"""Batch normalization for PyTorch on hand-written CUDA and CPU kernels.

    >>> import torch, bnext
    >>> norm = bnext.BatchNorm2d(64, activation="relu")    # in place of nn.BatchNorm2d(64) and nn.ReLU()
    >>> norm(torch.randn(8, 64, 14, 14)).shape
    torch.Size([8, 64, 14, 14])

The layers are `torch.nn`'s own classes with another forward: checkpoints, `isinstance`, autocast
and `torch.compile` work as before. Importing this package compiles nothing; the compiled
extension is loaded, or compiled where there is none, when the first layer is made or run.
"""

import sys

__version__ = "0.1.0"

__all__ = [
    "Activation",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "SyncBatchNorm",
    "activation",
    "convert_sync_batchnorm",
    "cuda",
    "functional",
    "nn",
    "ops",
    "reference",
    "sync",
]

# `python -m bnext.doctor` imports this first, and has to run where what is below does not import.
if not any(argument.endswith("bnext.doctor") for argument in sys.orig_argv[1:3]):
    from bnext import activation, cuda, functional, nn, ops, reference, sync
    from bnext.activation import Activation
    from bnext.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d
    from bnext.sync import SyncBatchNorm, convert_sync_batchnorm
