"""Trains LeNet, ResNet-18 or DenseNet, with bnext's batch normalization, with torch.nn's, or without:

    python -m examples.train
    python -m examples.train --model resnet18 --fuse --epochs 3 --checkpoint build/fused.pt
    python -m examples.train --epochs 20 --resume build/lenet.pt
    python -m examples.train --model densenet --data cifar10 --root data --download --device cuda --amp bf16
    torchrun --nproc-per-node 2 -m examples.train --model lenet

The checkpoint, build/MODEL.pt unless something else is said, is what the last whole epoch left, also after Ctrl-C;
--resume goes on from it to the same result that training without a break gives, and saves to the same file. Several
processes share each batch, and normalize by the statistics of all of it.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch

from examples.data import DATA, load
from examples.networks import NETWORKS
from examples.processes import joined, rank
from examples.training import OPTIMIZERS, Training, prepare

#: What a run goes on with as it began: the rest may change from one --resume to the next.
KEPT = ("model", "data", "size", "batch_size", "lr", "optimizer", "seed")


def main(arguments: list[str] | None = None) -> Training:
    options = parse(arguments)
    name = options.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    with joined(torch.device(name)) as device:
        return run(options, device)


def run(options: argparse.Namespace, device: torch.device) -> Training:
    say = print if rank() == 0 else lambda *words: None
    data = load(options.data, options.size, options.root, options.download)
    network = prepare(
        options.model, data, options.norm, fuse=options.fuse, recompute=options.recompute, seed=options.seed
    )
    training = Training(
        network,
        data,
        batch_size=options.batch_size,
        lr=options.lr,
        optimizer=options.optimizer,
        device=device,
        seed=options.seed,
        amp=options.amp == "bf16",
        channels_last=options.channels_last,
        compiled=options.compile,
        title=options.model,
    )
    if options.resume:
        training.load_state(read(options.resume, options))
    images = f"{len(data.train)} images of {data.train.size}"
    say(f"{options.model}, norm {options.norm}, on {data.name} ({images}), {device}")
    say(f"checkpoint after each epoch: {options.checkpoint}")

    def after_each() -> None:
        epoch = training.epochs[-1]
        speed = len(data.train) / epoch.seconds
        say(
            f"epoch {len(training.epochs):3}  loss {epoch.loss:.4f}  accuracy {epoch.accuracy:6.1%}  "
            f"test loss {epoch.test_loss:.4f}  test accuracy {epoch.test_accuracy:6.1%}  {speed:6.0f} images/s"
        )
        write(options.checkpoint, training, options)

    write(options.checkpoint, training, options)
    try:
        training.train(options.epochs, after_each)
    except KeyboardInterrupt:
        say(f"Interrupted after {len(training.epochs)} whole epochs.")
        say(f"To go on: --resume {options.checkpoint}")
        raise SystemExit(130) from None
    return training


def write(path: Path, training: Training, options: argparse.Namespace) -> None:
    """Whole or not at all: what was there stays until the new one is complete."""
    if rank() > 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    torch.save({"options": {name: getattr(options, name) for name in KEPT}, **training.state()}, unfinished)
    os.replace(unfinished, path)


def read(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The state that `write` wrote, of a run with the same options."""
    if not path.is_file():
        raise SystemExit(f"--resume should be a checkpoint of this program: there is no file {path}")
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name in KEPT:
        there, here = state["options"][name], getattr(options, name)
        if there != here:
            flag = name.replace("_", "-")
            raise SystemExit(f"--resume {path} goes on with --{flag} {there}, not with --{flag} {here}")
    return state


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=NETWORKS, default="lenet")
    parser.add_argument("--norm", choices=("bnext", "torch", "none"), default="bnext")
    parser.add_argument("--data", choices=DATA, default="digits", help="fake: patterns under noise")
    parser.add_argument("--size", type=int, help="height and width of the inputs; default: 28 for lenet, 32 for others")
    parser.add_argument("--root", help="the folder of torchvision's data sets")
    parser.add_argument("--download", action="store_true", help="fetch what is missing in --root")
    parser.add_argument("--epochs", type=int, default=10, help="in all, with those before --resume")
    parser.add_argument("--batch-size", type=int, default=64, help="of all processes together")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adam")
    parser.add_argument("--amp", choices=("bf16",), help="autocast")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--fuse", action="store_true", help="bnext.fuse: activations and sums with the batch norms")
    parser.add_argument("--recompute", action="store_true", help="bnext.recompute: less memory")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto: cuda where there is a GPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--checkpoint", type=Path, help="file that is written after each epoch; default: --resume's, or build/MODEL.pt"
    )
    parser.add_argument("--resume", type=Path, help="file that --checkpoint wrote, by the same model, data and rates")
    options = parser.parse_args(arguments)
    if options.norm != "bnext" and (options.fuse or options.recompute):
        parser.error(f"--fuse and --recompute need --norm bnext, not {options.norm}")
    options.checkpoint = options.checkpoint or options.resume or Path(f"build/{options.model}.pt")
    options.size = options.size or (28 if options.model == "lenet" else 32)
    return options


if __name__ == "__main__":
    main()
