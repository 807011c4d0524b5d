"""The benchmark measures what it says: bytes by hand, time on a fake clock, and stubs that are slow, wrong or broken."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

import bnext
from bench import compare, model, plot, repeat, report, run, sweep, traffic
from bench.cases import DTYPES, EPILOGUES, LAYOUTS, PHASES, Problem, declared_bytes, layouts, make_operands
from bench.measure import Row, measure
from bench.providers import PROVIDERS, Provider, forced, parse_providers
from bench.suites import NETWORKS, SUITES, is_legal, model_layers, parse_shapes, suite
from bench.timing import FEWEST, Cpu, Cuda, Timing, interleave, order, wall_sampler

ROOT = Path(__file__).resolve().parents[1]
SMALL = Problem((4, 6, 5, 3))
EAGER = PROVIDERS["eager"]


class FakeClock:
    """Goes on only when it is told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float):
        def call() -> None:
            self.now += seconds

        return call


class FakeDevice(Cpu):
    """Each call takes as long as the module says, a copy 1 ms."""

    def __init__(self):
        super().__init__(threads=1)

    def copy(self, x):
        return 2 * x.nbytes, lambda: 1e-3

    def sampler(self, calls):
        seconds = calls[0]()[0].seconds
        return lambda: seconds

    host_sampler = sampler


def stub(name: str, change=lambda bn: bn) -> Provider:
    """torch's layer, changed."""
    return Provider(name, "", lambda problem, device: change(EAGER.build(problem, device)))


def rows_of(providers, phases=("forward",), problem=SMALL, seconds=0.0, **options) -> list[Row]:
    return list(measure(problem, [PHASES[name] for name in phases], providers, Cpu(1), seconds, **options))


def row(provider="bnext", shape=(64, 256, 56, 56), phase="forward", ms=1.0, **more) -> Row:
    about = Row("resnet50", 64, shape, 1, "bfloat16", "contiguous", "none", "float32", phase, None, provider)
    measured = {"ms": ms, "low_ms": 0.98 * ms, "high_ms": 1.02 * ms, "bytes": 1e6, "samples": 9}
    measured |= {"copy_gbs": 2.0, "floor_ms": 0.5, "ratio": 2 * ms, "copy_percent": 50 / ms, "gbs": 1 / ms}
    return dataclasses.replace(about, **measured | more)


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# Tensors of 2 * 3 * 4 * 5 = 120 elements: 480 bytes in float32, 240 in bfloat16, and 15 of mask.
@pytest.mark.parametrize(
    ("phase", "epilogue", "float32", "bfloat16"),
    [
        ("forward", "none", 960, 480),  # x, y
        ("forward", "relu", 960, 480),
        ("forward", "add_relu", 1455, 735),  # x, residual, y, mask
        ("eval", "none", 960, 480),
        ("eval", "add_relu", 1440, 720),  # no backward, no mask
        ("forward_read", "add_relu", 1935, 975),  # and y again
        ("eval_read", "none", 1440, 720),
        ("backward", "none", 1440, 720),  # dy, x, dx
        ("backward", "relu", 1440, 720),
        ("backward", "add_relu", 1935, 975),  # dy, x, mask, dx, dresidual
        ("step", "none", 2400, 1200),
        ("step", "add_relu", 3390, 1710),
        ("frozen", "none", 960, 480),  # dy, dx
        ("frozen", "relu", 1440, 720),  # dy, x for the sign, dx
        ("frozen", "add_relu", 1455, 735),  # dy, mask, dx, dresidual
        ("host", "none", 0, 0),
        ("host_eval", "none", 0, 0),
        ("host_backward", "none", 0, 0),
    ],
)
def test_declared_bytes_are_those_counted_by_hand(phase, epilogue, float32, bfloat16):
    for dtype, expected in (("float32", float32), ("bfloat16", bfloat16)):
        assert declared_bytes(Problem((2, 3, 4, 5), dtype, epilogue=epilogue), PHASES[phase]) == expected


def test_contenders_take_turns():
    taken = []

    def sampler(name, seconds):
        return lambda: (taken.append(name), seconds)[1]

    times = interleave({name: sampler(name, t) for name, t in (("a", 1), ("b", 2), ("c", 3))}, 0, FakeClock())
    assert all(sorted(taken[i : i + 3]) == ["a", "b", "c"] for i in range(0, len(taken), 3))
    assert {name: time.median for name, time in times.items()} == {"a": 1, "b": 2, "c": 3}
    assert all(time.samples == FEWEST for time in times.values())


@pytest.mark.parametrize("count", range(1, 8))
def test_nobody_always_follows_the_same_one(count):
    names = "abcdefg"[:count]
    rounds = [order(names, number) for number in range(2 * count)]
    assert all(sorted(once) == list(names) for once in rounds)
    pairs = Counter(pair for once in rounds for pair in itertools.pairwise(once))
    assert len(pairs) == count * (count - 1) and len(set(pairs.values())) <= 1, "each pair equally often"


def test_what_follows_whom_is_seen():
    """A contender that leaves the caches cold slows down the one after it, whose row tells."""
    last = [""]

    def sampler(name):
        def sample():
            before, last[0] = last[0], name
            return 2.0 if before == "streaming" else 1.0

        return sample

    times = interleave({name: sampler(name) for name in ("streaming", "a", "b")}, 60, FakeClock())
    assert times["a"].after == {"streaming": 2, "b": 1, "a": 1}
    slowed = row(after_ms=times["a"].after)
    assert "after this and after that provider 100.0 %" in report.overview([slowed])


def test_sampling_lasts_as_long_as_it_should():
    clock = FakeClock()
    works = {name: clock.work(0.5) for name in "ab"}
    times = interleave({name: lambda work=work: work() or 0.5 for name, work in works.items()}, 10, clock)
    assert clock.now == 20 and times["a"].samples == times["b"].samples == 20


def test_drift_and_outliers_do_not_decide():
    clock = FakeClock()

    def sampler(factor):  # a machine that slows down by a tenth each second, and hiccups at times
        def sample():
            clock.now += 1
            return factor * (1 + clock.now / 20) * (50 if clock.now % 13 == 0 else 1)

        return sample

    times = interleave({"fast": sampler(1), "slow": sampler(1.2)}, 30, clock)
    assert 1.1 < times["slow"].median / times["fast"].median < 1.3


def test_timing_is_median_and_quartiles():
    assert Timing.of([5, 1, 2, 4, 100]) == Timing(4, 2, 5, 5)


def test_short_calls_are_repeated_until_the_clock_can_tell():
    clock = FakeClock()
    calls = []
    work = clock.work(1e-4)
    sample = wall_sampler(lambda: (work(), calls.append(1)), shortest=9.5e-4, clock=clock, settle=clock.work(7))
    before = len(calls)
    assert sample() == pytest.approx(1e-4), "what settles is not timed"
    assert len(calls) - before == 10


def test_cold_samples_are_of_one_call_each_and_other_bytes_come_between(monkeypatch):
    monkeypatch.setattr(Cpu, "COLD", 1 << 10)
    did = []
    monkeypatch.setattr(Cpu, "evict", lambda device: did.append("evict"))
    sample = Cpu(1, cold=True).sampler([lambda: did.append("call")])
    did.clear()
    assert sample() >= 0 and sample() >= 0 and did == ["evict", "call"] * 2
    sample = Cpu(1).sampler([lambda: did.append("call")])
    did.clear()
    assert sample() >= 0 and set(did) == {"call"} and len(did) > 1


def test_eviction_writes_all_of_its_bytes():
    device = Cpu(1, cold=True)
    device.evict()
    assert device._others.numel() == Cpu.COLD and bool((device._others == 1).all())
    Cpu(1).evict()  # has none


def test_rows_are_the_arithmetic_of_their_times():
    class Timed(nn.BatchNorm2d):
        seconds = 0.0

        def forward(self, x):
            y = super().forward(x)
            y.seconds = self.seconds
            return y

    def provider(name, seconds):
        layer = type(name, (Timed,), {"seconds": seconds})
        return Provider(name, "", lambda problem, device: layer(problem.shape[1]))

    providers = [provider("quick", 2e-3), provider("slow", 6e-3)]
    quick, slow = measure(SMALL, [PHASES["forward"]], providers, FakeDevice(), 0, "suite", 64, 3)
    assert (quick.ms, slow.ms) == pytest.approx((2, 6))
    assert quick.bytes == 4 * 6 * 5 * 3 * 4 * 2 and quick.gbs == pytest.approx(quick.bytes / 2e-3 * 1e-9)
    assert quick.copy_gbs == pytest.approx(quick.bytes / 1e-3 * 1e-9), "a copy reads x and writes as much"
    assert (quick.floor_ms, quick.ratio, quick.copy_percent) == pytest.approx((1, 2, 50))
    assert quick.speedup == pytest.approx({"slow": 3}) and slow.speedup == pytest.approx({"quick": 1 / 3})
    assert (quick.suite, quick.batch, quick.count, quick.threads) == ("suite", 64, 3, 1)


@pytest.mark.parametrize("name", SUITES)
def test_shapes_of_suites_are_legal(name):
    for batch in (8, 64):
        workloads = suite(name, batch)
        assert all(is_legal(workload.shape) and layouts(workload.shape) for workload in workloads)
        assert len({workload.shape for workload in workloads}) == len(workloads)


def test_networks_have_as_many_layers_as_they_have():
    counts = {name: sum(layer.count for layer in layers) for name, layers in NETWORKS.items()}
    assert counts == {"resnet50": 53, "resnet18": 17, "densenet": 21, "lenet": 4, "mobilenet": 52, "video": 20}
    assert max(layer.features[0] for layer in NETWORKS["mobilenet"]) == 1280
    awkward = [workload.shape for workload in suite("awkward", 1)]
    assert any(shape[1] == 1 for shape in awkward) and any(shape[2:] == (1, 1) for shape in awkward)


def test_shapes_from_the_command_line():
    assert parse_shapes("64x256x56x56,8x3*4") == [((64, 256, 56, 56), 1), ((8, 3), 4)]
    for wrong in ("64", "64xax3", "1x64x1x1", "2x0x3", "1x2x3x4x5x6"):
        with pytest.raises(ValueError, match=wrong):
            parse_shapes(wrong)


class LittleModel(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 1),
            nn.BatchNorm2d(8),
            nn.Flatten(),
            nn.LazyBatchNorm1d(),
        )


class Stubborn(nn.Module):
    """Runs on real tensors only."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(5)

    def forward(self, x):
        return self.bn(x) if x.sum().item() == 0 else x


def stubborn_with_inputs():
    return Stubborn(), (torch.zeros(7, 5),)


@pytest.mark.parametrize(
    ("function", "layers"),
    [
        ("LittleModel", [((2, 8, 4, 4), 2), ((2, 128), 1)]),
        ("stubborn_with_inputs", [((7, 5), 1)]),
    ],
)
def test_layers_of_a_users_model(function, layers):
    assert model_layers(f"{__name__}:{function}", (2, 3, 6, 6)) == layers


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_passes_the_check_everywhere(dtype, epilogue):
    for layout in LAYOUTS:
        for parameters in ("float32", "same") if DTYPES[dtype].itemsize == 2 else ("same",):
            problem = Problem((8, 6, 5, 3), dtype, layout, epilogue, parameters)
            x = make_operands(problem, "cpu", 0).x
            assert x.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")
            for cell in rows_of([EAGER], PHASES, problem):
                assert cell.error is None and cell.ms > 0, cell


@pytest.mark.parametrize("shape", [(9, 4), (3, 4, 6), (2, 3, 4, 2, 3)])
def test_inputs_of_every_rank(shape):
    for layout in layouts(shape):
        assert all(cell.error is None for cell in rows_of([EAGER], PHASES, Problem(shape, layout=layout)))


def test_gpu_cuda_harness():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    for epilogue in EPILOGUES:
        problem = Problem((8, 64, 14, 14), "bfloat16", "channels_last", epilogue)
        for cell in measure(problem, list(PHASES.values()), [EAGER, PROVIDERS["native"]], Cuda(), 0.01):
            assert cell.error is None and cell.ms > 0, cell
            assert PHASES[cell.phase].host or cell.copy_gbs > 0


class Off(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 0.01


class OffInOnePlace(nn.BatchNorm2d):
    def forward(self, x):
        y = super().forward(x)
        y.data[0, 0, 0, 0] += 1
        return y


class Nan(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * float("nan")


class Biased(nn.BatchNorm2d):
    """Puts the biased variance into the running one."""

    def forward(self, x):
        y = super().forward(x)
        if self.training:
            m = x.numel() / x.shape[1]
            self.running_var.mul_(1 - 0.1 / m)
        return y


class WrongGradient(nn.BatchNorm2d):
    """As if the statistics were constants."""

    def forward(self, x):
        mean, var = x.mean((0, 2, 3)).detach(), x.var((0, 2, 3), correction=0).detach()
        super().forward(x)
        return nn.functional.batch_norm(x, mean, var, self.weight, self.bias, eps=self.eps)


@pytest.mark.parametrize(
    ("layer", "phase", "what"),
    [
        (Off, "forward", "y"),
        (Off, "eval", "y"),
        (Off, "host", "y"),
        (Off, "host_eval", "y"),
        (WrongGradient, "host_backward", "dx"),
        (OffInOnePlace, "forward", "y"),
        (Nan, "forward", "y"),
        (Biased, "forward", "running_var"),
        (WrongGradient, "backward", "dx"),
        (WrongGradient, "step", "dx"),
    ],
)
def test_wrong_numbers_are_caught(layer, phase, what):
    wrong = Provider("wrong", "", lambda problem, device: layer(problem.shape[1]))
    bad, good = rows_of([wrong, EAGER], [phase])
    assert bad.is_wrong and bad.error.startswith(f"wrong numbers: {what} is off by"), bad.error
    assert bad.ms is None and "wrong" not in good.speedup
    assert good.error is None and good.ms > 0


def test_a_wrong_shape_is_caught():
    (bad,) = rows_of([stub("wrong", lambda bn: nn.Sequential(bn, nn.Flatten()))])
    assert bad.error == "wrong numbers: y has shape (4, 90), not (4, 6, 5, 3)"


def test_a_provider_that_fails_is_a_row_that_says_why(monkeypatch):
    def absent(problem, device):
        raise ImportError("No module named 'nothing'\nand a long explanation")

    class Fragile(nn.BatchNorm2d):
        calls = 0

        def forward(self, x):
            Fragile.calls += 1
            if Fragile.calls > 3:
                raise RuntimeError("broke down")
            return super().forward(x)

    monkeypatch.setattr(torch, "compile", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no compiler")))
    fragile = Provider("fragile", "", lambda problem, device: Fragile(problem.shape[1]))
    providers = [Provider("absent", "", absent), fragile, PROVIDERS["compile"], PROVIDERS["native"], EAGER]
    rows = rows_of(providers)
    assert [cell.error for cell in rows] == [
        "ImportError: No module named 'nothing'",
        "RuntimeError: broke down",
        "RuntimeError: no compiler",
        "NotImplementedError: cuDNN takes no part on the CPU: the same as eager",
        None,
    ]
    assert "absent: ImportError" in report.overview(rows)


def test_a_problem_too_large_is_a_row_that_says_why(monkeypatch):
    monkeypatch.setattr("bench.measure.make_operands", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    assert {cell.error for cell in rows_of([EAGER], ["forward", "eval"])} == {"OutOfMemoryError: full"}


def test_plans_are_forced_around_each_use(monkeypatch):
    class Extension:
        now = "automatic"
        seen: list = []  # noqa: RUF012

        @classmethod
        def force_plan(cls, plan):
            if plan == "impossible":
                raise ValueError("no plan 'impossible'")
            before, cls.now = cls.now, plan
            return before

    class Watching(nn.BatchNorm2d):
        def forward(self, x):
            Extension.seen.append(Extension.now)
            return super().forward(x)

    monkeypatch.setattr("bnext._extension.extension", lambda: Extension)

    def watched(plan):
        return dataclasses.replace(forced(plan), build=lambda problem, device: Watching(problem.shape[1]))

    small, impossible = rows_of([watched("cooperative"), watched("impossible")])
    assert small.error is None and set(Extension.seen) == {"cooperative"} and Extension.now == "automatic"
    assert impossible.error == "ValueError: no plan 'impossible'"
    monkeypatch.setattr("bnext._extension.extension", lambda: object())
    assert "NotImplementedError" in rows_of([watched("cooperative")])[0].error


def test_a_slower_provider_comes_out_slower():
    class Twice(nn.Module):
        def __init__(self, bn):
            super().__init__()
            self.bn = bn

        def forward(self, x):
            for _ in range(3):
                nn.functional.batch_norm(x, None, None, training=True)
            return self.bn(x)

    slow, fast = rows_of([stub("slow", Twice), EAGER], problem=Problem((16, 32, 14, 14)), seconds=0.05)
    assert slow.ms > 1.5 * fast.ms and fast.speedup["slow"] > 1.5 and slow.ratio > fast.ratio


def test_parsing_providers():
    for names in (
        ["bnext", "bnext:two_pass", "apex"],
        ["bnext:resident:cluster=4,stages=2", "eager", "bnext:resident:groups=3", "bnext:cooperative"],
    ):
        assert [p.name for p in parse_providers(",".join(names))] == names
    for wrong in ("nothing", "eager:cooperative", "bnext,stages=2", "bnext:", ""):
        with pytest.raises(ValueError, match="no provider"):
            parse_providers(wrong)


def test_summary_weighs_layers_by_how_often_they_occur():
    rows = [
        row("bnext", (8, 2), ms=1, count=3, ratio=2.0, floor_ms=0.5, speedup={"eager": 4.0}),
        row("bnext", (8, 4), ms=5, count=1, ratio=32.0, floor_ms=0.25, speedup={"eager": 1.0}),
        row("eager", (8, 2), ms=4, count=3, ratio=8.0, speedup={"bnext": 0.25}),
        row("eager", (8, 4), ms=5, count=1, ratio=32.0, speedup={"bnext": 1.0}),
    ]
    ours, theirs = report.summarize(rows)
    assert (ours["total_ms"], theirs["total_ms"], ours["total_floor_ms"]) == (8, 17, 1.75)
    assert ours["geomean_ratio"] == pytest.approx((2**3 * 32) ** 0.25)
    assert ours["geomean_speedup"]["eager"] == pytest.approx(4**0.75)
    assert ours["total_speedup"] == {"eager": 17 / 8}
    assert (ours["worst_shape"], ours["worst_ratio"], ours["failed"]) == ((8, 4), 32.0, 0)

    rows[3] = dataclasses.replace(rows[3], error="broke", ms=None, ratio=None)
    ours, theirs = report.summarize(rows)
    assert theirs["failed"] == 1 and theirs["total_ms"] is None and ours["total_speedup"] == {}


def test_cases_measure_host_overhead_once_and_each_layout_that_there_is():
    phases = [PHASES["forward"], PHASES["host"], PHASES["host_backward"]]
    todo = list(
        run.cases({("mine", None): parse_shapes("8x4,8x4x3,8x4x3x3")}, ["float32"], LAYOUTS, ["none"], "float32",
                  phases, [Cpu(1)])
    )  # fmt: skip
    seen = [(case.problem.shape, case.problem.layout, [phase.name for phase in case.phases]) for case in todo]
    tiny = (2, 8, 2, 2)
    assert seen == [
        ((8, 4), "contiguous", ["forward"]), ((8, 4, 3), "contiguous", ["forward"]),
        ((8, 4, 3, 3), "contiguous", ["forward"]), (tiny, "contiguous", ["host", "host_backward"]),
        ((8, 4, 3, 3), "channels_last", ["forward"]), (tiny, "channels_last", ["host", "host_backward"]),
    ]  # fmt: skip


def test_one_command_writes_all(tmp_path, capsys):
    argv = "--shapes 4x6x5x3,9x4*2 --phase forward,backward,host --epilogue none,add_relu --providers eager,native"
    argv += f" --device cpu --threads 1 --seconds 0 --json {tmp_path}/a/r.json --plot {tmp_path}/a/r.png"
    assert run.main(argv.split()) == 0
    out = capsys.readouterr().out
    assert "4x6x5x3" in out and "cuDNN takes no part" in out
    assert (tmp_path / "a" / "r.png").read_bytes().startswith(b"\x89PNG")
    content, rows = report.load(tmp_path / "a" / "r.json")
    assert set(content) == {"environment", "command", "complete", "summary", "rows"}
    assert content["complete"] and content["command"].startswith("python bench/run.py --shapes '4x6x5x3,9x4*2' ")
    expected = "hardware driver torch cuda cudnn commit date cores python heap"
    assert set(expected.split()) <= set(content["environment"])
    # 2 epilogues x 2 providers x (3 shape-layouts x 2 phases + 2 host)
    assert len(rows) == 2 * 2 * 8
    for cell in rows:
        assert (cell.error is None) == (cell.provider == "eager") == (cell.ms is not None)
        assert cell.error or cell.low_ms <= cell.ms <= cell.high_ms


def test_wrong_numbers_are_the_exit_status(monkeypatch):
    wrong = Provider("bnext", "", lambda problem, device: Off(problem.shape[1]))
    monkeypatch.setitem(PROVIDERS, "bnext", wrong)
    argv = "--shapes 4x6x5x3 --phase forward --providers bnext,eager --device cpu --threads 1 --seconds 0"
    assert run.main(argv.split()) == 1


def test_an_interrupted_run_keeps_what_it_has(monkeypatch, tmp_path):
    def interrupted(todo, providers, seconds):
        yield row("eager")
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run", interrupted)
    assert run.main(["--device", "cpu", "--json", str(tmp_path / "r.json")]) == 0
    content, rows = report.load(tmp_path / "r.json")
    assert not content["complete"] and len(rows) == 1


@pytest.mark.parametrize(
    "argv",
    [
        "--suite nothing", "--phase sideways", "--shapes 3", "--providers nobody", "--dtype int8", "--layout round",
        "--batch 0", "--batch all", "--threads few", "--threads 0", "--seconds -1", "--seconds nan", "--runs 0",
        "--model torch", "--model :f", "--model no_such_module:f", "--model torch:no_such_function", "--model json:dumps",
        "--model torch.nn:Identity", "--model builtins:list", "--input 3 --model torch:nn",
    ],
)  # fmt: skip
def test_arguments_that_make_no_sense(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(argv.split())
    assert stop.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert argv.split()[0] in message, message


def test_a_gpu_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        run.main(["--device", "cuda"])
    assert capsys.readouterr().err.splitlines()[-1].endswith("argument --device: torch sees no CUDA GPU")


def test_a_model_in_the_working_directory(tmp_path):
    (tmp_path / "my_model.py").write_text("from torch import nn\n\ndef build():\n    return nn.BatchNorm2d(3)\n")
    command = [sys.executable, ROOT / "bench" / "run.py", "--model", "my_model:build", "--input", "2x3x4x4", "--dry"]
    command += ["--device", "cpu", "--threads", "1", "--phase", "forward", "--providers", "eager"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("2 cases, 2 rows, about "), done.stdout


def test_a_dry_run_counts_and_touches_no_gpu(capsys, monkeypatch):
    monkeypatch.setattr(run, "run", lambda *_: pytest.fail("measured"))
    argv = "--device cuda --suite lenet,tiny --batch 8,32 --phase forward,host --providers bnext,eager --dry --runs 2"
    assert run.main(argv.split()) == 0
    # lenet has 2 shapes of 2 layouts and 2 of one, tiny 8 and 3; a host case for each layout
    cases, rows = 2 * (6 + 2) + (19 + 2), 2 * 2
    assert capsys.readouterr().out.startswith(f"{cases} cases, {rows * cases} rows, about ")


@pytest.mark.slow
def test_whole_runs_are_repeated_in_processes_of_their_own(tmp_path, capsys):
    argv = "--shapes 4x6,9x4 --phase forward --providers eager,native --device cpu --threads 1 --seconds 0 --runs 2"
    assert run.main([*argv.split(), "--json", str(tmp_path / "r.json")]) == 0
    content, rows = report.load(tmp_path / "r.json")
    assert content["complete"] and len(rows) == 4
    for cell in rows:
        assert len(cell.runs_ms) == (0 if cell.error else 2) and (cell.provider == "native") == bool(cell.error)
        assert cell.error or cell.low_ms <= min(cell.runs_ms) <= cell.ms <= max(cell.runs_ms) <= cell.high_ms
    assert "between a row's medians of several runs" in capsys.readouterr().out


def test_runs_are_merged():
    def one(ours, theirs, **more):
        return [row(ms=ours, copy_gbs=2.0, **more), row("eager", ms=theirs)]

    ours, theirs = repeat.merge([one(1.0, 3.0), one(1.2, 3.0), one(1.1, 3.3)])
    assert (ours.ms, ours.low_ms, ours.high_ms) == (1.1, 0.98, 1.02 * 1.2) and ours.runs_ms == [1.0, 1.2, 1.1]
    assert ours.speedup["eager"] == pytest.approx(3 / 1.1) and ours.ratio == pytest.approx(1.1 / ours.floor_ms)
    assert ours.samples == 27 and theirs.speedup["bnext"] == pytest.approx(1.1 / 3)
    failed, theirs = repeat.merge([one(1.0, 3.0), one(1.0, 3.0, error="broke")])
    assert failed.error == "broke" and theirs.ms == 3


def test_a_result_is_saved_while_it_grows(monkeypatch, tmp_path):
    def growing(todo, providers, seconds):
        for i, name in enumerate(("bnext", "eager") * 2):
            if i == 2:
                content, rows = report.load(tmp_path / "r.json")
                assert len(rows) == 2 and not content["complete"]
            yield row(name, (8, 1 + i // 2))

    monkeypatch.setattr(run, "run", growing)
    argv = ["--device", "cpu", "--providers", "bnext,eager", "--json", str(tmp_path / "r.json")]
    assert run.main(argv) == 0
    content, rows = report.load(tmp_path / "r.json")
    assert len(rows) == 4 and content["complete"] and [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_a_run_ends_in_a_summary():
    rows = [
        row("bnext", (8, 2), ms=1, count=3, ratio=2.0, speedup={"eager": 4.0}),
        row("bnext", (8, 4), ms=5, count=1, ratio=32.0, speedup={"eager": 0.9}),
        row("eager", (8, 2), ms=4, count=3, ratio=8.0, speedup={"bnext": 0.25}),
        row("eager", (8, 4), ms=4.5, count=1, error="RuntimeError: full"),
    ]
    lines = report.overview(rows).splitlines()
    assert lines[2] == "resnet50, N = 64, bfloat16, contiguous, forward"
    assert re.fullmatch(r" +bnext +8000.0 us +4.00 +8x4 32.00", lines[3]), lines[3]
    assert re.fullmatch(r" +eager +- +8.00 +8x2 8.00   2.75x, least 0.90x at 8x4   1 of 2 failed", lines[4]), lines[4]
    assert lines[-1] == "eager: RuntimeError: full" and any("quartiles" in line for line in lines)


def test_training_steps_of_a_network(tmp_path, capsys):
    """All ways train; what recompute need not keep, it does not; the bytes kept are those that bnext.memory counts."""
    model.main(["--networks", "lenet", "--batch", "2", "--steps", "1", "--gib", "1", "--threads", "1",
                "--json", str(tmp_path / "m.json"), "--plot", str(tmp_path / "m.png")])  # fmt: skip
    result = json.loads((tmp_path / "m.json").read_text())
    rows = {row["way"]: row for row in result["rows"]}
    assert result["complete"] and list(rows) == list(model.WAYS)
    assert rows["recompute"]["kept"] < 0.75 * rows["fuse"]["kept"]
    assert rows["checkpoint"]["kept"] < 0.5 * rows["torch"]["kept"]
    for row in rows.values():
        assert row["peak"] >= row["kept"] > 0 and 0 < row["share"] < 1
        assert 0 < row["fastest"] <= row["seconds"] <= row["slowest"]
        assert row["fits"] == pytest.approx(2**30 / (row["peak"] / 64), rel=0.2)
    counted = bnext.memory(bnext.fuse(model.NETWORKS["lenet"][0]()), torch.randn(64, 3, 32, 32)).total
    images = 64 * 3 * 32 * 32 * 4  # there before the step
    for way, bytes_ in (("fuse", counted.before), ("recompute", counted.after)):
        assert rows[way]["kept"] == pytest.approx(bytes_ - images, rel=0.1)
    text = capsys.readouterr().out
    assert all(way.label in text for way in model.WAYS.values()) and "lenet, batch 64, float32, contiguous" in text
    assert (tmp_path / "m.png").stat().st_size > 10_000
    model.main(["--from", str(tmp_path / "m.json"), "--plot", str(tmp_path / "again.png")])
    assert capsys.readouterr().out == text
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "m.png").read_bytes()


def test_interrupted_steps_keep_what_was_measured(tmp_path, monkeypatch, capsys):
    def measure(setting, *_):
        if setting.layout == "channels_last":
            raise KeyboardInterrupt
        figures = {"kept": 1, "peak": 1, "fits": 1, "share": None, "seconds": 1.0, "fastest": 1.0, "slowest": 1.0}
        return [setting._asdict() | {"way": "torch"} | figures]

    monkeypatch.setattr(model, "measure", measure)
    argv = ["--networks", "lenet", "--ways", "torch", "--layout", "contiguous,channels_last"]
    with pytest.raises(SystemExit) as stop:
        model.main([*argv, "--json", str(tmp_path / "m.json")])
    result = json.loads((tmp_path / "m.json").read_text())
    assert stop.value.code == 130 and not result["complete"]
    assert [row["layout"] for row in result["rows"]] == ["contiguous"]
    shown = capsys.readouterr()
    assert "lenet, batch 256, float32, contiguous" in shown.out and "interrupted" in shown.err


@pytest.mark.parametrize("networks", [["lenet"], ["lenet", "resnet18"]])
def test_pictures_of_training_steps(networks, tmp_path):
    """Of one network and of several, with all that is in a result."""
    rows = [
        {
            "network": network,
            "batch": 8,
            "dtype": "float32",
            "layout": "contiguous",
            "way": way,
            "seconds": 1.0,
            "fits": 9,
        }
        for network in networks
        for way in model.WAYS
    ]
    environment = {"hardware": "A machine", "device": "cpu", "cores": 2, "gib": 16}
    model.draw({"rows": rows, "environment": environment}, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 10_000


def test_ways_run_what_they_say():
    """bnext's kernels in all but torch's; in bfloat16, channels_last and compiled too."""
    for way in model.WAYS:
        trainee = model.Trainee(model.Setting("lenet", 4, "bfloat16", "channels_last"), model.WAYS[way], "cpu")
        count = bnext.kernels_run()
        trainee.step(trainee.images(4))
        assert (bnext.kernels_run() > count) == (way not in ("torch", "checkpoint")), way
    assert (
        model.share(model.Trainee(model.Setting("lenet", 4, compiled=True), model.WAYS["torch"], "cpu"), None) is None
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--networks", "alexnet"], "not 'alexnet'"),
        (["--ways", "magic"], "not 'magic'"),
        (["--batch", "1"], "at least 2, not 1"),
        (["--dtype", "float32,bfloat16", "--plot", "p.png"], "one --dtype"),
        (["--from", "m.json"], "should come with --plot"),
    ],
)
def test_model_arguments_that_make_no_sense(argv, message, capsys):
    with pytest.raises(SystemExit):
        model.main(argv)
    assert message in capsys.readouterr().err


def test_scripts_run_from_anywhere(tmp_path):
    command = [sys.executable, ROOT / "bench" / "run.py", "--list"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert all(name in shown for name in (*SUITES, *PHASES, *PROVIDERS))


def test_results_are_documented():
    text = (ROOT / "bench" / "README.md").read_text()
    summary = report.summarize([row()])[0]
    fields = {field.name for field in dataclasses.fields(Row)} | set(summary) | set(report.environment("cpu"))
    missing = sorted(name for name in fields if f"`{name}`" not in text)
    assert not missing
    assert all(f"`{name}`" in text for name in (*SUITES, *PHASES, *PROVIDERS))


def test_results_name_no_place():
    for path in (ROOT / "bench" / "results").glob("*.json"):
        assert not re.search(r"/(home|root|tmp|work|usr)/", path.read_text()), path


def test_plot_of_every_kind_of_group(tmp_path):
    rows = [
        row(provider, shape, phase, ms, dtype=dtype, speedup={"eager": 2 / ms} if provider != "eager" else {})
        for dtype in ("bfloat16", "float32")
        for provider, ms in (("bnext", 1.0), ("bnext:two_pass", 1.4), ("bnext:cooperative", 1.5), ("eager", 2.0))
        for shape in ((64, 256, 56, 56), (64, 64, 56, 56))
        for phase in ("forward", "backward")
    ]
    rows.append(row("compile", error="no compiler", ms=1.0))
    plot.draw(rows, report.environment("cpu"), tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 10_000


def test_headline_is_one_panel(tmp_path, monkeypatch, capsys):
    result = ROOT / "bench" / "results" / "amd-epyc-avx2-compile.json"
    figures = []
    monkeypatch.setattr(plot.pyplot, "close", figures.append)
    assert plot.main([str(result), str(tmp_path / "p.png"), "--headline"]) == 0
    (axes,) = figures[0].axes
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == [f"{d}\n{l}" for d in ("float32", "bfloat16") for l in ("contiguous", "channels_last")]  # noqa: E741
    assert len(axes.patches) == 12 and "N = 8" in axes.get_title(loc="left")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["BN", "BN + ReLU", "BN + add + ReLU"]
    rows = [
        r for r in report.load(result)[1] if (r.dtype, r.layout, r.epilogue) == ("float32", "channels_last", "relu")
    ]
    of = {name: sum(r.ms * r.count for r in rows if r.provider == name) for name in ("eager", "bnext")}
    assert axes.patches[5].get_height() == pytest.approx(of["eager"] / of["bnext"])
    for wrong in ("nothing.json", __file__):
        with pytest.raises(SystemExit):
            plot.main([wrong, str(tmp_path / "p.png")])
        assert wrong in capsys.readouterr().err.splitlines()[-1]


def test_compare_tells_changes_from_noise(tmp_path, capsys):
    before = [row(shape=(8, c), ms=1.0) for c in range(1, 6)]
    after = [
        row(shape=(8, 1), ms=1.5, copy_gbs=3.0),  # slower
        row(shape=(8, 2), ms=0.5, copy_gbs=3.0),  # faster
        row(shape=(8, 3), ms=1.03, copy_gbs=3.0),  # within the spread
        row(shape=(8, 4), ms=1.02, low_ms=1.019, high_ms=1.021, copy_gbs=3.0),  # beyond the other's middle, by little
        row(shape=(8, 5), ms=1.0, error="broke", copy_gbs=None) and row("eager", shape=(8, 5)),  # not in both
    ]
    environment = report.environment("cpu")
    for name, rows in (("a", before), ("b", after)):
        report.save(tmp_path / f"{name}.json", rows, environment, "", complete=True)
    assert compare.main([str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r" +1.50x slower +bnext +8x1 ", lines[0]) and re.match(r" +2.00x faster +bnext +8x2 ", lines[1])
    assert lines[2] == "4 cells: 1 slower, 1 faster, 2 the same; copies run at 1.50x the rate"
    assert lines[3].startswith("each side was run once")


def test_cold_results_are_told_apart(tmp_path, monkeypatch, capsys):
    """By their file's name, in the file, on the picture, and where they are compared with others."""
    Figure = pytest.importorskip("matplotlib.figure").Figure
    monkeypatch.setattr(Cpu, "COLD", 1 << 10)
    titles = []
    monkeypatch.setattr(Figure, "suptitle", lambda figure, text, **_: titles.append(text))
    for name, options in (("warm", []), ("cold", ["--cold"])):
        argv = "--shapes 4x6 --phase eval --providers eager --device cpu --threads 1 --seconds 0"
        files = ["--json", f"{tmp_path}/{name}.json", "--plot", f"{tmp_path}/{name}.png"]
        assert run.main([*argv.split(), *files, *options]) == 0
        content, _ = report.load(tmp_path / f"{name}.json")
        assert content["environment"]["caches"] == name
        assert ("cold" in report.default_path(content["environment"], "shapes").name) == (name == "cold")
    assert ["caches emptied" in title for title in titles] == [False, True]
    capsys.readouterr()
    compare.main([f"{tmp_path}/warm.json", f"{tmp_path}/cold.json"])
    assert "another caches: warm, then cold" in capsys.readouterr().out
    (older := json.loads((tmp_path / "warm.json").read_text()))["environment"].pop("caches")
    (tmp_path / "older.json").write_text(json.dumps(older))
    compare.main([f"{tmp_path}/older.json", f"{tmp_path}/cold.json"])
    assert "another caches" not in capsys.readouterr().out


def test_compare_knows_the_spread_between_runs(tmp_path, capsys):
    """A tenth slower is nothing where two runs of the same code differ by a fifth."""
    for name, ms in (("a", 1.0), ("b", 1.1)):
        rows = [row(shape=(8, 1), ms=ms, runs_ms=[ms, ms]), row(shape=(8, 2), ms=ms, runs_ms=[ms, 1.2 * ms])]
        report.save(tmp_path / f"{name}.json", rows, report.environment("cpu"), "", complete=True)
    compare.main([str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r" +1.10x slower +bnext +8x1 ", lines[0])
    assert lines[1].startswith("2 cells: 1 slower, 0 faster, 1 the same")
    assert lines[2] == "the same: within the spread between runs of the same code, 10.0 %, at most 20.0 %"


def test_sweep_is_large_and_legal():
    for most in (1 << 22, 1 << 26):
        shapes = sweep.shapes(most)
        assert len(shapes) == len(set(shapes)) >= 200 and all(map(is_legal, shapes))


def test_sweep_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "shapes", lambda most: [(8, 4), (4, 2, 3, 3)])
    file = tmp_path / "s.jsonl"
    options = "--dtype float32 --phase forward,backward --providers eager,native --device cpu --threads 1 --seconds 0"
    argv = [str(file), *options.split()]
    assert sweep.main(argv) == 0
    whole = file.read_text()
    assert len(whole.splitlines()) == 6, "(8, 4) has one layout, the other two"
    assert sweep.main([str(tmp_path / "part.jsonl"), *options.split(), "--cases", "2"]) == 0
    part = sweep.read(tmp_path / "part.jsonl")
    assert list(map(sweep.identity, part)) == list(map(sweep.identity, sweep.read(file)[: len(part)]))
    assert len(part) == 8, "2 cases, in 2 phases, by 2 providers"

    lines = whole.splitlines(keepends=True)
    file.write_text("".join(lines[:3]) + lines[3][:40])  # stopped in the middle of a line
    assert sweep.main(argv) == 0
    after = file.read_text()
    assert after.startswith("".join(lines[:3])), "nothing is measured twice"
    kept = [cell for cell in sweep.read(file) if cell.provider == "eager"]
    assert len(kept) == len({sweep.identity(cell) for cell in kept}) == 6
    assert len(re.findall(r"^6 cells, \d below 0.97, the worst:", capsys.readouterr().out, re.MULTILINE)) == 2


def test_sweep_measures_slow_cells_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "shapes", lambda most: [(8, 4), (8, 5)])
    file = tmp_path / "s.jsonl"
    options = "--dtype float32 --phase forward --providers bnext,eager --device cpu --threads 1 --seconds 0"
    argv = [str(file), *options.split()]
    sweep.main(argv)
    rows = sweep.read(file)
    for cell in rows:
        cell.speedup = {"eager": 0.9 if cell.shape == (8, 4) else 1.0}
    file.write_text("")
    sweep.append(file, rows)

    def run_child(command, check):
        assert Path(command[1]) == Path(sweep.__file__)
        sweep.main([str(argument) for argument in command[2:]])

    monkeypatch.setattr(sweep.subprocess, "run", run_child)
    before = file.read_text()
    sweep.main([*argv, "--again", "2"])
    assert file.read_text() == before
    merged = sweep.read(tmp_path / "s-again.jsonl")
    assert [(cell.shape, cell.provider, len(cell.runs_ms)) for cell in merged] == [
        ((8, 4), "bnext", 2),
        ((8, 4), "eager", 2),
    ]
    low = sum(cell.provider == "bnext" and cell.speedup["eager"] < 0.97 for cell in merged)
    assert f"measured 2 times more, {low} of these are below 0.97 in the median" in capsys.readouterr().out


def test_sweep_shows_the_worst_first():
    rows = [row(shape=(8, c), speedup={"eager": c / 2}) for c in (3, 1, 2)]
    assert [cell.shape for cell in sweep.worst(rows)] == [(8, 1), (8, 2), (8, 3)]
    assert [cell.shape for cell in sweep.below(rows, 1.0)] == [(8, 1)]
    assert re.search(r" 0\.50x the speed of eager.* 8x1 ", sweep.show(sweep.worst(rows)[0]))


NCU = """\
==PROF== Connected to process 1
==PROF== Profiling "stats_kernel": 0%....100% - 1 pass
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",\
"Section Name","Metric Name","Metric Unit","Metric Value"
"0","1","python","127.0.0.1","stats_kernel","1","7","(256, 1, 1)","(64, 1, 1)","0","9.0","","dram__bytes_read.sum","byte","1,000,192"
"0","1","python","127.0.0.1","stats_kernel","1","7","(256, 1, 1)","(64, 1, 1)","0","9.0","","dram__bytes_write.sum","byte","64"
"1","1","python","127.0.0.1","void apply<float, 4>(int)","1","7","(256, 1, 1)","(9, 1, 1)","0","9.0","","dram__bytes_read.sum","byte","512"
"1","1","python","127.0.0.1","void apply<float, 4>(int)","1","7","(256, 1, 1)","(9, 1, 1)","0","9.0","","dram__bytes_write.sum","byte","1,024"
"""


def test_ncus_table_is_read():
    read, written = traffic.BYTES
    assert traffic.parse_ncu(NCU) == [
        ("stats_kernel", {read: 1000192, written: 64}),
        ("void apply<float, 4>(int)", {read: 512, written: 1024}),
    ]
    assert traffic.parse_ncu("==ERROR== no permission") == []


def test_ncu_is_asked_twice_and_may_refuse_the_details(monkeypatch, capsys):
    """Bytes in one pass over a cold call, all else in as many passes as it takes, each with caches flushed."""
    asked = []

    def ncu(command, **_):
        asked.append(command)
        metrics = command[command.index("--metrics") + 1].split(",")
        if len(metrics) > 2 and refuses:
            return subprocess.CompletedProcess(command, 1, "", "==ERROR== Failed to find metric membar")
        table = "".join(f'"0","kernel","{metric}","2,000.5"\n' for metric in metrics)
        return subprocess.CompletedProcess(command, 0, f'"ID","Kernel Name","Metric Name","Metric Value"\n{table}', "")

    monkeypatch.setattr(traffic.subprocess, "run", ncu)
    monkeypatch.setattr(traffic.shutil, "which", lambda name: name)
    for refuses in (False, True):
        argv = ["--shapes", "64x8x4x4", "--layout", "channels_last", "--phase", "forward", "--providers", "bnext"]
        assert traffic.main(argv) == refuses
        out = capsys.readouterr().out
        assert "0.0 MB, 0.12x, 1 kernels" in out
        assert ("Failed to find metric membar" in out) == refuses and ("stall_membar 2000.5" in out) != refuses
    caches = [command[command.index("--cache-control") + 1] for command in asked]
    assert caches == ["none", "all"] * 2


def test_freed_memory_is_used_again():
    """No page faults in 20 clones of 64 MB, which are 16384 each where memory is mapped anew."""
    code = """if True:
        import resource, torch
        from bench.timing import reuse_heap, warm_up
        if not reuse_heap():
            raise SystemExit("no mallopt")
        x = torch.ones(16 << 20)
        warm_up(x.clone)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            x.clone()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if "no mallopt" in done.stderr:
        pytest.skip("glibc's mallopt is not there")
    assert int(done.stdout) <= 16400, done.stderr  # malloc may be short of a block once more


def test_json_is_one_row_a_line(tmp_path):
    report.save(tmp_path / "r.json", [row(), row("eager")], {"hardware": "none"}, "", complete=True)
    lines = (tmp_path / "r.json").read_text().splitlines()
    assert sum('"provider": "eager"' in line for line in lines) == 2, "its row and its summary"
    assert json.loads("\n".join(lines))["rows"][0]["shape"] == [64, 256, 56, 56]
