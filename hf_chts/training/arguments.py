"""SparseTrainingArguments: the Trainer's own, and what sparse training adds."""

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class SparseTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the paper's learning-rate schedule as the default.

    Parameters that control the learning rate:
        lr_schedule_until: fraction of the run at which the schedule of lr_scheduler_type has ended; the rate stays
            what it is then. The paper's MLPs have "polynomial" with power 1 and lr_end, until 0.9.
        update_warmup_steps: optimizer steps over which the rate climbs back after each update. None: 20 (paper
            Table 6), or a fifth of update_interval if that is less.

    Parameters that control which model is the best:
        best_at_any_sparsity: whether evaluations before the target sparsity is reached count for
            `load_best_model_at_end`, early stopping and save_strategy "best".

    Parameters that control existing checkpoints in the output folder:
        overwrite_output_dir: whether a new run may begin in a folder with complete checkpoints of another run. They
            are ignored, also by resume_from_checkpoint=True, and overwritten when the run reaches the same steps.
        skip_damaged_checkpoints: whether resume_from_checkpoint=True skips damaged checkpoints and takes the newest
            complete one. Damaged ones are renamed.
    """

    _argument_group_name = "training, as in transformers.TrainingArguments"  # HfArgumentParser reads it

    lr_scheduler_type: str = field(
        default="cosine", metadata={"help": "Any schedule of transformers. Default: cosine."}
    )
    lr_schedule_until: float = field(
        default=1.0,
        metadata={
            "help": "Fraction of the run at which the learning-rate schedule has ended; the rate stays what it is then."
            " Default: 1."
        },
    )
    update_warmup_steps: int | None = field(
        default=None,
        metadata={
            "help": "Optimizer steps over which the learning rate climbs back after each topology update; 0: none. "
            "Default: 20, or a fifth of update_interval where that is less."
        },
    )
    best_at_any_sparsity: bool = field(
        default=False,
        metadata={
            "help": "Let evaluations count for the best model (load_best_model_at_end, early stopping, save_strategy "
            "best) while sparsity still rises; the best model may then be less sparse than the target. Default: they "
            "count from the step at which the schedule reaches the target sparsity."
        },
    )

    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Begin anew in an output_dir that has complete checkpoints of another run. They are ignored, also "
            "by resume_from_checkpoint true, and overwritten when this run reaches the same steps. Default: raise an "
            "error."
        },
    )
    skip_damaged_checkpoints: bool = field(
        default=False,
        metadata={
            "help": "With resume_from_checkpoint true: if the newest checkpoint is damaged, resume from the newest "
            "complete one. Damaged ones are renamed to damaged-checkpoint-STEP. Default: raise an error that names "
            "the damaged file."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.update_warmup_steps is not None and self.update_warmup_steps < 0:
            raise ValueError(f"update_warmup_steps is {self.update_warmup_steps}; it must be >= 0")
        if not 0 < self.lr_schedule_until <= 1:
            raise ValueError(f"lr_schedule_until is {self.lr_schedule_until}; it must lie in (0, 1]")
        for name in ("best_at_any_sparsity", "overwrite_output_dir", "skip_damaged_checkpoints"):
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name} is {value!r}; it must be true or false")
