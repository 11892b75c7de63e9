"""What all ranks must have in common is compared before they train: else they wait for each other, or drift apart."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor
from transformers import TrainingArguments

from hf_chts.layers.shares import some
from hf_chts.sharding.ranks import rank_and_world
from hf_chts.topology.bits import pack_bits

# Arguments by which ranks do something together, or change their weights; others may differ, such as seeds of dropout
_TOGETHER = (
    "max_steps", "num_train_epochs", "gradient_accumulation_steps", "auto_find_batch_size",
    "logging_strategy", "logging_steps", "logging_first_step", "eval_strategy", "eval_steps", "eval_delay",
    "eval_on_start", "save_strategy", "save_steps", "save_only_model", "load_best_model_at_end",
    "metric_for_best_model", "greater_is_better", "best_at_any_sparsity", "update_warmup_steps",
    "optim", "optim_args", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps",
    "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16", "fp16", "ignore_data_skip",
)  # fmt: skip


def decisive_arguments(args: TrainingArguments) -> dict[str, str]:
    return {name: repr(getattr(args, name)) for name in _TOGETHER if hasattr(args, name)}


def together(facts: Mapping[str, str] | None, problem: Exception | None = None, word: Any = None) -> Any:
    """Compare what ranks have in common; `problem` is why this rank cannot train. Collective.

    Args:
        facts: by name; None with a problem.
        word: what rank 0 tells the others.

    Returns:
        Rank 0's `word`.

    Raises:
        Exception: this rank's problem.
        ValueError: another rank has one, or ranks differ; the message names the ranks and all that differs.
    """
    rank, world_size = rank_and_world()
    everyone: list[Any] = [(dict(facts or {}), str(problem) if problem else None, word)]
    if world_size > 1:
        everyone = [None] * world_size
        dist.all_gather_object(everyone, (dict(facts or {}), str(problem) if problem else None, word))
    if problem is not None:
        raise problem
    ill = {number: why for number, (_, why, _) in enumerate(everyone) if why is not None}
    if ill:
        number = min(ill)
        raise ValueError(f"rank {number} of {world_size} cannot train, so rank {rank} does not: {ill[number]}")
    first = everyone[0][0]
    differing = [
        f"{name} is {first.get(name)} on rank 0, {other.get(name)} on rank {number}"
        for number, (other, _, _) in enumerate(everyone)
        for name in sorted({*first, *other})
        if first.get(name) != other.get(name)
    ]
    if differing:
        raise ValueError(
            f"ranks differ in what they must have in common: {some(differing)}. Start them all with the same config, "
            "arguments, model and version of hf_chts"
        )
    return everyone[0][2]


def compare_begin(max_steps: int, masks: Mapping[str, Tensor]) -> None:
    """Compare what is known as training begins. Collective.

    Args:
        masks: bool (out, in) by layer name.

    Raises:
        ValueError: ranks differ.
    """
    if rank_and_world()[1] == 1:
        return
    digest = hashlib.sha256()
    for name in sorted(masks):
        digest.update(name.encode() + pack_bits(masks[name]).cpu().numpy().tobytes())
    together({"the number of steps": str(max_steps), "the topology at the begin": digest.hexdigest()[:16]})
