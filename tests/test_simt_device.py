"""The device that executes CUDA kernels on the CPU (tests/simt) catches the mistakes that it is there for.

Each kernel of tests/simt/litmus.cu plants one mistake. The wrong kernel must end with the report that
names it, in every mode that can see it; its twin without the mistake must pass in every mode and order.
tests/simt/limits.cu launches what a driver refuses, and what it just allows.
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
COPY = "simt: copy: "
POISON = "AddressSanitizer: use-after-poison"
RESULT = "wrong result"


def all_modes(report):
    return dict.fromkeys(build.MODES, report)


# Kernel: what is reported in the modes that are sure to see it.
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
    # asynchronous copies
    "copies_no_wait": {"plain": RESULT, "sanitize": RESULT, "race": UNWRITTEN},
    "copies_short_wait": {"plain": RESULT, "sanitize": RESULT, "race": UNWRITTEN},
    "copies_no_barrier": {"race": UNORDERED},
    "copies_reused": {"plain": RESULT, "sanitize": RESULT, "race": UNORDERED},
    "copies_twice": all_modes(COPY),
    "copies_left": all_modes(COPY),
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
    """Exit status and output of the kernels; seed 0 runs blocks and threads in order, others at random."""
    executable = build.build("litmus", mode, [build.SIMT / "litmus.cu"])
    env = os.environ | {"SIMT_SEED": str(seed)}
    done = subprocess.run([executable, *arguments], capture_output=True, text=True, timeout=900, env=env)
    return done.returncode, done.stdout + done.stderr


def test_sanitize_sees_what_plain_does():
    """So that kernels that run in sanitize mode need not run in plain."""
    assert all("sanitize" in modes for modes in MISTAKES.values() if "plain" in modes)


@pytest.mark.parametrize("mode, kernel", [(mode, kernel) for kernel in MISTAKES for mode in MISTAKES[kernel]])
def test_mistake_is_reported(mode, kernel):
    for seed in range(3):
        status, output = run(mode, "wrong", kernel, seed=seed)
        report = MISTAKES[kernel][mode]
        assert status != 0 and re.search(report, output), f"seed {seed}: expected {report!r}, got:\n{output}"


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("mode", build.MODES)
def test_right_kernels_pass(mode, seed):
    status, output = run(mode, "right", seed=seed)
    passed = re.findall(r"^(\w+): ok$", output, re.M)
    assert status == 0 and set(passed) > set(MISTAKES), output


#: Each with a launch that violates it and one that just keeps to it.
LIMITS = {
    "carveout",
    "cluster_divides_the_grid",
    "cluster_room",
    "cluster_size",
    "clusters_before_9_0",
    "cooperative_registers",
    "cooperative_shared",
    "cooperative_threads",
    "empty_grid",
    "grid_too_large",
    "launch_bounds",
    "launch_bounds_are_known",
    "no_kernel",
    "occupancy_of_blocks",
    "opt_in_is_of_a_device",
    "overlap_before_9_0",
    "refuses_clusters",
    "refuses_cooperative",
    "shared_with_opt_in",
    "shared_without_opt_in",
    "static_shared_is_known",
    "threads_of_a_block",
}


@pytest.mark.parametrize("mode", build.MODES)
def test_launches_meet_the_limits_of_a_driver(mode):
    executable = build.build("limits", mode, [build.SIMT / "limits.cu"])
    done = subprocess.run([executable], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(re.findall(r"^(\w+): ok$", done.stdout, re.M)) == LIMITS


#: What code for an older architecture does not have.
TRAPS = {
    "old_code_syncs_a_cluster": "calls cluster_sync at .*, a barrier of its cluster",
    "old_code_maps_shared": "maps shared memory of its cluster",
    "old_code_waits": "waits for the kernel that its launch overlaps",
    "old_code_copies": "copies while it goes on",
}


@pytest.mark.parametrize("mode", build.MODES)
@pytest.mark.parametrize("kernel", TRAPS)
def test_code_for_an_older_architecture_traps(kernel, mode):
    status, output = run(mode, "wrong", kernel)
    code = "7.5" if kernel == "old_code_copies" else "8.0"
    assert status != 0 and re.search(f"simt: trap: .* {TRAPS[kernel]}, but its code is for .* {code}", output), output


def test_the_device_knows_nothing_of_bnext():
    for path in sorted((build.ROOT / build.SIMT).glob("*")):
        if path.is_file():
            assert "bnext" not in path.read_text().lower(), path


def test_race_names_both_accesses():
    """Kernel, block, thread, variable, and the source lines of the two."""
    source = (build.ROOT / build.SIMT / "litmus.cu").read_text().splitlines()
    write = 1 + source.index("  partial[i] = x[i];")
    read = 1 + next(i for i, text in enumerate(source) if "y[k] = partial[" in text)
    _, output = run("race", "wrong", "last_block_no_release")
    for expected in (
        "thread (0,0,0) of block (7,0,0) reads 4 bytes, ",
        "into 'partial' of 256 bytes; thread (7,0,0) of block (6,0,0) writes it",
        f"litmus.cu:{write}",
        f"litmus.cu:{read}",
        "last_block_kernel",
    ):
        assert expected in output, output


@pytest.mark.parametrize("mode", build.MODES)
def test_deadlock_says_who_waits_where(mode):
    _, output = run(mode, "wrong", "spin")
    assert re.search(r"2 threads, as thread .* in __nanosleep\n.*litmus\.cu:\d+", output), output
    assert re.search(r"62 threads, as thread .* in __syncthreads\n.*litmus\.cu:\d+", output), output


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
