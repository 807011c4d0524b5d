"""Calls that type checkers have to reject: each line marked `# wrong`, and no other."""

from __future__ import annotations

import torch

import bnext
from bnext._extension import extension
from bnext.functional import batch_norm

x = torch.randn(2, 3, 4, 4)
layer = bnext.BatchNorm2d(3)

bnext.BatchNorm2d(3, activation="rleu")  # wrong: no such activation
bnext.BatchNorm2d(3, momentun=0.2)  # wrong: no such argument
bnext.BatchNorm2d(3, 1e-5, 0.1, True, True, None, None, "relu")  # wrong: activation is a keyword
layer.activation = "rleu"  # wrong: no such activation
layer(x, residual=True)  # wrong: the residual is a tensor
bnext.SyncBatchNorm(3, activation="rleu")  # wrong: no such activation
batch_norm(x, None, None, activation=True)  # wrong: an activation is a name
bnext.ops.batch_norm_stats(x, x)  # wrong: one tensor
y: int = layer(x)  # wrong: a tensor
extension().force_plan(2)  # wrong: a plan is a name
extension().forward(x)  # wrong: no such function
