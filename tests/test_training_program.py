"""examples/train.py and what comes after it: its options, data sets, checkpoints, interruptions and processes."""

from __future__ import annotations

import functools
import gzip
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from compiler import PATIENCE
from torch import nn

import bnext
from examples.data import Data, Images, load
from examples.networks import NETWORKS

pytest.importorskip("sklearn")
train = pytest.importorskip("examples.train")  # which needs tqdm
training = pytest.importorskip("examples.training")
after_training = pytest.importorskip("examples.after_training")
Training, evaluate, prepare = training.Training, training.evaluate, training.prepare

ROOT = Path(__file__).parent.parent


def small(whole: Data, images: int = 96) -> Data:
    parts = [Images(part.pixels[:images], part.labels[:images], part.size) for part in (whole.train, whole.test)]
    return replace(whole, train=parts[0], test=parts[1])


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch, tmp_path):
    """The program writes build/MODEL.pt where it runs: not in the project's own folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def few(monkeypatch):
    """The program sees the first images alone."""
    for module in (train, after_training):
        monkeypatch.setattr(module, "load", lambda *arguments: small(load(*arguments)))


def run(*words: object) -> Training:
    return train.main([*map(str, words), "--device", "cpu"])


def assert_same_state(one: Training, other: Training):
    """To the bit: the network, and what it was measured by, but for seconds."""
    assert [replace(e, seconds=0) for e in one.epochs] == [replace(e, seconds=0) for e in other.epochs]
    for name, value in one.network.state_dict().items():
        assert torch.equal(value, other.network.state_dict()[name]), name


# ---- training


@pytest.mark.parametrize("norm", [("torch",), ("none",), ("bnext",), ("bnext", "--fuse")], ids=" ".join)
@pytest.mark.parametrize(
    "model", [pytest.param(name, marks=pytest.mark.slow) if name == "resnet18" else name for name in NETWORKS]
)
def test_every_network_trains(few, model, norm):
    made = run("--model", model, "--epochs", 2, "--batch-size", 16, "--norm", *norm)
    assert made.epochs[1].loss < made.epochs[0].loss
    kinds = {type(layer) for layer in made.network.modules()}
    assert (bnext.BatchNorm2d in kinds, nn.BatchNorm2d in kinds) == (norm[0] == "bnext", norm[0] == "torch")
    assert ("--fuse" in norm) == any(getattr(layer, "activation", None) for layer in made.network.modules())


@pytest.mark.slow
@pytest.mark.parametrize("model, size", [("resnet18", 224), ("densenet", 96)])
def test_size(monkeypatch, model, size):
    """The inputs that these networks were described for."""
    monkeypatch.setattr(train, "load", lambda *arguments: small(load(*arguments), 16))
    made, seen = run("--model", model, "--size", size, "--epochs", 0, "--batch-size", 8), []
    made.network.register_forward_pre_hook(lambda network, args: seen.append(args[0].shape))
    made.train(1)
    assert seen == [*[(8, 1, size, size)] * 2, (16, 1, size, size)] and made.epochs[0].loss < 4


def test_accuracy_is_that_of_the_test_images():
    """Of all of them, the last batch of another size too."""
    whole = load("digits", 28)
    network = bnext.convert(prepare("lenet", whole))
    network(whole.train.batch(torch.arange(64))[0])
    loss, accuracy = evaluate(network, small(whole, 357).test)
    logits = network.eval()(whole.test.batch(torch.arange(357))[0])
    labels = whole.test.labels[:357]
    assert accuracy == (logits.argmax(1) == labels).double().mean().item()
    assert loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


def test_a_seed_is_a_run(few):
    runs = [run("--epochs", 2, "--seed", seed) for seed in (1, 1, 2)]
    assert_same_state(*runs[:2])
    assert runs[0].losses == runs[1].losses != runs[2].losses


def test_progress_shows_loss_accuracy_and_speed(few, monkeypatch, capsys):
    monkeypatch.setattr(training, "tqdm", functools.partial(training.tqdm, mininterval=0))
    run("--epochs", 1, "--batch-size", 16)
    said = capsys.readouterr()
    assert all(word in said.err for word in ("lenet, epoch 1", "loss=", "accuracy=", "images/s"))
    assert all(word in said.out for word in ("epoch   1", "loss", "test accuracy", "images/s"))


def test_channels_last(few):
    made, seen = run("--data", "fake", "--size", 32, "--epochs", 0, "--channels-last"), []
    made.network[0].register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    made.epoch()
    evaluation = seen[-1]
    for t in (made.network[0].weight, seen[0], evaluation):
        assert t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


def test_evaluation_by_the_batch_changes_nothing(few):
    made = run("--epochs", 1)
    before = {name: value.clone() for name, value in made.network.state_dict().items()}
    assert evaluate(made.network, made.data.test, by_batch=True) != evaluate(made.network, made.data.test)
    assert made.network.training
    assert all(torch.equal(value, before[name]) for name, value in made.network.state_dict().items())


def test_amp(few):
    made, dtypes = run("--epochs", 1, "--amp", "bf16"), set()
    made.network[1].register_forward_hook(lambda layer, args, y: dtypes.add(y.dtype) if layer.training else None)
    made.epoch()
    assert dtypes == {torch.bfloat16} and made.network[0].weight.dtype == torch.float32


def test_recompute(few):
    images = torch.randn(16, 1, 28, 28)
    made = run("--epochs", 1, "--fuse", "--recompute")
    plain = run("--epochs", 1, "--fuse")
    assert made.losses == plain.losses  # to the bit
    after = bnext.memory(plain.network.train(), images).total.after
    assert kept_bytes(made.network.train(), images) == after < kept_bytes(plain.network.train(), images)


def kept_bytes(network: nn.Module, images: torch.Tensor) -> int:
    """Counted from outside, as the network is."""
    seen = {t.untyped_storage().data_ptr(): 0 for t in (*network.parameters(), *network.buffers())}
    alive = []

    def pack(t):
        if t.layout is torch.strided:
            alive.append(t)
            seen.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        network(images)
    return sum(seen.values())


@pytest.mark.slow
def test_compile(few):
    compiled, eager = (run("--epochs", 1, *flags) for flags in (["--compile"], []))
    assert hasattr(compiled.forward, "_torchdynamo_orig_callable") or isinstance(
        compiled.forward, torch._dynamo.OptimizedModule
    )
    assert compiled.losses == pytest.approx(eager.losses, rel=1e-5)
    assert list(compiled.network.state_dict()) == list(eager.network.state_dict())


def test_wrong_options_say_so(few, capsys):
    for words, message in (
        (("--norm", "torch", "--fuse"), "--fuse and --recompute need --norm bnext, not torch"),
        (("--norm", "none", "--recompute"), "--fuse and --recompute need --norm bnext, not none"),
        (("--model", "vgg"), "argument --model: invalid choice: 'vgg'"),
    ):
        with pytest.raises(SystemExit):
            run(*words)
        assert message in capsys.readouterr().err
    for words, message in (
        (("--batch-size", 97), "batch_size should be from 2 to the 96 images, not 97"),
        (("--model", "densenet", "--size", 16), "size should be 32 or more for densenet, not 16"),
    ):
        with pytest.raises(ValueError, match=message):
            run(*words)
    with pytest.raises(ValueError, match="model should be one of lenet, resnet18, densenet, not 'vgg'"):
        prepare("vgg", load("digits"))
    with pytest.raises(ValueError, match="fuse and recompute need norm='bnext', not 'torch'"):
        prepare("lenet", load("digits", 28), "torch", fuse=True)
    with pytest.raises(ValueError, match="name should be one of digits, fashion-mnist, cifar10, fake, not 'mnist'"):
        load("mnist")


# ---- checkpoints


def test_resuming_is_going_on(few, tmp_path):
    file = tmp_path / "folder" / "run.pt"
    whole = run("--epochs", 3)
    run("--epochs", 1, "--checkpoint", file)
    assert_same_state(run("--epochs", 3, "--resume", file), whole)


@pytest.mark.parametrize("flags", [("--checkpoint", "folder/run.pt"), ()], ids=["said", "default"])
def test_ctrl_c_leaves_a_usable_checkpoint(few, monkeypatch, capsys, flags):
    """Here in the middle of the second epoch, whose steps are lost."""
    file = Path(flags[1] if flags else "build/lenet.pt")
    step, steps = Training._step, []

    def interrupted(self, images, labels):
        steps.append(1)
        if len(steps) == 8:
            signal.raise_signal(signal.SIGINT)
        return step(self, images, labels)

    options = ("--batch-size", 16, *flags)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have it ignored in the background
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Training, "_step", interrupted)
            with pytest.raises(SystemExit) as exit:
                run("--epochs", 3, *options)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert exit.value.code == 130 and len(steps) == 8
    said = capsys.readouterr().out
    assert f"checkpoint after each epoch: {file}\n" in said and f"To go on: --resume {file}\n" in said
    assert len(torch.load(file, weights_only=True)["epochs"]) == 1
    whole = run("--epochs", 3, "--batch-size", 16, "--checkpoint", "whole.pt")
    assert_same_state(run("--epochs", 3, "--resume", file, *options), whole)


def test_each_model_has_a_checkpoint_of_its_own(few):
    for model in NETWORKS:
        run("--model", model, "--epochs", 0)
    assert sorted(Path().rglob("*.*")) == [Path("build", f"{model}.pt") for model in sorted(NETWORKS)]


def test_a_run_that_goes_on_saves_to_the_same_file(few):
    """Unless --checkpoint says another one: then the first stays as it is."""
    run("--epochs", 1, "--checkpoint", "run.pt")
    run("--epochs", 2, "--resume", "run.pt")
    run("--epochs", 3, "--resume", "run.pt", "--checkpoint", "other.pt")
    files = {"run.pt": 2, "other.pt": 3}
    assert sorted(Path().rglob("*.*")) == sorted(map(Path, files))
    for file, epochs in files.items():
        assert len(torch.load(file, weights_only=True)["epochs"]) == epochs


def test_a_checkpoint_is_there_before_the_first_epoch(few, tmp_path):
    file = tmp_path / "run.pt"
    run("--epochs", 0, "--checkpoint", file)
    assert_same_state(run("--epochs", 1, "--resume", file), run("--epochs", 1))


def test_a_write_that_fails_leaves_the_old_checkpoint(few, tmp_path, monkeypatch):
    file = tmp_path / "run.pt"
    run("--epochs", 1, "--checkpoint", file)
    before = file.read_bytes()

    def broken(state, path):
        Path(path).write_bytes(b"half")
        raise OSError("no space")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="no space"):
        run("--epochs", 2, "--checkpoint", file)
    assert file.read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("first, then", [("torch", "bnext"), ("bnext", "torch"), ("torch", "bnext --fuse"), ("bnext --fuse", "torch")])  # fmt: skip
@pytest.mark.parametrize("model", NETWORKS)  # the trace of resnet18 has its layers in another order
def test_torch_and_bnext_load_each_others_checkpoints(few, tmp_path, model, first, then):
    file = tmp_path / "run.pt"
    options = ("--model", model, "--batch-size", 32, "--lr", 1e-4)
    before = run(*options, "--epochs", 1, "--norm", *first.split(), "--checkpoint", file)
    resumed = run(*options, "--epochs", 1, "--norm", *then.split(), "--resume", file)
    assert evaluate(resumed.network, resumed.data.test)[1] == before.epochs[-1].test_accuracy
    for name, value in before.network.state_dict().items():
        assert torch.equal(resumed.network.state_dict()[name], value), name
    # The optimizer's state, too, is that of the same parameters.
    assert len(resumed.optimizer.state) == len(list(resumed.network.parameters()))
    again, expected = (
        run(*options, "--epochs", 2, "--norm", *norm.split(), "--resume", file, "--checkpoint", "again.pt")
        for norm in (then, first)
    )
    assert again.losses == pytest.approx(expected.losses, rel=1e-3)


def test_only_weights_are_loaded(few, tmp_path):
    file = tmp_path / "run.pt"
    torch.save({"options": {}, "network": nn.Linear(1, 1)}, file)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        run("--resume", file)


def test_a_run_goes_on_as_it_began(few, tmp_path):
    file = tmp_path / "run.pt"
    run("--epochs", 1, "--checkpoint", file)
    for words, message in (
        (("--model", "resnet18"), "--resume .* goes on with --model lenet, not with --model resnet18"),
        (("--batch-size", 32), "--resume .* goes on with --batch-size 64, not with --batch-size 32"),
        (("--lr", 1), "--resume .* goes on with --lr 0.001, not with --lr 1.0"),
    ):
        with pytest.raises(SystemExit, match=message):
            run("--resume", file, *words)
    with pytest.raises(SystemExit, match="--resume should be a checkpoint .* there is no file nowhere"):
        run("--resume", "nowhere")


# ---- data sets


def test_digits():
    digits = load("digits", 28)
    assert digits.train.pixels.shape == (1437, 1, 8, 8) and len(digits.test) == 360 and digits.channels == 1
    images, labels = digits.train.batch(torch.tensor([3, 5]))
    assert images.shape == (2, 1, 28, 28) and images.min() == 0 and 0.9 < images.max() <= 1
    assert torch.equal(labels, digits.train.labels[[3, 5]])
    assert sum(len(labels) for _, labels in digits.test.batches(100)) == 360


def test_fake_data_can_be_learned(few):
    made = run("--data", "fake", "--size", 32, "--epochs", 6, "--batch-size", 16)
    assert made.data.channels == 3 and made.epochs[-1].accuracy > 0.9


def test_without_torchvision_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(SystemExit, match=r"--data cifar10 needs torchvision \(pip install torchvision\)"):
        run("--data", "cifar10", "--root", "nowhere")


def write_fashion_mnist(root: Path, rng: np.random.Generator) -> np.ndarray:
    """Its files: a big-endian header, then bytes. The images for training."""
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for part, count in (("t10k", 20), ("train", 40)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        for kind, values in (("images", images), ("labels", np.arange(count, dtype=np.uint8) % 10)):
            magic = 0x0800 + values.ndim
            content = np.array([magic, *values.shape], dtype=">i4").tobytes() + values.tobytes()
            name = folder / f"{part}-{kind}-idx{values.ndim}-ubyte"
            name.write_bytes(content)
            name.with_name(name.name + ".gz").write_bytes(gzip.compress(content))
    return images


def write_cifar10(root: Path, rng: np.random.Generator) -> np.ndarray:
    """Its files: pickles of rows, each the planes of an image. The images for training."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    parts = []
    for name in ("test_batch", *(f"data_batch_{i}" for i in range(1, 6))):
        rows = rng.integers(0, 256, (20, 3 * 32 * 32), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": rows, "labels": [i % 10 for i in range(20)]}))
        parts.append(rows.reshape(20, 3, 32, 32))
    return np.concatenate(parts[1:])


@pytest.mark.parametrize("name, write", [("fashion-mnist", write_fashion_mnist), ("cifar10", write_cifar10)])
def test_files_of_torchvision(library, monkeypatch, tmp_path, name, write):
    cifar = library("torchvision.datasets.cifar")
    # The sums are those of the real files.
    monkeypatch.setattr(cifar, "check_integrity", lambda path, md5=None: os.path.isfile(path))
    for root, message in (
        ("nowhere", f"--root nowhere should have the files of {name}: --download"),
        (None, "--root DIR"),
    ):
        with pytest.raises(SystemExit, match=message):
            load(name, root=root)
    images = write(tmp_path, np.random.default_rng(0))
    found = load(name, root=str(tmp_path))
    expected = torch.tensor(images).reshape(found.train.pixels.shape)
    assert torch.equal(found.train.pixels, expected)
    assert found.train.labels.dtype == torch.int64 and found.train.labels[:12].tolist() == [*range(10), 0, 1]
    assert len(found.test) == 20 and found.train.size == images.shape[-1]


def test_nothing_is_downloaded_unasked(monkeypatch):
    seen = []

    def loaded(*arguments):
        seen.append(arguments)
        return small(load("digits", 28))

    monkeypatch.setattr(train, "load", loaded)
    run("--epochs", 0, "--root", "here")
    run("--epochs", 0, "--root", "here", "--download")
    assert seen == [("digits", 28, "here", False), ("digits", 28, "here", True)]


# ---- several processes


def in_processes(*words: object, count: int = 2) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command += ["-m", "examples.train", *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--fuse",)], ids=["", "fused"])
def test_two_processes_are_as_one(tmp_path, flags):
    """Started by torchrun, on the joined batch. Not Adam, which makes steps of the rounding that is the whole gradient
    of a bias before a batch norm; running averages follow these biases later, and evaluation sees that."""
    options = ["--epochs", "2", "--device", "cpu", "--optimizer", "sgd", "--lr", "0.01", *flags]
    file = tmp_path / "two.pt"
    done = in_processes(*options, "--checkpoint", file)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch   1") == 1  # one of them speaks
    two, one = torch.load(file, weights_only=True), run(*options)
    for theirs, ours in zip(two["epochs"], one.epochs, strict=True):
        assert theirs["loss"] == pytest.approx(ours.loss, rel=1e-4)
        assert theirs["accuracy"] == pytest.approx(ours.accuracy, abs=1.5 / 1437)
        assert theirs["test_accuracy"] == pytest.approx(ours.test_accuracy, abs=1.5 / 360)
    for name, value in one.network.state_dict().items():
        if "running" in name:
            torch.testing.assert_close(
                two["network"][name], value, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.slow
@pytest.mark.parametrize(
    "words, message",
    [
        (("--norm", "torch"), "SyncBatchNorm expected input tensor to be on GPU"),  # torch.nn's own, not bnext's
        (("--batch-size", 63), "batch_size should be a multiple of the 2 processes, not 63"),
    ],
    ids=["torch.nn", "batch"],
)
def test_what_processes_cannot_do_is_an_error(tmp_path, words, message):
    done = in_processes(*words, "--device", "cpu", "--epochs", 1, "--checkpoint", tmp_path / "run.pt")
    assert done.returncode != 0 and message in done.stderr


# ---- after training


def test_statistics_of_the_training_set():
    trained = Training(prepare("lenet", load("digits", 28)), load("digits", 28))
    trained.train(1)
    updated = after_training.with_statistics_of(trained.data, trained.network)
    images, _ = trained.data.train.batch(torch.arange(1437))
    x = trained.network[0](images).double()
    torch.testing.assert_close(updated[1].running_mean.double(), x.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(updated[1].running_var.double(), x.var((0, 2, 3)), rtol=1e-5, atol=1e-6)
    before, after = (evaluate(network, trained.data.test)[1] for network in (trained.network, updated))
    assert before < 0.3 and after > 0.8
    assert not torch.equal(updated[1].running_mean, trained.network[1].running_mean)  # the copy's alone


@pytest.mark.parametrize("fuse", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("model, left", [("lenet", 0), ("resnet18", 0), ("densenet", 20)])
def test_folded_networks_predict_the_same(model, left, fuse):
    """In DenseNet, most batch norms come before their convolution, and stay."""
    few = small(load("digits", 32))
    network = prepare(model, few, fuse=fuse)
    for _ in range(2):
        network(few.train.batch(torch.arange(64))[0])
    for layer in network.modules():
        if isinstance(layer, bnext.nn._BatchNorm):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias, -0.5, 0.5)
    folded = after_training.fold(network)
    norms = [type(layer) for layer in folded.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    assert norms == [nn.BatchNorm2d] * left
    images = few.test.batch(torch.arange(32))[0]
    with torch.no_grad():
        torch.testing.assert_close(folded(images), network.eval()(images), rtol=1e-4, atol=1e-4)


def test_networks_of_keras_go_on_here():
    """Against its rule, in numpy: moving = decay * moving + (1 - decay) * batch's, with the biased variance."""
    decay, rng = 0.9, np.random.default_rng(0)
    batches = [torch.tensor(rng.normal(2, 3, (16, 3, 4, 4)), dtype=torch.float64) for _ in range(6)]
    mean, variance = np.zeros(3), np.ones(3)
    theirs = []
    for x in batches:
        mean = decay * mean + (1 - decay) * x.numpy().mean((0, 2, 3))
        variance = decay * variance + (1 - decay) * x.numpy().var((0, 2, 3))
        theirs.append((mean, variance))
    weights = {"gamma": [1.0, 2.0, -1.0], "beta": [0.0, 1.0, 2.0]}
    weights |= {"moving_mean": theirs[2][0], "moving_variance": theirs[2][1]}
    network = nn.Sequential(nn.BatchNorm2d(3)).double()
    network = after_training.from_keras(network, {"0": weights}, decay=decay, eps=1e-3)
    scale = weights["gamma"] / np.sqrt(theirs[2][1] + 1e-3)
    expected = (batches[0].numpy() - theirs[2][0][:, None, None]) * scale[:, None, None] + np.reshape(
        weights["beta"], (3, 1, 1)
    )
    torch.testing.assert_close(network.eval()(batches[0]), torch.tensor(expected))
    network.train()
    for x in batches[3:]:
        network(x)
    torch.testing.assert_close(network[0].running_mean, torch.tensor(theirs[-1][0]))
    torch.testing.assert_close(network[0].running_var, torch.tensor(theirs[-1][1]))
    with pytest.raises(ValueError, match="weights should be of 0, not of norm"):
        after_training.from_keras(network, {"norm": weights})


def test_after_training_tells_accuracies(few, tmp_path, capsys):
    file = tmp_path / "run.pt"
    made = run("--epochs", 2, "--batch-size", 16, "--checkpoint", file)
    accuracies = list(after_training.main([str(file)]).values())
    assert accuracies[0] == accuracies[1] == made.epochs[-1].test_accuracy
    assert accuracies[2] == accuracies[3] != accuracies[1]
    assert len(capsys.readouterr().out.splitlines()) >= 4
