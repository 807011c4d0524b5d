"""What comes after training: statistics of the whole training set, and networks of torch.nn and of Keras.

python -m examples.train
python -m examples.after_training build/lenet.pt
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import fusion

import bnext
from examples.data import Data, load
from examples.training import evaluate, prepare

__all__ = ["fold", "from_keras", "with_statistics_of"]

#: What folds a batch norm into each of these.
_FOLDS: dict[type[nn.Module], Any] = {
    nn.Conv2d: fusion.fuse_conv_bn_eval,
    nn.Linear: fusion.fuse_linear_bn_eval,
}


def with_statistics_of(data: Data, network: nn.Module) -> nn.Module:
    """A copy whose running statistics are those of the training set, in place of averages of the last batches."""
    network = copy.deepcopy(network)
    bnext.update_statistics(network, data.train.batches(500))
    return network


def fold(network: nn.Module) -> nn.Module:
    """A copy for inference, of torch.nn's layers: batch norms behind convolutions and linear layers are part of these.
    Fused activations become layers of their own."""
    folded = bnext.revert(fx.symbolic_trace(copy.deepcopy(network))).eval()
    modules = dict(folded.named_modules())
    for node in list(folded.graph.nodes):
        norm = modules.get(node.target) if node.op == "call_module" else None
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
            continue
        before = node.args[0]
        layer = modules.get(before.target) if before.op == "call_module" and len(before.users) == 1 else None
        into = _FOLDS.get(type(layer)) if layer is not None else None
        if into is not None:
            folded.set_submodule(before.target, into(layer, norm))
            node.replace_all_uses_with(before)
            folded.graph.erase_node(node)
    folded.delete_all_unused_submodules()
    folded.recompile()
    return folded


def from_keras(
    network: nn.Module, weights: Mapping[str, Mapping[str, Any]], *, decay: float = 0.99, eps: float = 1e-3
) -> nn.Module:
    """Gives the batch norms of `network` the weights and the convention of Keras, so that training goes on as there.

    Args:
        network: changed: its batch norms become bnext's.
        weights: gamma, beta, moving_mean and moving_variance of each, by its name in `network`.
        decay: the `momentum` of Keras.
        eps: the `epsilon` of Keras.

    Raises:
        ValueError: `weights` lacks a batch norm, or has one too many.
    """
    bnext.convert(network, strict=True)
    norms = {name: layer for name, layer in network.named_modules() if isinstance(layer, bnext.nn._BatchNorm)}
    if set(norms) != set(weights):
        raise ValueError(f"weights should be of {', '.join(norms)}, not of {', '.join(weights)}")
    for name, layer in norms.items():
        layer.momentum, layer.unbiased, layer.eps = 1 - decay, False, eps
        bnext.keras.load_weights(layer, **weights[name])
    return network


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="of examples.train, with --norm bnext or torch")
    parser.add_argument("--root", help="the folder of torchvision's data sets")
    chosen = parser.parse_args(arguments)
    state = torch.load(chosen.checkpoint, map_location="cpu", weights_only=True)
    options = state["options"]
    data = load(options["data"], options["size"], chosen.root)
    networks = {"torch.nn": prepare(options["model"], data, "torch"), "bnext": prepare(options["model"], data, "bnext")}
    for network in networks.values():
        network.load_state_dict(state["network"])
    networks["bnext, statistics of the training set"] = updated = with_statistics_of(data, networks["bnext"])
    networks["the same, folded into torch.nn's convolutions"] = fold(updated)
    accuracies = {}
    for name, network in networks.items():
        loss, accuracies[name] = evaluate(network, data.test)
        print(f"{name:45}  test loss {loss:.4f}  accuracy {accuracies[name]:.1%}")
    return accuracies


if __name__ == "__main__":
    main()
