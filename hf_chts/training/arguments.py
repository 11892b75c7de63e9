"""SparseTrainingArguments: the Trainer's own, and what sparse training adds."""

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class SparseTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the paper's learning-rate schedule as the default.

    Parameters that control the learning rate around topology updates:
        update_warmup_steps: after each update the rate climbs back over this many optimizer steps. None: 20 (paper
            Table 6), or a fifth of update_interval where that is less.
    """

    _argument_group_name = "training, as in transformers.TrainingArguments"  # HfArgumentParser reads it

    lr_scheduler_type: str = field(
        default="cosine", metadata={"help": "Any schedule of transformers. Default: cosine."}
    )
    update_warmup_steps: int | None = field(
        default=None,
        metadata={
            "help": "Optimizer steps over which the learning rate climbs back after each topology update; 0: none. "
            "Default: 20, or a fifth of update_interval where that is less."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.update_warmup_steps is not None and self.update_warmup_steps < 0:
            raise ValueError(f"update_warmup_steps is {self.update_warmup_steps}; it must be >= 0")
