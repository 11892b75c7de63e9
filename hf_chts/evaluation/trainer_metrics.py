"""Bits per byte and perplexity inside `transformers.Trainer`'s evaluation loop."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from transformers import EvalPrediction

from hf_chts.evaluation.language_modeling import language_modeling_scores

_IGNORED = -100

PreprocessLogits = Callable[[torch.Tensor | Sequence[torch.Tensor], torch.Tensor], torch.Tensor]
ComputeMetrics = Callable[[EvalPrediction], dict[str, float]]


def language_modeling_metrics(byte_lengths: torch.Tensor) -> tuple[PreprocessLogits, ComputeMetrics]:
    """The pair `preprocess_logits_for_metrics`, `compute_metrics` for a Trainer of a causal language model.

    The first reduces logits (B, L, V) and labels (B, L) to a loss per token (B, L-1), so that an evaluation never holds
    the logits of more than one batch. The second gives, over all tokens whose label is not -100: `loss_per_token` in
    nats, `perplexity`, and `bits_per_byte`. Here every token counts the same; in the Trainer's own `eval_loss` a batch
    counts by its rows.

    Args:
        byte_lengths: UTF-8 bytes each token id stands for, integers (V,), as `hf_chts.data.token_byte_lengths` gives.

    Raises:
        ValueError: `byte_lengths` is not one integer per token id; from `compute_metrics`: a label has no byte length,
            or there is no token to score.
    """
    if byte_lengths.ndim != 1 or byte_lengths.is_floating_point():
        raise ValueError(
            "byte_lengths must hold one integer per token id; "
            f"got shape {tuple(byte_lengths.shape)} and {byte_lengths.dtype}."
        )
    lengths = byte_lengths.cpu().numpy()

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        nll = np.asarray(prediction.predictions)
        targets = np.asarray(prediction.label_ids)[:, 1:]
        scored = targets != _IGNORED
        ids = targets[scored]
        if ids.size and ids.max() >= lengths.size:
            raise ValueError(
                f"Label {ids.max()} has no byte length: byte_lengths has {lengths.size} entries. "
                "Build it with the model's vocab_size."
            )
        scores = language_modeling_scores(nll[scored], lengths[ids])
        return {"loss_per_token": scores.pop("loss"), **scores}

    return token_losses, compute_metrics


@torch.no_grad()
def token_losses(logits: torch.Tensor | Sequence[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood in nats of each next token: float32 (B, L-1), -100 where its label is ignored.

    Args:
        logits: (B, L, V), any float type; or a tuple of model outputs that begins with them.
        labels: (B, L) token ids, -100 where ignored; not shifted.
    """
    if not isinstance(logits, torch.Tensor):
        logits = logits[0]
    losses = torch.empty(labels.shape[0], labels.shape[1] - 1, dtype=torch.float32, device=logits.device)
    # row by row, because a float32 copy of all logits would often be the largest tensor of an evaluation
    for row, (row_logits, row_labels) in enumerate(zip(logits, labels, strict=True)):
        targets = row_labels[1:]
        nll = F.cross_entropy(row_logits[:-1].float(), targets, ignore_index=_IGNORED, reduction="none")
        losses[row] = nll.masked_fill(targets == _IGNORED, float(_IGNORED))
    return losses
