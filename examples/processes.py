"""Training in several processes, which torchrun starts; without it there is one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

import bnext

__all__ = ["DataParallel", "joined", "part", "processes", "rank", "synchronised"]


@contextmanager
def joined(device: torch.device) -> Iterator[torch.device]:
    """Joins the group of the processes that torchrun started. Gives this process's device: a GPU of its own."""
    if not dist.is_torchelastic_launched():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def part(batch: Tensor) -> Tensor:
    """This process's part of a batch that all of them have."""
    return batch.tensor_split(processes())[rank()]


def synchronised(network: nn.Module) -> nn.Module:
    """Its batch norms become SyncBatchNorm: bnext's or torch.nn's, as they are. The latter runs on GPUs alone."""
    ours = any(isinstance(layer, bnext.nn._BatchNorm) for layer in network.modules())
    convert = bnext.convert_sync_batchnorm if ours else nn.SyncBatchNorm.convert_sync_batchnorm
    return convert(network)


class DataParallel(nn.parallel.DistributedDataParallel):
    """With SyncBatchNorm on CPUs, too, which torch refuses since its own does not run there: bnext's does."""

    def _passing_sync_batchnorm_handle(self, module: nn.Module) -> None:
        pass
