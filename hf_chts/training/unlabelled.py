"""Batches without labels: every label is -100, for example because a prompt fills the whole window.

Their loss, a mean over no labels, is 0 / 0 = NaN, but its gradient is 0, so training goes on. Only the labels tell it
from a loss that diverges. They are compared on the device, so that the host does not wait for each batch.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import EvalLoopOutput

from hf_chts.training.any_trainer import AnyTrainer

_IGNORED = -100

_log = logging.getLogger(__name__)


def without_labels(inputs: Any, *, shifted: bool) -> Tensor | None:
    """Whether all labels of a batch are -100: bool (), on the labels' device; None if the batch has no such labels.

    Args:
        inputs: of the model.
        shifted: whether the loss ignores the label of the first token, as in causal models.
    """
    if not isinstance(inputs, Mapping):  # trl's GRPOTrainer and others that generate get a list of prompts
        return None
    labels = inputs.get("shift_labels")
    if labels is None:
        labels = inputs.get("labels")
        if isinstance(labels, Tensor) and shifted and labels.dim() > 1:
            labels = labels[..., 1:]
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return None
    return labels.eq(_IGNORED).all()


def excuse_unlabelled(loss: Tensor, unlabelled: Tensor | None) -> Tensor:
    """The detached loss; 0 if it is not finite because there are no labels."""
    loss = loss.detach()
    if unlabelled is None:
        return loss
    return torch.where(unlabelled.to(loss.device) & ~torch.isfinite(loss), torch.zeros_like(loss), loss)


class UnlabelledEvaluation(AnyTrainer):
    """The part of SparseTrainer that leaves batches without labels out of an evaluation's loss."""

    # (3,) for each batch: 1 if it has no labels, else its number of rows and their summed loss
    _evaluated: list[Tensor] | None = None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Like `Trainer.evaluation_loop`; warns of batches without labels."""
        prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
        self._evaluated = []
        try:
            output = super().evaluation_loop(*args, **kwargs)
            batches, rows, total = self._over_ranks(self._evaluated)
        finally:
            self._evaluated = None
        if not batches:
            return output
        if self.is_world_process_zero():
            _log.warning("%d batches of %s have no labels (all are -100) and are left out of its loss", batches, prefix)
        assert output.metrics is not None
        # transformers cannot tell this NaN from that of a model that has diverged
        loss = output.metrics.get(f"{prefix}_loss")
        if rows and isinstance(loss, float) and not math.isfinite(loss):
            output.metrics[f"{prefix}_loss"] = total / rows
        return output

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        unlabelled = without_labels(inputs, shifted=getattr(self, "_loss_shifts_labels", False))
        result = super().prediction_step(model, inputs, *args, **kwargs)
        loss, rows = result[0], find_batch_size(inputs)
        if self._evaluated is not None and unlabelled is not None and isinstance(loss, Tensor) and rows:
            labelled = ~unlabelled.to(loss.device)
            total = torch.where(labelled, loss.detach().mean() * rows, 0)
            self._evaluated.append(torch.stack([(~labelled).float(), labelled.float() * rows, total.float()]))
        return result

    def _over_ranks(self, evaluated: list[Tensor]) -> tuple[int, int, float]:
        mine = torch.stack(evaluated).sum(0) if evaluated else torch.zeros(3)
        batches, rows, total = self.accelerator.reduce(mine.to(self.args.device), reduction="sum").tolist()
        return int(batches), int(rows), total
