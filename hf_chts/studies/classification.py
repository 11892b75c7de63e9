"""Image classification with an MLP (arXiv 2501.19107, Tables 4 and 7): SGD, an update of the topology every epoch.

Layers are sparse but for the last one. All of it is one process and one plain loop around an Evolver.
"""

import io
import math
import time
import zlib
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR

from hf_chts.config import SparsityConfig
from hf_chts.config_checks import unknown
from hf_chts.evolution.evolver import Evolver
from hf_chts.files.atomic import whole_file
from hf_chts.files.reading import reading
from hf_chts.machine import on_cpu
from hf_chts.sparse_model import SparsityHandle, sparsify
from hf_chts.studies.clock import Clock
from hf_chts.studies.figures import TOPOLOGY, TOPOLOGY_CURVES, Figure, best_of
from hf_chts.studies.images import NAMES, Images, load_images
from hf_chts.studies.study import Outcome, Run
from hf_chts.studies.tasks import TOO_MANY_THREADS, Say, check_positive, check_range, parsed, sparsity_config
from hf_chts.topology.bits import count_bits
from hf_chts.topology.percolation import End, Junction, anp_rate
from hf_chts.topology.random_streams import random_stream

FIGURES = {
    "accuracy_last": Figure("last epoch", "%", better="higher"),
    "accuracy_best": Figure("best epoch", "%", better="higher", papers=True),
    "accuracy_chosen": Figure("chosen epoch", "%", better="higher"),
    **TOPOLOGY,
    "state_mib": Figure("training state", "MiB", digits=1),
}
CURVES = {"accuracy": "test accuracy, %", **TOPOLOGY_CURVES}


@dataclass(frozen=True)
class Settings:
    """The settings of a run; the defaults are the paper's Table 4.

    Attributes:
        data: digits, fashion_mnist, mnist or emnist.
        sparsity: fields of SparsityConfig. topology_seed is the run's seed, update_interval comes from
            `update_epochs`, and the targets are the hidden layers.
        hidden: the width of the hidden layers, of which there are `layers`.
        rate, end_rate: the learning rate falls linearly from one to the other, until `rate_until` of the run.
        update_epochs: epochs between topology updates.
        held_out: images of the training set that are not trained on, to choose the best epoch by.
        threads: of the processor.
        checkpoint_epochs: epochs between checkpoints.
    """

    data: str
    sparsity: dict[str, Any] = field(default_factory=dict)
    hidden: int = 1568
    layers: int = 3
    epochs: int = 100
    batch: int = 32
    rate: float = 0.025
    end_rate: float = 2.5e-4
    rate_until: float = 0.9
    momentum: float = 0.9
    weight_decay: float = 5e-4
    update_epochs: float = 1.0
    held_out: int = 0
    threads: int = 1
    checkpoint_epochs: int = 5

    def __post_init__(self) -> None:
        check_positive(
            self,
            ("hidden", "layers", "epochs", "batch", "rate", "end_rate", "checkpoint_epochs", "update_epochs",
             "rate_until"),
        )  # fmt: skip
        check_range(self, ("threads",), 1, TOO_MANY_THREADS)
        check_range(self, ("held_out", "weight_decay"), 0)
        check_range(self, ("momentum",), 0, 1)
        if self.data not in NAMES:
            raise ValueError(unknown("data", self.data, NAMES))
        if self.end_rate > self.rate:
            raise ValueError(f"end_rate is {self.end_rate}, more than rate ({self.rate}): the learning rate only falls")
        if self.rate_until > 1:
            raise ValueError(f"rate_until is {self.rate_until}; it must be a share of the run, at most 1")
        self.config(0, 1)

    def config(self, seed: int, update_interval: int) -> SparsityConfig:
        """The sparsity of a run, of the hidden layers.

        Raises:
            ValueError: a field is bad, or follows from the other settings.
        """
        hidden = [str(2 * number) for number in range(self.layers)]
        own = {"topology_seed": seed, "update_interval": update_interval, "target_modules": hidden}
        return sparsity_config(self.sparsity, **own)


class _Trained:
    """The parts of a run that a checkpoint keeps."""

    def __init__(self, settings: Settings, images: Images, seed: int) -> None:
        torch.manual_seed(seed)
        self.settings, self.images = settings, images
        self.device = torch.device("cpu" if on_cpu() else torch.accelerator.current_accelerator() or "cpu")
        per_epoch = len(images.train) // settings.batch
        if not per_epoch:
            raise ValueError(f"a batch of {settings.batch} is more than the {len(images.train)} images to train on")
        self.per_epoch, self.max_steps = per_epoch, per_epoch * settings.epochs
        self.model = mlp(images.train.shape[1], settings.hidden, settings.layers, images.classes)
        config = settings.config(seed, max(1, round(settings.update_epochs * per_epoch)))
        self.sparse = sparsify(self.model, config, calibration=images.train)
        self.model.to(self.device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=settings.rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        end = max(1, int(settings.rate_until * self.max_steps))
        fall = 1 - settings.end_rate / settings.rate
        self.scheduler = LambdaLR(self.optimizer, lambda step: 1 - fall * min(step / end, 1.0))
        self.evolver: Evolver | None = None
        if not config.is_dense:
            self.evolver = self.sparse.evolver(self.optimizer, self.max_steps, tokens=settings.batch)
            self.evolver.scale_rate(self.scheduler)
        self.clock, self.curves, self.epoch = Clock(), dict[str, list[float]](), 0

    def save(self, path: Path) -> None:
        parts: dict[str, Any] = {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "clock": self.clock,
        }
        saved: dict[str, Any] = {name: part.state_dict() for name, part in parts.items()}
        saved |= {"evolver": self.evolver.state_dict() if self.evolver else None}
        saved |= {"curves": self.curves, "epoch": self.epoch}
        written = io.BytesIO()
        torch.save(saved, written)
        contents = written.getvalue()
        with whole_file(path) as file:
            file.write(contents + zlib.crc32(contents).to_bytes(4, "little"))

    def load(self, path: Path) -> None:
        with reading(path, "Remove it to begin the run anew"):
            if path.is_dir():
                raise ValueError("it is a folder")
            contents = path.read_bytes()
            # torch.load compares no checksums, and takes changed bytes without a word
            if zlib.crc32(contents[:-4]) != int.from_bytes(contents[-4:], "little"):
                raise ValueError("it is damaged: its checksum does not match")
            try:
                saved = torch.load(io.BytesIO(contents), weights_only=True, map_location=self.device)
            except (RuntimeError, UnpicklingError, EOFError) as error:
                raise ValueError(f"it is damaged ({type(error).__name__})") from error
        if self.evolver:
            self.evolver.load_state_dict(saved["evolver"])
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        self.clock.load_state_dict(saved["clock"])
        self.curves, self.epoch = saved["curves"], saved["epoch"]

    def train_epoch(self, seed: int) -> float:
        """One epoch; returns the mean loss."""
        batch, train = self.settings.batch, self.images.train
        order = torch.randperm(len(train), generator=random_stream(seed, "order", self.epoch))
        total = torch.zeros((), device=self.device)
        self.model.train()
        for number in range(self.per_epoch):
            chosen = order[number * batch : (number + 1) * batch]
            inputs, labels = train[chosen].to(self.device), self.images.train_labels[chosen].to(self.device)
            loss = functional.cross_entropy(self.model(inputs), labels)
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            if self.evolver:
                self.evolver.step()
            total += loss.detach()
        return float(total) / self.per_epoch

    @torch.no_grad()
    def accuracy(self, inputs: Tensor, labels: Tensor) -> float:
        """The share of images whose class is found, in percent."""
        self.model.eval()
        hits = 0
        for start in range(0, len(inputs), 1000):
            part = slice(start, start + 1000)
            hits += int((self.model(inputs[part].to(self.device)).argmax(-1).cpu() == labels[part]).sum())
        return 100 * hits / len(inputs)


def mlp(inputs: int, hidden: int, layers: int, classes: int) -> nn.Sequential:
    """An MLP with ReLU: `layers` hidden layers, named "0", "2", …, and one for the classes."""
    parts: list[nn.Module] = []
    for number in range(layers):
        parts += [nn.Linear(hidden if number else inputs, hidden), nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(hidden, classes))


def train(run: Run, say: Say) -> Outcome:
    """Train one MLP, or go on with it."""
    settings = parsed(Settings, run.settings)
    torch.set_num_threads(settings.threads)
    images = load_images(settings.data)
    chosen_by = None
    if settings.held_out:
        images, chosen_by = _split(images, settings.held_out)
    trained = _Trained(settings, images, run.seed)
    checkpoint = run.folder / "checkpoint.pt"
    if checkpoint.exists():
        trained.load(checkpoint)
        say(f"goes on after epoch {trained.epoch}")
    curves, clock = trained.curves, trained.clock
    for name in (
        "epoch",
        "accuracy",
        "loss",
        *(["held_out"] if chosen_by else []),
        "sparsity",
        "itop",
        "active_neurons",
    ):
        curves.setdefault(name, [])
    while trained.epoch < settings.epochs:
        with clock.running():
            loss = trained.train_epoch(run.seed)
        trained.epoch += 1
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} in epoch {trained.epoch}: lower the rate")
        curves["epoch"].append(trained.epoch)
        curves["accuracy"].append(round(trained.accuracy(images.test, images.test_labels), 4))
        curves["loss"].append(round(loss, 5))
        if chosen_by:
            curves["held_out"].append(round(trained.accuracy(*chosen_by), 4))
        for name, value in _topology(trained.sparse, trained.evolver).items():
            curves[name].append(round(value, 5))
        if trained.epoch % settings.checkpoint_epochs == 0 and trained.epoch < settings.epochs:
            trained.save(checkpoint)
        say(
            f"epoch {trained.epoch}: accuracy {curves['accuracy'][-1]:.2f}, loss {loss:.4f}, "
            f"itop {curves['itop'][-1]:.3f}, {clock.seconds:.0f} s, at {time.strftime('%H:%M:%S')}"
        )
    return Outcome(_figures(trained), curves, clock.seconds, clock.processor_seconds, trained.sparse.config.to_dict())


def _split(images: Images, held_out: int) -> tuple[Images, tuple[Tensor, Tensor]]:
    """The images without `held_out` of those to train on, and these."""
    if held_out >= len(images.train):
        raise ValueError(f"held_out is {held_out}, of {len(images.train)} images to train on")
    order = torch.randperm(len(images.train), generator=random_stream("held out"))
    kept, out = order[held_out:], order[:held_out]
    rest = Images(images.train[kept], images.train_labels[kept], images.test, images.test_labels)
    return rest, (images.train[out], images.train_labels[out])


def _topology(sparse: SparsityHandle, evolver: Evolver | None) -> dict[str, float]:
    """What curves have of the topology; a dense model has and explores all links."""
    if evolver is None:
        return {"sparsity": 0.0, "itop": 1.0, "active_neurons": 1.0}
    explored = sum(count_bits(bits) for bits in evolver.explored.values())
    possible = sum(math.prod(layer.storage.shape) for layer in sparse.layers.values())
    return {"sparsity": sparse.sparsity(), "itop": explored / possible, "active_neurons": active(sparse)}


def active(sparse: SparsityHandle) -> float:
    """Active neurons after percolation: the share of the layers' inputs and outputs that are on a path of links.

    A neuron without links on one side counts for nothing, although its bias may pass something on.
    """
    masks, names = sparse.masks(), list(sparse.layers)
    junctions = []
    for before, after in pairwise(names):
        nodes = torch.arange(masks[before].shape[0])[:, None]
        junctions.append(Junction((End(before, "output", nodes), End(after, "input", nodes))))
    return anp_rate(masks, junctions)


def _accuracies(curves: dict[str, list[float]]) -> dict[str, float]:
    """Test accuracy of the last epoch, of the best one, and of the one that held-out images choose if there are any."""
    accuracy = curves["accuracy"]
    figures = {"accuracy_last": accuracy[-1]}
    for name, of in {"best": "accuracy", "chosen": "held_out"}.items():
        if of in curves:
            at = best_of(curves[of], curves["sparsity"], "higher")
            assert at is not None  # an accuracy is finite, and the last epoch counts
            figures |= {f"accuracy_{name}": accuracy[at], f"epoch_{name}": at + 1.0}
    return figures


def _figures(trained: _Trained) -> dict[str, float]:
    curves = trained.curves
    figures = _accuracies(curves)
    figures |= {name: curves[name][-1] for name in ("itop", "active_neurons", "sparsity")}
    figures["links"] = float(trained.sparse.links() or sum(layer.weight.numel() for layer in _hidden(trained.model)))
    held_tensors = [*trained.model.parameters(), *trained.model.buffers()]
    held_tensors += [v for state in trained.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    gradients = sum(p.numel() * p.element_size() for p in trained.model.parameters())
    figures["state_mib"] = round((sum(t.numel() * t.element_size() for t in held_tensors) + gradients) / 2**20, 3)
    return figures


def _hidden(model: nn.Sequential) -> list[nn.Linear]:
    return [layer for layer in model if isinstance(layer, nn.Linear)][:-1]
