"""Stops a run that has diverged, before NaN or infinity is evolved, saved, chosen as the best model or pushed."""

import logging
import math
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_chts.checkpoint.run_folder import last_sealed
from hf_chts.evolution.held_tensors import MASTER, weights_and_moments, weights_of
from hf_chts.finite import not_finite
from hf_chts.names import listed
from hf_chts.sharding.ranks import rank_and_world
from hf_chts.sharding.zero import clear_padding
from hf_chts.training.any_trainer import AnyTrainer
from hf_chts.training.unlabelled import UnlabelledEvaluation, excuse_unlabelled, without_labels

_NEVER = 1 << 31
_REMEDY = "lower the learning rate, lengthen the warm-up or set max_grad_norm"

_log = logging.getLogger(__name__)


def last_whole(checkpoint: str | None) -> str:
    return f"The last whole checkpoint is {checkpoint}" if checkpoint else "There is no earlier checkpoint"


def diverged(step: int, names: list[str], output_dir: str | None, what: str) -> FloatingPointError:
    """The error for tensors that hold NaN or infinity after `step`.

    Args:
        names: of the tensors.
        output_dir: of the run, to name its last complete checkpoint.
        what: what is not done because of them, such as "nothing is pushed".
    """
    return FloatingPointError(
        f"after step {step} these hold NaN or infinity, so {what}: {listed(names)}. Go on from an earlier checkpoint, "
        f"and {_REMEDY}. {last_whole(last_sealed(output_dir or '.'))}"
    )


class Watch:
    """Records the first step with a loss or gradient that is not finite, and counts batches without labels.

    All of it stays on the device, so that the host does not wait for every loss.
    """

    def __init__(self, device: torch.device) -> None:
        never = torch.tensor(_NEVER, device=device)
        self.loss, self.gradient, self.unlabelled = never, never, torch.zeros_like(never)

    def add_loss(self, step: int, loss: Tensor, unlabelled: Tensor | None) -> None:
        self.loss = self._earliest(self.loss, step, excuse_unlabelled(loss, unlabelled))
        if unlabelled is not None:
            self.unlabelled = self.unlabelled + unlabelled.to(self.unlabelled.device)

    def add_gradient(self, step: int, norm: Tensor) -> None:
        self.gradient = self._earliest(self.gradient, step, norm)

    @staticmethod
    def _earliest(first: Tensor, step: int, value: Tensor) -> Tensor:
        finite = torch.isfinite(value.detach()).to(first.device)
        finite = finite.all() if finite.dim() else finite
        return torch.where(finite, first, first.clamp(max=step))

    def look(self, *, together: bool) -> tuple[int, int, int]:
        """First step of a bad loss, first step of a bad gradient (`_NEVER` if none), number of batches without labels.

        Args:
            together: over all ranks, not this one alone; collective.
        """
        mine = torch.stack([self.loss, self.gradient, self.unlabelled])
        of_ranks = [mine]
        if together and rank_and_world()[1] > 1:
            of_ranks = [torch.empty_like(mine) for _ in range(rank_and_world()[1])]
            dist.all_gather(of_ranks, mine)
        losses, gradients, unlabelled = zip(*torch.stack(of_ranks).tolist(), strict=True)
        return min(losses), min(gradients), sum(unlabelled)


class StopsOnDivergence(UnlabelledEvaluation, AnyTrainer):
    """The part of SparseTrainer that looks for NaN and infinity.

    Every loss and gradient norm is recorded on the device. The host reads the record where it waits for the device
    anyway: at each log of training and before each save; on a CPU and under DeepSpeed also after each backward pass.
    Weights and optimizer state are checked before they are saved or pushed, and at the end of training.
    """

    topology_callback: Any  # the TopologyCallback, or None for a dense run
    _watch: Watch | None = None
    _begun: bool = False  # the initial weights have been checked
    unlabelled: Tensor | None = None  # bool (): the labels of the last micro-batch are all -100
    _unlabelled_warned: int = 0

    def reset_watch(self) -> None:
        """Forget the record; called as training begins."""
        self._watch, self.unlabelled, self._unlabelled_warned, self._begun = None, None, 0, False

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if not self._begun:  # the first call once the checkpoint is loaded and the model prepared
            self._begun = True
            clear_padding(cast(nn.Module, self.model), self.optimizer)
            if bad := not_finite(weights_of(cast(nn.Module, self.model), frozen=True), device=self.args.device):
                raise FloatingPointError(
                    f"these weights hold NaN or infinity before step {self.state.global_step + 1}, so nothing is "
                    f"trained: {listed(bad)}. Load or initialize the model again"
                )
        super()._run_epoch(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """As `Trainer.training_step`; the loss of a batch without labels is 0, not NaN."""
        self.unlabelled = without_labels(inputs, shifted=getattr(self, "_loss_shifts_labels", False))
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._watched().add_loss(self.state.global_step + 1, loss, self.unlabelled)
        # with logging_nan_inf_filter the Trainer itself leaves NaN out of the loss that it logs
        return loss if self.args.logging_nan_inf_filter else excuse_unlabelled(loss, self.unlabelled)

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)
        # with fp16 an infinite gradient is no divergence: the loss scaler skips the step
        if norm is not None and self.accelerator.mixed_precision != "fp16":
            split = hasattr(norm, "to_local")  # FSDP2: each rank has the norm of its own part
            seen = norm if isinstance(norm, Tensor) else torch.tensor(norm, dtype=torch.float64)
            seen = cast(Any, seen).to_local() if split else seen
            seen = torch.where(seen < 0, math.nan, seen)  # DeepSpeed returns -1 for NaN and infinity
            self._watched().add_gradient(self.state.global_step + 1, seen)
            # only if the host has the norm already, and all ranks have the same one
            if not split and seen.device.type == "cpu" and not seen.isfinite().all():
                self._refuse_divergence(together=False)
        return norm

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As `Trainer.log`; checks the losses and gradients so far before a log of training."""
        if "train_loss" in logs or ("loss" in logs and self.control.should_log):  # only these are logged by all ranks
            self._refuse_divergence(together=True)
        super().log(logs, *args, **kwargs)

    def refuse_not_finite(self, what: str) -> None:
        """Check losses, gradients, weights and optimizer state on all ranks; `what` is as in `diverged`. Collective.

        Raises:
            FloatingPointError: one of them is or was NaN or infinite; the message has its name, the step and the last
                complete checkpoint.
        """
        self._refuse_divergence(together=True)
        held = weights_and_moments(cast(nn.Module, self.model), self.optimizer)
        if bad := not_finite(held, device=self.args.device):
            evolver = self.topology_callback.evolver if self.topology_callback is not None else None
            if MASTER in bad and evolver is not None and (engine := evolver.engine) is not None:
                # flat master weights name no layer
                parts = {name: list(engine.held(layer).values()) for name, layer in evolver.sparse.layers.items()}
                bad = [*not_finite(parts, device=self.args.device), *bad]
            raise diverged(self.state.global_step, bad, self.args.output_dir, what)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self.refuse_not_finite("the run does not end as a success")
        _, _, unlabelled = self._watched().look(together=True)
        if unlabelled > self._unlabelled_warned:
            self._warn_of_unlabelled(unlabelled, "in all")
        return super()._finalize_training(*args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.push_to_hub`. Collective.

        Raises:
            FloatingPointError: a weight is NaN or infinite. Nothing is saved or sent then.
        """
        if bad := not_finite(weights_of(cast(nn.Module, self.model)), device=self.args.device):
            raise diverged(self.state.global_step, bad, self.args.output_dir, "nothing is pushed")
        return super().push_to_hub(*args, **kwargs)

    def _watched(self) -> Watch:
        if self._watch is None:
            self._watch = Watch(self.args.device)
        return self._watch

    def _refuse_divergence(self, *, together: bool) -> None:
        """Raises FloatingPointError if a loss or a gradient was NaN or infinite."""
        loss, gradient, unlabelled = self._watched().look(together=together)
        if min(loss, gradient) < _NEVER:
            what = "the loss" if loss <= gradient else "the gradient (with a finite loss)"
            if self._unlabelled_warned or unlabelled:
                what += ", maybe because a loss of your own divides by the number of labels of a batch without any,"
            raise FloatingPointError(
                f"{what} was NaN or infinite in step {min(loss, gradient)}: {_REMEDY}. "
                f"{last_whole(last_sealed(self.args.output_dir or '.'))}"
            )
        if together and unlabelled and not self._unlabelled_warned:
            self._warn_of_unlabelled(unlabelled, "so far")

    def _warn_of_unlabelled(self, number: int, when: str) -> None:
        self._unlabelled_warned = number
        if self.is_world_process_zero():
            _log.warning(
                "%d micro-batches %s have no label to learn (all are -100): they add nothing to loss and gradient, and "
                "training goes on. Too long prompts or too short windows do that",
                number, when,
            )  # fmt: skip
