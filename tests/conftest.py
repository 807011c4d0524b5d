import importlib
import os
import sys

import pytest
import torch


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    """Each test that takes this runs on the CPU and on the GPU; without a GPU that half is skipped."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    return request.param


@pytest.fixture
def library():
    """Imports a library that need not be there: the test is skipped where it does not import. Not pytest.importorskip,
    as torchvision for another torch fails with other errors than ImportError."""

    def load(name: str):
        try:
            return importlib.import_module(name)
        except Exception as error:
            pytest.skip(f"{name} does not import here: {error}")

    return load


@pytest.fixture(autouse=True)
def _same_start():
    """The same random numbers, and one thread: for tensors as small as the tests' own, waiting for a
    second one takes longer than the work. test_repeatability.py shows that results do not depend on it."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def long_ones_first(items: list, is_long, processes: int) -> list:
    """In as many even parts as there are processes, each of which begins with its share of the long ones."""
    long, others = [i for i in items if is_long(i)], [i for i in items if not is_long(i)]
    ordered = []
    for process in range(processes):
        share = long[process::processes]
        count = max(len(items) // processes - len(share), 0)
        ordered += share + others[:count]
        del others[:count]
    return ordered + others


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """pytest-xdist cuts the list into a part for each process, and later moves tests to those that are done. None is to
    begin a test of minutes when the others have nothing left to do. One process keeps to the files' order."""
    processes = getattr(config, "workerinput", {}).get("workercount", 1)
    if processes > 1:
        items[:] = long_ones_first(items, lambda item: item.get_closest_marker("long"), processes)


def gpu_is_broken() -> bool:
    """Whether a kernel of this process did what no call after it recovers from."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """In a worker of pytest-xdist, a test that broke the GPU ends the process, and the next tests get another one."""
    report = yield
    if report.failed and hasattr(item.config, "workerinput") and gpu_is_broken():
        print(f"\n{item.nodeid} broke the GPU of its process:\n{report.longreprtext}", file=sys.__stderr__, flush=True)
        os._exit(1)
    return report
