"""Processes that run functions together, over gloo: started once, since each has to import torch."""

from __future__ import annotations

import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


class Processes:
    """Calls functions in every one of `size` processes, each with its rank first.

    The functions and their arguments are pickled: the former are those of a module, the latter hold no tensors.
    """

    def __init__(self, size: int):
        self._size = size
        self._start()

    def _start(self):
        context = torch.multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        store = f"file://{Path(self._folder.name) / 'store'}"
        self._pipes, self._processes = [], []
        for rank in range(self._size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, store, rank, self._size), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def __call__(self, function, *arguments, seconds=120):
        """What each of them returns, in the order of ranks. The time limit is for what never ends."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, arguments))
        results, errors = [], []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(seconds):
                self.close()
                raise AssertionError(f"process {rank} does not return from {function.__name__}\n" + "\n".join(errors))
            error, result = pipe.recv()
            results.append(result)
            if error:
                errors.append(f"in process {rank}:\n{error}")
        if errors:
            self.close()  # what one has not done the others would wait for in the next call
            raise AssertionError("\n".join(errors))
        return results

    def close(self):
        for process in self._processes:
            process.kill()
            process.join()
        self._pipes, self._processes = [], []
        self._folder.cleanup()


def _serve(pipe, store, rank, size):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=20))
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        torch.manual_seed(0)
        try:
            pipe.send((None, function(rank, *arguments)))
        except Exception:
            pipe.send((traceback.format_exc(), None))
