"""Batch normalization for PyTorch on hand-written CUDA and CPU kernels.

    >>> import torch, bnext
    >>> norm = bnext.BatchNorm2d(64, activation="relu")    # in place of nn.BatchNorm2d(64) and nn.ReLU()
    >>> norm(torch.randn(8, 64, 14, 14)).shape
    torch.Size([8, 64, 14, 14])

The layers are `torch.nn`'s own classes with another forward: checkpoints, `isinstance`, autocast
and `torch.compile` work as before. Importing this package compiles nothing; the compiled
extension is loaded, or compiled where there is none, when the first layer is made or run.

A model that is not to be rewritten runs on the same kernels, without fusion, where they take the place
of torch's own:

    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), torch.nn.BatchNorm2d(64))
    >>> with bnext.enable():
    ...     y = model(torch.randn(8, 3, 14, 14))
"""

import re
import sys

__version__ = "0.1.0"

__all__ = [
    "Activation",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "SyncBatchNorm",
    "activation",
    "conversion",
    "convert",
    "convert_sync_batchnorm",
    "cuda",
    "disable",
    "enable",
    "explain",
    "freeze",
    "functional",
    "fuse",
    "hold_statistics",
    "is_enabled",
    "keras",
    "kernels_run",
    "masked",
    "memory",
    "nn",
    "ops",
    "recompute",
    "reference",
    "revert",
    "switch",
    "sync",
    "unfreeze",
    "update_once",
    "update_statistics",
]

# `python -m bnext.doctor` imports this first, and has to run where what is below does not import. Python's
# own options come before the module's name, whose place follows from what comes after it: sys.argv begins
# with one entry for the program. "-m" may be a part of the same argument, as in -umbnext.doctor.
_program = sys.orig_argv[-len(sys.argv) :][:1]
if not any(re.fullmatch(r"(-\w*m)?bnext\.doctor", argument) for argument in _program):
    from bnext import activation, conversion, cuda, functional, keras, nn, ops, reference, switch, sync
    from bnext.activation import Activation
    from bnext.checkpointing import hold_statistics, update_once
    from bnext.conversion import convert, convert_sync_batchnorm, revert
    from bnext.explanation import explain
    from bnext.footprint import memory
    from bnext.fusion import fuse
    from bnext.nn import (
        BatchNorm1d,
        BatchNorm2d,
        BatchNorm3d,
        LazyBatchNorm1d,
        LazyBatchNorm2d,
        LazyBatchNorm3d,
    )
    from bnext.padding import masked
    from bnext.recomputation import recompute
    from bnext.statistics import freeze, unfreeze, update_statistics
    from bnext.switch import disable, enable, is_enabled, kernels_run
    from bnext.sync import SyncBatchNorm
