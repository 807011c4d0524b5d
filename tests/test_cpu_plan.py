"""How csrc/cpu/plan.h shares out work: for any number of threads, though no plan knows it. Without torch's threads: the
shares are worked out from the plan."""

import math
import subprocess
from pathlib import Path

import pytest
from compiler import cxx

from bench.suites import NETWORKS, suite

ROOT = Path(__file__).parent.parent
#: What a second thread is not worth: kOneThread of plan.cpp.
ONE_THREAD = 32768


def shapes():
    """(n, c, s) of all networks' layers, and some that are odd."""
    layers = [workload.shape for name in NETWORKS for batch in (8, 32) for workload in suite(name, batch)]
    found = [(n, c, math.prod(spatial)) for n, c, *spatial in layers]
    odd = [
        (64, 24, 729),
        (7, 1, 1009),
        (3, 3, 50176),
        (1, 2, 400000),
        (31, 127, 49),
        (5, 4096, 1),
        (2, 17, 17),
        (8, 2048, 9),
        (3, 1021, 9),
        (1, 1, 1),
        (70, 37, 25),
        (256, 32, 49),
    ]
    return list(dict.fromkeys([*found, *odd]))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    compiler = cxx()
    program = tmp_path_factory.mktemp("cpu_plan") / "cpu_plan"
    sources = [ROOT / "tests" / "cpu_plan.cpp", ROOT / "csrc" / "cpu" / "plan.cpp"]
    subprocess.run([compiler, "-std=c++17", "-O1", *map(str, sources), "-o", str(program)], check=True)

    def of(layout, shape):
        """For each pass over the tensor, the elements of each of its tasks."""
        lines = subprocess.run([program, layout, *map(str, shape)], capture_output=True, text=True, check=True).stdout
        return {name: list(map(int, sizes)) for name, *sizes in map(str.split, lines.splitlines())}

    return of


def test_an_empty_tensor_has_no_tasks(tasks):
    for layout in ("planar", "interleaved"):
        for shape in ((0, 3, 5), (2, 0, 5), (2, 3, 0)):
            assert tasks(layout, shape) == {"reduce": [], "apply": []}


def largest_share(sizes, threads):
    """As at::parallel_for shares them out: equal numbers of tasks, next to each other."""
    each = math.ceil(len(sizes) / min(threads, len(sizes)))
    return max(sum(sizes[i : i + each]) for i in range(0, len(sizes), each))


@pytest.mark.parametrize("layout", ["planar", "interleaved"])
def test_tasks_cover_a_shape_and_share_out_evenly(tasks, layout):
    uneven, ratios = [], {threads: [] for threads in (2, 3, 4, 8, 16, 64)}
    for shape in shapes():
        numel = math.prod(shape)
        for name, sizes in tasks(layout, shape).items():
            assert sum(sizes) == numel, (shape, name)
            assert name != "apply" or len(sizes) == 1 or numel > ONE_THREAD, shape
            for threads, of_threads in ratios.items():
                ideal = max(numel / threads, ONE_THREAD)
                ratio = min(1.0, ideal / largest_share(sizes, threads))
                of_threads.append(ratio)
                if threads <= 16 and ratio < 0.55:
                    uneven.append((shape, name, threads, ratio))
    # A task owns whole channels where there are 16 or more, which 64 threads feel.
    assert not uneven
    means = {threads: sum(of_threads) / len(of_threads) for threads, of_threads in ratios.items()}
    assert min(mean for threads, mean in means.items() if threads <= 16) > 0.93, means
    assert means[64] > 0.85, means


def test_the_cache_is_the_one_that_linux_reports(tmp_path):
    """sysconf() tells of the host's, where the processor is a virtual one."""
    said = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    if not said.exists():
        pytest.skip("no third-level cache in sysfs")
    size = min(int(said.read_text().strip().removesuffix("K")) << 10, 64 << 20)
    main = tmp_path / "main.cpp"
    main.write_text(
        f'#include "{ROOT / "csrc" / "cpu" / "cache.h"}"\n'
        f"int main() {{ return bnext::cpu::exceeds_cache({size}) || !bnext::cpu::exceeds_cache({size + 1}); }}\n"
    )
    sources = [str(main), str(ROOT / "csrc" / "cpu" / "cache.cpp")]
    subprocess.run([cxx(), "-std=c++17", *sources, "-o", tmp_path / "main"], check=True)
    assert subprocess.run([tmp_path / "main"]).returncode == 0
