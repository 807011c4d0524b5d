"""The device that executes CUDA kernels on the CPU (tests/simt) catches the mistakes that it is there for.

Each toy kernel of tests/simt/toys.cu plants one mistake. The wrong kernel must end with the report that
names it, in every mode that can see it; its twin without the mistake must pass in every mode and order.
"""

import os
import re
import subprocess

import pytest

from tests.simt import build

pytestmark = pytest.mark.slow

RACE = "simt: race: "
UNWRITTEN = "simt: uninitialised read: "
UNORDERED = "simt: (race|uninitialised read): "  # which of the two depends on who runs first
BOUNDS = "simt: out of bounds: "
DIVERGENCE = "simt: divergence: "
EXITED = "simt: exited thread: "
MASK = "simt: wrong mask: "
DEADLOCK = "simt: deadlock: "
POISON = "AddressSanitizer: use-after-poison"
RESULT = "wrong result"


def all_modes(report):
    return dict.fromkeys(build.MODES, report)


# Toy: what is reported in the modes that are sure to see it.
MISTAKES = {
    # shared memory
    "missing_barrier": {"race": UNORDERED},
    "reused_shared": {"race": RACE},
    "uninitialised": {"plain": RESULT, "sanitize": RESULT, "race": UNWRITTEN},
    "left_over": {"plain": RESULT, "sanitize": RESULT, "race": UNWRITTEN},
    "shared_bound": {"sanitize": POISON, "race": BOUNDS},
    "array_bound": {"sanitize": r"index 64 out of bounds for type 'float ?\[64\]'", "race": BOUNDS},
    # barriers
    "divergent_barrier": all_modes(DIVERGENCE),
    "barrier_against_shuffle": all_modes(DIVERGENCE),
    "exited_thread": all_modes(EXITED),
    "spin": all_modes(DEADLOCK),
    # warps
    "shuffle_half_arrive": all_modes(EXITED),
    "shuffle_without_self": all_modes(MASK),
    "shuffle_disagree": all_modes(MASK),
    "shuffle_too_narrow": all_modes(MASK),
    "shuffle_exited": all_modes(EXITED),
    "warp_exchange": {"race": UNORDERED},
    # global memory
    "read_bound": {"sanitize": POISON, "race": BOUNDS},
    "write_bound": {"plain": BOUNDS, "sanitize": POISON, "race": BOUNDS},
    "misaligned": {"sanitize": "misaligned address", "race": "simt: misaligned access: "},
    # between blocks
    "blocks_collide": {"race": RACE},
    "last_block_no_release": {"race": RACE},
    "last_block_block_release": {"race": RACE},
    "last_block_no_acquire": {"race": RACE},
    "grid_barrier_no_release": {"race": RACE},
    "grid_barrier_no_acquire": {"race": RACE},
    "cluster_no_barrier": {"race": UNORDERED},
    "cluster_leaves_early": {"race": "simt: exited block: "},
    "early_access": {"race": "simt: overlap: "},
}


def run(mode, *arguments, seed=0):
    """Exit status and output of the toys; seed 0 runs blocks and threads in order, others at random."""
    executable = build.build("toys", mode, [build.SIMT / "toys.cu"])
    env = os.environ | {"SIMT_SEED": str(seed)}
    done = subprocess.run([executable, *arguments], capture_output=True, text=True, timeout=120, env=env)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("mode, toy", [(mode, toy) for toy in MISTAKES for mode in MISTAKES[toy]])
def test_mistake_is_reported(mode, toy):
    for seed in range(3):
        status, output = run(mode, "wrong", toy, seed=seed)
        report = MISTAKES[toy][mode]
        assert status != 0 and re.search(report, output), f"seed {seed}: expected {report!r}, got:\n{output}"


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("mode", build.MODES)
def test_right_kernels_pass(mode, seed):
    status, output = run(mode, "right", seed=seed)
    passed = re.findall(r"^(\w+): ok$", output, re.M)
    assert status == 0 and set(passed) > set(MISTAKES), output


def test_race_names_both_accesses():
    """Kernel, block, thread, variable, and the source lines of the two."""
    source = (build.ROOT / build.SIMT / "toys.cu").read_text().splitlines()
    write = 1 + source.index("  partial[i] = x[i];")
    read = 1 + next(i for i, text in enumerate(source) if "y[k] = partial[" in text)
    _, output = run("race", "wrong", "last_block_no_release")
    for expected in (
        "thread (0,0,0) of block (7,0,0) reads 4 bytes, ",
        "into 'partial' of 256 bytes; thread (7,0,0) of block (6,0,0) writes it",
        f"toys.cu:{write}",
        f"toys.cu:{read}",
        "last_block_kernel",
    ):
        assert expected in output, output


@pytest.mark.parametrize("mode", build.MODES)
def test_deadlock_says_who_waits_where(mode):
    _, output = run(mode, "wrong", "spin")
    assert re.search(r"2 threads, as thread .* in __nanosleep\n.*toys\.cu:\d+", output), output
    assert re.search(r"62 threads, as thread .* in __syncthreads\n.*toys\.cu:\d+", output), output


def test_order_depends_on_the_seed_alone():
    """The same seed gives the same first report; other seeds give others."""
    first = [run("race", "wrong", "missing_barrier", seed=seed) for seed in range(4)]
    assert first == [run("race", "wrong", "missing_barrier", seed=seed) for seed in range(4)]
    assert len(set(first)) > 1


def test_build_failure_shows_the_compiler(tmp_path):
    source = tmp_path / "broken.cu"
    source.write_text("__global__ void kernel() { undeclared(); }\n")
    with pytest.raises(build.BuildError, match="undeclared"):
        build.build("broken", "plain", [source])
