"""What all ranks must have in common is compared before they train: else they wait for each other, or drift apart."""

from transformers import TrainingArguments

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
