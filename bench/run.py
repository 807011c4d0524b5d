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

from bench import repeat, report
from bench.cases import DTYPES, EPILOGUES, LAYOUTS, PHASES, TINY, Phase, Problem, layouts
from bench.measure import Row, measure
from bench.providers import PROVIDERS, Provider, parse_providers
from bench.suites import NETWORKS, SHAPES, SUITES, Workload, model_layers, parse_shapes, suite
from bench.timing import Cpu, Cuda, reuse_heap

# By suite and, of networks, batch size.
Workloads = dict[tuple[str, int | None], list[Workload]]


@dataclass(frozen=True)
class Case:
    """A problem, and the phases that are timed on it."""

    suite: str
    batch: int | None
    problem: Problem
    count: int
    phases: tuple[Phase, ...]
    device: Cpu | Cuda


def cases(
    workloads: Workloads,
    dtypes: Sequence[str],
    wanted_layouts: Sequence[str],
    epilogues: Sequence[str],
    parameters: str,
    phases: Sequence[Phase],
    devices: Sequence[Cpu | Cuda],
) -> Iterator[Case]:
    """Everything to measure, in order. Host overhead does not depend on the shape: it is measured on a tiny one."""
    host = tuple(phase for phase in phases if phase.host)
    others = tuple(phase for phase in phases if not phase.host)
    for device, ((name, batch), members), dtype, epilogue, layout in itertools.product(
        devices, workloads.items(), dtypes, epilogues, wanted_layouts
    ):
        shapes = [(shape, count, others) for shape, count in members] if others else []
        if host:
            shapes.append((TINY, 1, host))
        for shape, count, wanted in shapes:
            if layout in layouts(shape):
                yield Case(name, batch, Problem(shape, dtype, layout, epilogue, parameters), count, wanted, device)


def run(todo: Sequence[Case], providers: Sequence[Provider], seconds: float) -> Iterator[Row]:
    """The rows of all cases, behind a progress bar."""
    with tqdm(total=sum(len(case.phases) for case in todo), unit="case", disable=None) as bar:
        for case in todo:
            problem = case.problem
            bar.set_description(f"{'x'.join(map(str, problem.shape))} {problem.dtype} {problem.layout}")
            about = (case.suite, case.batch, case.count)
            rows = measure(problem, case.phases, providers, case.device, seconds, *about)
            for _ in case.phases:
                yield from itertools.islice(rows, len(providers))
                bar.update()


def devices(name: str, threads: Sequence[int | None], cold: bool = False) -> list[Cpu | Cuda]:
    """The GPU once, or the CPU once for each number of threads; None is all of them."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        return [Cuda()]
    return [Cpu(number, cold) for number in dict.fromkeys(number or torch.get_num_threads() for number in threads)]


def estimate(todo: Sequence[Case], providers: Sequence[Provider], seconds: float) -> float:
    """About how many seconds the cases take. Setting a provider up in a phase (operands, check, graph) and compiling
    for a case are guesses."""
    setup, compiling = 0.3, 8.0
    phases = sum(len(case.phases) for case in todo)
    compilations = len(todo) * sum(provider.name == "compile" for provider in providers)
    return phases * (len(providers) * (seconds + setup) + seconds) + compiling * compilations


def command_line(argv: Sequence[str]) -> str:
    return shlex.join(["python", "bench/run.py", *argv])


def listing() -> str:
    lines = ["suites:"]
    for name in SUITES:
        workloads = suite(name, 1)
        lines.append(f"  {name:10} {len(workloads):3} shapes, {sum(w.count for w in workloads):3} layers")
    lines += ["phases:", *(f"  {phase.name:13} {phase.what}" for phase in PHASES.values())]
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
            raise argparse.ArgumentTypeError(" ".join(str(error).split())) from None

    return checked


def numbers(text: str) -> list[int | None]:
    """'1,all' -> [1, None]."""
    found = [None if item == "all" else int(item) if item.isdecimal() else 0 for item in text.split(",")]
    if 0 in found:
        raise ValueError(f"{text!r} is no list of positive numbers, such as 1,2 or 1,all")
    return found


def batches(text: str) -> list[int]:
    found = numbers(text)
    if None in found:
        raise ValueError(f"{text!r}: a batch size is a number")
    return found


def duration(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < 3600:
        raise ValueError(f"{text!r} is no number of seconds from 0 to 3600")
    return seconds


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("--list", action="store_true", help="show suites, phases and providers")
    add("--suite", type=names_of(SUITES), default="resnet50", metavar="NAMES", help="comma-separated, or all")
    add("--shapes", type=checked(parse_shapes), metavar="LIST", help="instead: 64x256x56x56,64x64x112x112*3")
    add("--model", metavar="MODULE:FUNCTION", help="instead: the layers of the model that the function returns")
    add("--input", type=checked(parse_shapes), metavar="SHAPE", help="what --model takes; BATCHx3x224x224 if not given")
    add("--batch", type=checked(batches), metavar="SIZES", help="of networks; 64 on a GPU and 8 on a CPU if not given")
    add(
        "--dtype",
        type=names_of(tuple(DTYPES)),
        metavar="NAMES",
        help="bfloat16 on a GPU, float32 on a CPU if not given",
    )
    add("--parameters", choices=("float32", "same"), default="float32", help="dtype of 16-bit layers' parameters")
    add("--layout", type=names_of(LAYOUTS, "both"), default="both", metavar="NAMES", help=", ".join(LAYOUTS) + ", both")
    add("--epilogue", type=names_of(EPILOGUES), default="none", metavar="NAMES", help=", ".join(EPILOGUES) + ", all")
    add("--phase", type=names_of(tuple(PHASES)), default="all", metavar="NAMES", help=", ".join(PHASES) + ", all")
    add("--providers", type=checked(parse_providers), default="bnext,eager,compile", metavar="NAMES",
        help="comma-separated: " + ", ".join(PROVIDERS) + ", bnext:PLAN")  # fmt: skip
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--threads", type=checked(numbers), default="1,all", metavar="NUMBERS", help="of threads on the CPU")
    add("--cold", action="store_true", help="on the CPU, empty the caches before each call (a GPU's always are)")
    add("--seconds", type=checked(duration), default=0.3, help="for which each provider is sampled in each case")
    add("--runs", type=int, choices=range(1, 10), default=1, metavar="NUMBER",
        help="whole runs, each in a process of its own, to tell changes from the spread between runs")  # fmt: skip
    add("--dry", action="store_true", help="only say how many cases there are, and about how long they take")
    add("--child", type=Path, help=argparse.SUPPRESS)  # one of several runs, with its result in this file
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


def workloads(args: argparse.Namespace, sizes: Sequence[int]) -> Workloads:
    if args.shapes:
        return {("shapes", None): args.shapes}
    if args.model and args.input:
        return {("model", None): model_layers(args.model, args.input[0].shape)}
    if args.model:
        return {("model", size): model_layers(args.model, (size, 3, 224, 224)) for size in sizes}
    networks = {(name, size): suite(name, size) for name in args.suite if name in NETWORKS for size in sizes}
    return networks | {(name, None): suite(name, 0) for name in args.suite if name in SHAPES}


def measured(args: argparse.Namespace, todo: Sequence[Case], environment: dict, save: Callable) -> tuple[list, bool]:
    """The rows, and whether these are all. `save` gets them as they come."""
    rows: list[Row] = []
    try:
        for row in run(todo, args.providers, args.seconds):
            rows.append(row)
            if len(rows) % len(args.providers) == 0:
                save(rows, environment, False)
    except KeyboardInterrupt:
        print("interrupted: what follows is what was measured until then", file=sys.stderr)
        return rows, False
    return rows, True


def wanted(args: argparse.Namespace, options: argparse.ArgumentParser) -> list[Case]:
    """The cases that the arguments ask for. Touches no GPU."""
    where = devices(args.device, args.threads, args.cold)
    cuda = where[0].kind == "cuda"
    try:
        what = workloads(args, args.batch or ([64] if cuda else [8]))
    except ValueError as error:
        options.error(f"argument --model: {' '.join(str(error).split())}")
    dtypes = args.dtype or (["bfloat16"] if cuda else ["float32"])
    phases = [PHASES[name] for name in args.phase]
    return list(cases(what, dtypes, args.layout, args.epilogue, args.parameters, phases, where))


def amount(argv: Sequence[str]) -> tuple[int, int, float]:
    """How many cases and rows a command line has, and about how many seconds it takes."""
    options = parser()
    args = options.parse_args(argv)
    todo = wanted(args, options)
    rows = args.runs * len(args.providers) * sum(len(case.phases) for case in todo)
    return len(todo), rows, args.runs * estimate(todo, args.providers, args.seconds)


def main(argv: Sequence[str]) -> int:
    options = parser()
    args = options.parse_args(argv)
    if args.list:
        print(listing())
        return 0
    if args.dry:
        print("{} cases, {} rows, about {:.0f} s".format(*amount(argv)))
        return 0
    todo = wanted(args, options)
    device = todo[0].device.kind
    if device == "cuda" and not torch.cuda.is_available():
        options.error("argument --device: torch sees no CUDA GPU")
    heap = reuse_heap()
    caches = "cold" if args.cold or device == "cuda" else "warm"
    environment = report.environment(device) | {"heap": "reused" if heap else "default", "caches": caches}
    suites = list(dict.fromkeys(case.suite for case in todo))
    name = report.default_path(environment, "all" if set(SUITES) <= set(suites) else "-".join(suites))
    json_path, plot_path = (
        name.with_suffix(suffix) if path == Path() else path
        for path, suffix in ((args.child or args.json, ".json"), (None if args.child else args.plot, ".png"))
    )
    for path in filter(None, (json_path, plot_path)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            options.error(f"{path.parent}: {error.strerror}")

    def save(rows: Sequence[Row], environment: dict, complete: bool) -> None:
        if json_path is not None:
            report.save(json_path, rows, environment, command_line(argv), complete)

    if args.runs > 1 and not args.child:
        rows, complete = repeat.runs(argv, args.runs)
    else:
        rows, complete = measured(args, todo, environment, save)
    save(rows, environment, complete)
    if args.child:
        return 1 if any(row.is_wrong for row in rows) else 0
    print(report.table(rows), report.overview(rows), sep="\n\n")
    if plot_path is not None:
        from bench import plot

        plot.draw(rows, environment, plot_path)
    for path in filter(None, (json_path, plot_path)):
        print(f"wrote {path}")
    return 1 if any(row.is_wrong for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
