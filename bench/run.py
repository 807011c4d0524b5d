"""`python bench/run.py --help`: checks and times batch normalization by several providers on a suite of shapes."""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script: what is measured is this checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from tqdm import tqdm

from bench import report
from bench.cases import DTYPES, EPILOGUES, PHASES, TINY, Phase, Problem, layouts
from bench.measure import Row, measure
from bench.providers import PROVIDERS, Provider, parse_providers
from bench.suites import SUITES, Workload, model_layers, parse_shapes, suite
from bench.timing import Cpu, Cuda, reuse_heap


@dataclass(frozen=True)
class Case:
    """A problem, and the phases that are timed on it."""

    suite: str
    problem: Problem
    count: int
    phases: tuple[Phase, ...]
    device: Cpu | Cuda


def cases(
    workloads: dict[str, list[Workload]],
    dtypes: Sequence[str],
    wanted_layouts: Sequence[str],
    epilogues: Sequence[str],
    parameters: str,
    phases: Sequence[Phase],
    devices: Sequence[Cpu | Cuda],
) -> Iterator[Case]:
    """Everything to measure, in order. Host overhead is no matter of shape: it is measured on a tiny one."""
    host = tuple(phase for phase in phases if phase.name == "host")
    others = tuple(phase for phase in phases if phase.name != "host")
    for device, (name, members), dtype, epilogue, layout in itertools.product(
        devices, workloads.items(), dtypes, epilogues, wanted_layouts
    ):
        shapes = [(shape, count, others) for shape, count in members] if others else []
        if host:
            shapes.append((TINY, 1, host))
        for shape, count, wanted in shapes:
            if layout in layouts(shape):
                yield Case(name, Problem(shape, dtype, layout, epilogue, parameters), count, wanted, device)


def run(todo: Sequence[Case], providers: Sequence[Provider], seconds: float) -> Iterator[Row]:
    """The rows of all cases, behind a progress bar."""
    with tqdm(total=sum(len(case.phases) for case in todo), unit="case", disable=None) as bar:
        for case in todo:
            problem = case.problem
            bar.set_description(f"{'x'.join(map(str, problem.shape))} {problem.dtype} {problem.layout}")
            rows = measure(problem, case.phases, providers, case.device, seconds, case.suite, case.count)
            for _ in case.phases:
                yield from itertools.islice(rows, len(providers))
                bar.update()


def devices(name: str, threads: str) -> list[Cpu | Cuda]:
    """The GPU once, or the CPU once for each number of threads."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        return [Cuda()]
    every = torch.get_num_threads()
    numbers = dict.fromkeys(every if item == "all" else int(item) for item in threads.split(","))
    return [Cpu(number) for number in numbers]


def command_line(argv: Sequence[str]) -> str:
    return shlex.join(["python", "bench/run.py", *argv])


def listing() -> str:
    lines = ["suites:"]
    for name in SUITES:
        workloads = suite(name, 1)
        lines.append(f"  {name:10} {len(workloads):3} shapes, {sum(w.count for w in workloads):3} layers")
    lines += ["phases:", *(f"  {phase.name:10} {phase.what}" for phase in PHASES.values())]
    lines += ["providers:", *(f"  {provider.name:10} {provider.what}" for provider in PROVIDERS.values())]
    return "\n".join([*lines, "  bnext:PLAN bnext with one plan forced, as in bnext:two_pass"])


def names_of(allowed: Sequence[str], every: str = "all") -> Callable[[str], list[str]]:
    """An argument's type: names out of some, separated by commas, or all of them."""

    def parse(text: str) -> list[str]:
        names = list(allowed) if text == every else text.split(",")
        if unknown := [name for name in names if name not in allowed]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(allowed)} and {every}")
        return names

    return parse


def checked(parse: Callable) -> Callable:
    """An argument's type whose ValueError is a message to the user."""

    def checked(text: str):
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return checked


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("--list", action="store_true", help="show suites, phases and providers")
    add("--suite", type=names_of(SUITES), default="resnet50", metavar="NAMES", help="comma-separated, or all")
    add("--shapes", type=checked(parse_shapes), metavar="LIST", help="instead: 64x256x56x56,64x64x112x112*3")
    add("--model", metavar="MODULE:FUNCTION", help="instead: the layers of the model that the function returns")
    add("--input", type=checked(parse_shapes), metavar="SHAPE", help="what --model takes; BATCHx3x224x224 if not given")
    add("--batch", type=int, help="of networks; 64 on a GPU and 8 on a CPU if not given")
    add(
        "--dtype",
        type=names_of(tuple(DTYPES)),
        metavar="NAMES",
        help="bfloat16 on a GPU, float32 on a CPU if not given",
    )
    add("--parameters", choices=("float32", "same"), default="float32", help="dtype of 16-bit layers' parameters")
    add("--layout", type=names_of(("planar", "interleaved"), "both"), default="both", metavar="NAMES",
        help="planar, interleaved (channels_last), both")  # fmt: skip
    add("--epilogue", type=names_of(EPILOGUES), default="none", metavar="NAMES", help=", ".join(EPILOGUES) + ", all")
    add("--phase", type=names_of(tuple(PHASES)), default="all", metavar="NAMES", help=", ".join(PHASES) + ", all")
    add("--providers", type=checked(parse_providers), default="bnext,eager,compile", metavar="NAMES",
        help="comma-separated: " + ", ".join(PROVIDERS) + ", bnext:PLAN")  # fmt: skip
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--threads", default="1,all", help="numbers of threads on the CPU")
    add("--seconds", type=float, default=0.3, help="for which each provider is sampled in each case")
    add(
        "--json",
        type=Path,
        nargs="?",
        const=Path(),
        metavar="FILE",
        help="without FILE: bench/results/HARDWARE-SUITE.json",
    )
    add("--plot", type=Path, nargs="?", const=Path(), metavar="FILE", help="without FILE: the same as a .png")
    return p


def workloads(args: argparse.Namespace, batch: int) -> dict[str, list[Workload]]:
    if args.shapes:
        return {"shapes": args.shapes}
    if args.model:
        return {"model": model_layers(args.model, args.input[0].shape if args.input else (batch, 3, 224, 224))}
    return {name: suite(name, batch) for name in args.suite}


def main(argv: Sequence[str]) -> int:
    args = parser().parse_args(argv)
    if args.list:
        print(listing())
        return 0
    heap = reuse_heap()
    where = devices(args.device, args.threads)
    cuda = where[0].kind == "cuda"
    environment = report.environment(where[0].kind) | {"heap": "reused" if heap else "default"}
    what = workloads(args, args.batch or (64 if cuda else 8))
    dtypes = args.dtype or (["bfloat16"] if cuda else ["float32"])
    phases = [PHASES[name] for name in args.phase]
    todo = list(cases(what, dtypes, args.layout, args.epilogue, args.parameters, phases, where))

    rows: list[Row] = []
    complete = False
    try:
        rows.extend(run(todo, args.providers, args.seconds))
        complete = True
    except KeyboardInterrupt:
        print("interrupted: what follows is what was measured until then", file=sys.stderr)

    print(report.table(rows))
    name = report.default_path(environment, "all" if list(what) == SUITES else "-".join(what))
    if args.json is not None:
        path = name.with_suffix(".json") if args.json == Path() else args.json
        report.save(path, rows, environment, command_line(argv), complete)
        print(f"wrote {path}")
    if args.plot is not None:
        from bench import plot

        path = name.with_suffix(".png") if args.plot == Path() else args.plot
        plot.draw(rows, environment, path)
        print(f"wrote {path}")
    return 1 if any(row.is_wrong for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
