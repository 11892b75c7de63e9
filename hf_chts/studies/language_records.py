"""What a run of the language study records while it trains: evaluations, topology, links and seconds.

All of it goes into the Trainer's log, which its checkpoints keep, so that a resumed run goes on counting.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_chts.evolution.evolver import Evolver
from hf_chts.evolution.update_figures import LayerUpdate, counts_after, overall_figures
from hf_chts.studies.clock import Clock
from hf_chts.studies.language_data import Windows, bits_per_byte
from hf_chts.studies.tasks import Say
from hf_chts.training.trainer import SparseTrainer

_RECORD = "study_record"  # marks the entries of the log that are made here
_CURVES = ("validation_bits", "test_bits", "sparsity", "itop", "active_neurons")


class Records(TrainerCallback):
    """Evaluates every `interval` steps, and counts links and the seconds of training alone.

    Args:
        held_out: the windows to evaluate on, by split: validation and test.
        interval: in steps; checkpoints are to be made at the same ones.
        autocast: whether to evaluate with it.
        say: called with a line for each evaluation.

    Attributes:
        clock: seconds of training steps and topology updates, without evaluations and checkpoints.
        link_steps: the sum over the steps of the links that each was taken with.
        steps: how many these are.
    """

    def __init__(self, held_out: Mapping[str, Windows], interval: int, *, autocast: bool, say: Say) -> None:
        self.held_out, self.interval, self.autocast, self.say = held_out, interval, autocast, say
        self.clock = Clock()
        self.link_steps, self.steps = 0, 0
        self._timed = ExitStack()
        self._trainer: SparseTrainer | None = None

    def follow(self, trainer: SparseTrainer) -> None:
        """Record this trainer's run. The topology's own callback has been added before, and is called first."""
        self._trainer = trainer
        trainer.add_callback(self)

    @property
    def average_links(self) -> float:
        """Links of an average step; 0 before the first."""
        return self.link_steps / self.steps if self.steps else 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        entries = [entry for entry in state.log_history if _RECORD in entry]
        if entries:  # of the run that this one goes on with
            self.clock.load_state_dict(entries[-1])
            self.link_steps, self.steps = int(entries[-1]["link_steps"]), state.global_step

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self._trainer is not None
        self.link_steps += self._trainer.sparse.links()
        self.steps += 1
        self._timed.enter_context(self.clock.running())

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        self._timed.close()
        assert self._trainer is not None
        assert model is not None
        step = state.global_step
        if step % self.interval and step < state.max_steps:
            return
        bits: dict[str, float] = {
            f"{split}_bits": bits_per_byte(model, windows, autocast=self.autocast)
            for split, windows in self.held_out.items()
        }
        topology = topology_figures(self._trainer.evolver)
        state.log_history.append(
            {
                _RECORD: True,
                "step": step,
                **{name: round(value, 6) for name, value in (bits | topology).items()},
                **self.clock.state_dict(),
                "link_steps": self.link_steps,
            }
        )
        self.say(
            f"step {step:,}: {bits['validation_bits']:.4f} bits per byte of validation, sparsity "
            f"{topology['sparsity']:.4f}, ITOP {topology['itop']:.3f}, {self.clock.seconds:.0f} s"
        )

    def curves(self, log_history: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
        """The curves of a run; train_loss is the mean in nats per token since the evaluation before."""
        records = [entry for entry in log_history if _RECORD in entry]
        curves: dict[str, list[float]] = {"step": [float(entry["step"]) for entry in records]}
        curves["train_loss"] = _mean_losses(log_history, [entry["step"] for entry in records])
        return curves | {name: [entry[name] for entry in records] for name in _CURVES}


class OneRanksGradient(TrainerCallback):
    """Has regrowth by gradient see the last of a step's micro-batches alone.

    That is what one of several data-parallel ranks knows before gradients are summed up, as code does that reads them
    too early. The optimizer's gradient is that of all micro-batches.
    """

    def __init__(self, evolver: Evolver) -> None:
        self.evolver = evolver

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.evolver.engine is not None
        for name, layer in self.evolver.sparse.layers.items():
            if layer.dense_gradient is not None:  # forget what the micro-batches so far have added
                layer.dense_gradient = self.evolver.engine.dense_gradient(layer, self.evolver.owner[name])


def topology_figures(evolver: Evolver | None) -> dict[str, float]:
    """Sparsity, ITOP and the share of active neurons now; a dense model has and explores all links."""
    if evolver is None:
        return {"sparsity": 0.0, "itop": 1.0, "active_neurons": 1.0}
    layers, shapes = {}, {}
    for name, layer in evolver.sparse.layers.items():
        counts = counts_after(layer.topology[None], evolver.explored[name][None])[0].tolist()
        layers[name] = LayerUpdate(**dict(zip(("links", "active", "explored"), counts, strict=True)))
        shapes[name] = layer.storage.shape
    figures = overall_figures(layers, shapes)
    return {name: float(figures[name]) for name in ("sparsity", "itop", "active_neurons")}


def _mean_losses(log_history: Sequence[Mapping[str, Any]], steps: Sequence[int]) -> list[float]:
    """The mean loss of the steps up to each of `steps` from the one before it, from logs of means at any steps."""
    sums, counts = [0.0] * len(steps), [0] * len(steps)
    before = 0
    for entry in log_history:
        if "loss" not in entry:
            continue
        number = next((i for i, step in enumerate(steps) if entry["step"] <= step), None)
        if number is not None:
            sums[number] += entry["loss"] * (entry["step"] - before)
            counts[number] += entry["step"] - before
        before = entry["step"]
    return [round(total / max(1, count), 6) for total, count in zip(sums, counts, strict=True)]
