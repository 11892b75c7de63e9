"""Batches in which nothing is to be learnt: every label is -100, as where a prompt fills the whole window.

A mean over no labels is 0 / 0. Its gradient is 0 all the same, so training goes on; the loss is told from one that
diverges by the labels, on the device, since to look at each batch would have it wait.
"""

import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import EvalLoopOutput

if TYPE_CHECKING:
    _AnyTrainer = Trainer
else:
    _AnyTrainer = object

_IGNORED = -100

_log = logging.getLogger(__name__)


def without_labels(inputs: Any, *, shifted: bool) -> Tensor | None:
    """Whether all labels of a batch are -100: bool (), where the labels are; None where that means nothing.

    Args:
        inputs: what the model is given.
        shifted: whether the loss leaves out the label of each first token, as that of causal models does.
    """
    if not isinstance(inputs, Mapping):  # trainers that generate, as trl's GRPOTrainer, are given prompts in a list
        return None
    labels = inputs.get("shift_labels")
    if labels is None:
        labels = inputs.get("labels")
        if isinstance(labels, Tensor) and shifted and labels.dim() > 1:
            labels = labels[..., 1:]
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return None
    return labels.eq(_IGNORED).all()


def excused(loss: Tensor, unlabelled: Tensor | None) -> Tensor:
    """The loss, and 0 instead of what a loss over no labels comes to; without its graph."""
    loss = loss.detach()
    if unlabelled is None:
        return loss
    return torch.where(unlabelled.to(loss.device) & ~torch.isfinite(loss), torch.zeros_like(loss), loss)


class UnlabelledEvaluation(_AnyTrainer):
    """The part of SparseTrainer whose loss of an evaluation is that of the batches that have labels."""

    _evaluated: list[Tensor] | None = None  # batches without labels, rows with labels, and the sum of their losses

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As `Trainer.evaluation_loop`; how many batches had no labels is logged."""
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
            _log.warning("%d batches of %s have no label (all are -100), and are left out of its loss", batches, prefix)
        assert output.metrics is not None
        # transformers' filter leaves them out, and with them any other that is not finite
        loss = output.metrics.get(f"{prefix}_loss")
        if rows and isinstance(loss, float) and not math.isfinite(loss):
            output.metrics[f"{prefix}_loss"] = total / rows
        return output

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        unlabelled = without_labels(inputs, shifted=getattr(self, "_loss_shifts_labels", False))
        result = super().prediction_step(model, inputs, *args, **kwargs)
        loss, rows = result[0], find_batch_size(inputs)
        if self._evaluated is not None and unlabelled is not None and isinstance(loss, Tensor) and rows:
            some = ~unlabelled.to(loss.device)
            total = torch.where(some, loss.detach().mean() * rows, 0)
            self._evaluated.append(torch.stack([(~some).float(), some.float() * rows, total.float()]))
        return result

    def _over_ranks(self, evaluated: list[Tensor]) -> tuple[int, int, float]:
        mine = torch.stack(evaluated).sum(0) if evaluated else torch.zeros(3)
        batches, rows, total = self.accelerator.reduce(mine.to(self.args.device), reduction="sum").tolist()
        return int(batches), int(rows), total
