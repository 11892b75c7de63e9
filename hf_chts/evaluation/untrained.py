"""The figures of a model that no trainer holds, such as one before it is pruned."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import EvalPrediction, PreTrainedModel, default_data_collator

from hf_chts.evaluation.trainer_metrics import language_modeling_metrics, token_losses
from hf_chts.sharding.ranks import rank_and_world


@torch.no_grad()
def language_modeling_of(
    model: PreTrainedModel, blocks: Any, byte_lengths: Tensor, *, batch_size: int, dtype: torch.dtype | None = None
) -> dict[str, float]:
    """Loss in nats per token, perplexity and bits per byte of a causal language model. Collective.

    The ranks share the blocks out, each with a whole model, and all get the same figures.

    Args:
        blocks: a map-style dataset with `input_ids`, `labels` and perhaps `attention_mask`, all (L,).
        byte_lengths: see `language_modeling_metrics`.
        batch_size: blocks at a time.
        dtype: of autocast; None: none.
    """
    rank, world_size = rank_and_world()
    # numpy has no rows of no blocks: their length is that of the first block
    length = len(blocks[0]["labels"])
    losses, labels = [np.empty((0, length - 1), np.float32)], [np.empty((0, length), np.int64)]
    training = model.training
    model.eval()
    try:
        for batch in batches(blocks, range(rank, len(blocks), world_size), batch_size, model.device):
            with torch.autocast(model.device.type, dtype, enabled=dtype is not None):
                logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
            losses.append(token_losses(logits, batch["labels"]).cpu().numpy())
            labels.append(batch["labels"].cpu().numpy())
    finally:
        model.train(training)
    mine = (np.concatenate(losses), np.concatenate(labels))
    everyone: list[Any] = [mine]
    if world_size > 1:
        everyone = [None] * world_size
        dist.all_gather_object(everyone, mine)
    _, compute = language_modeling_metrics(byte_lengths)
    predictions, targets = (np.concatenate([of_one[part] for of_one in everyone]) for part in (0, 1))
    figures = compute(EvalPrediction(predictions=predictions, label_ids=targets))
    return {"loss": figures["loss_per_token"], **{name: figures[name] for name in ("perplexity", "bits_per_byte")}}


def batches(blocks: Any, chosen: range, batch_size: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """The chosen blocks of a map-style dataset as batches on a device."""
    for start in range(0, len(chosen), batch_size):
        rows = [blocks[index] for index in chosen[start : start + batch_size]]
        yield {name: value.to(device) for name, value in default_data_collator(rows).items()}
