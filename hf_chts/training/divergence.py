"""A run that has diverged stops: nothing that is not finite is evolved, saved, called best or pushed."""

import logging
import math
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer

from hf_chts.layers.shares import some
from hf_chts.seal import last_sealed
from hf_chts.sharding.ranks import rank_and_world
from hf_chts.training.not_finite import MASTER, not_finite, weights_and_moments, weights_of
from hf_chts.training.unlabelled import UnlabelledEvaluation, excused, without_labels

if TYPE_CHECKING:
    from hf_chts.training.callback import TopologyCallback

    _AnyTrainer = Trainer
else:
    _AnyTrainer = object

_NEVER = 1 << 31
_REMEDY = "lower the learning rate, lengthen the warm-up or set max_grad_norm"

_log = logging.getLogger(__name__)


def last_whole(checkpoint: str | None) -> str:
    return f"The last whole checkpoint is {checkpoint}" if checkpoint else "There is no earlier checkpoint"


def diverged(step: int, names: list[str], output_dir: str | None, what: str) -> FloatingPointError:
    """What is raised where tensors hold NaN or infinity after `step`; `what` says what is not done with them."""
    return FloatingPointError(
        f"after step {step} these hold NaN or infinity, so {what}: {some(names)}. Go on from an earlier checkpoint, "
        f"and {_REMEDY}. {last_whole(last_sealed(output_dir or '.'))}"
    )


class Watch:
    """The first step with a loss, and with a gradient, that is not finite; and how many batches had no labels.

    All of it is kept on the device: to look at each loss would have it wait.
    """

    def __init__(self, device: torch.device) -> None:
        never = torch.tensor(_NEVER, device=device)
        self.loss, self.gradient, self.unlabelled = never, never, torch.zeros_like(never)

    def add_loss(self, step: int, loss: Tensor, unlabelled: Tensor | None) -> None:
        self.loss = self._earliest(self.loss, step, excused(loss, unlabelled))
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
        """The three numbers, of this rank or of all together. Collective if `together`."""
        mine = torch.stack([self.loss, self.gradient, self.unlabelled])
        of_ranks = [mine]
        if together and rank_and_world()[1] > 1:
            of_ranks = [torch.empty_like(mine) for _ in range(rank_and_world()[1])]
            dist.all_gather(of_ranks, mine)
        losses, gradients, unlabelled = zip(*torch.stack(of_ranks).tolist(), strict=True)
        return min(losses), min(gradients), sum(unlabelled)


class StopsOnDivergence(UnlabelledEvaluation, _AnyTrainer):
    """The part of SparseTrainer that looks for NaN and infinity.

    Losses and gradients are watched all the time. They are looked at where the host waits for the device anyway: the
    gradient at once on a CPU and under DeepSpeed, before the optimizer steps where it has not yet; and in any case with
    each log of training and before anything is saved. What is saved or pushed is read itself, and what is left at the
    end of training.
    """

    topology_callback: "TopologyCallback | None"
    _watch: Watch | None = None
    _begun: bool = False  # whether the weights that training begins with were read
    unlabelled: Tensor | None = None  # whether the labels of the last micro-batch are all -100
    _unlabelled_said: int = 0

    def watch_anew(self) -> None:
        """Training begins: nothing has been seen of it."""
        self._watch, self.unlabelled, self._unlabelled_said, self._begun = None, None, 0, False

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if not self._begun:  # the first thing that comes when a checkpoint is loaded, and all is prepared
            self._begun = True
            if bad := not_finite(weights_of(cast(nn.Module, self.model), frozen=True), self.args.device):
                raise FloatingPointError(
                    f"these weights hold NaN or infinity before step {self.state.global_step + 1}, so nothing is "
                    f"trained: {some(bad)}. Load or initialize them anew"
                )
        super()._run_epoch(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """As `Trainer.training_step`; the loss of a batch without labels is 0 where it would be logged as it is."""
        self.unlabelled = without_labels(inputs, shifted=getattr(self, "_loss_shifts_labels", False))
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._watched().add_loss(self.state.global_step + 1, loss, self.unlabelled)
        # else the Trainer leaves it out of the loss that it logs
        return loss if self.args.logging_nan_inf_filter else excused(loss, self.unlabelled)

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)
        # with a scaler infinite gradients are none of a divergence, and it leaves out the step
        if norm is not None and self.accelerator.mixed_precision != "fp16":
            split = hasattr(norm, "to_local")  # under FSDP2 each rank has the norm of its own part
            seen = norm if isinstance(norm, Tensor) else torch.tensor(norm, dtype=torch.float64)
            seen = cast(Any, seen).to_local() if split else seen
            seen = torch.where(seen < 0, math.nan, seen)  # what DeepSpeed says for NaN and infinity is -1
            self._watched().add_gradient(self.state.global_step + 1, seen)
            # where the host has it, and it is the same on all ranks
            if not split and seen.device.type == "cpu" and not seen.isfinite().all():
                self._refuse_divergence(together=False)
        return norm

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As `Trainer.log`; a log of training is preceded by a look at the losses and gradients until then."""
        if "train_loss" in logs or ("loss" in logs and self.control.should_log):  # what all ranks log together
            self._refuse_divergence(together=True)
        super().log(logs, *args, **kwargs)

    def refuse_not_finite(self, what: str) -> None:
        """Look at losses, gradients, weights and the optimizer's state; `what` says what is not done. Collective.

        Raises:
            FloatingPointError: something was or is NaN or infinite, on any rank; the message says what, the step, and
                which checkpoint is the last whole one.
        """
        self._refuse_divergence(together=True)
        held = weights_and_moments(cast(nn.Module, self.model), self.optimizer)
        if bad := not_finite(held, self.args.device):
            if (
                MASTER in bad
                and self.topology_callback is not None
                and self.topology_callback.evolver.engine is not None
            ):
                evolver = self.topology_callback.evolver
                engine = evolver.engine
                assert engine is not None
                parts = {name: list(engine.held(layer).values()) for name, layer in evolver.sparse.layers.items()}
                bad = [*not_finite(parts, self.args.device), *bad]  # whose parts they are, where that is known
            raise diverged(self.state.global_step, bad, self.args.output_dir, what)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self.refuse_not_finite("training does not end as if all were well")
        _, _, unlabelled = self._watched().look(together=True)
        if unlabelled > self._unlabelled_said:
            self._say_unlabelled(unlabelled, "in all")
        return super()._finalize_training(*args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.push_to_hub`. Collective.

        Raises:
            FloatingPointError: a weight is NaN or infinite. Nothing is saved or sent then.
        """
        if bad := not_finite(weights_of(cast(nn.Module, self.model)), self.args.device):
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
            what = "the loss" if loss <= gradient else "the gradient (under a loss that is none)"
            if self._unlabelled_said or unlabelled:
                what += ", as it may be where a loss of your own divides by the number of labels and a batch has none,"
            raise FloatingPointError(
                f"{what} was NaN or infinite in step {min(loss, gradient)}: {_REMEDY}. "
                f"{last_whole(last_sealed(self.args.output_dir or '.'))}"
            )
        if together and unlabelled and not self._unlabelled_said:
            self._say_unlabelled(unlabelled, "so far")

    def _say_unlabelled(self, number: int, when: str) -> None:
        self._unlabelled_said = number
        if self.is_world_process_zero():
            _log.warning(
                "%d micro-batches %s have no label to learn (all are -100): they add nothing to loss and gradient, and "
                "training goes on. Too long prompts or too short windows do that",
                number, when,
            )  # fmt: skip
