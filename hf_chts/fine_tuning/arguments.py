"""The options of `fine-tune`, beside those of trl's SFTConfig."""

from dataclasses import dataclass, field

from trl import SFTConfig


@dataclass
class FineTuningArguments:
    """What is fine-tuned, on what, and what becomes of the links and the adapters.

    Raises:
        ValueError: a field has a value outside its range; the message names the field and the value.
    """

    _argument_group_name = "the model and the data"  # HfArgumentParser reads it

    model: str = field(
        default="",
        metadata={
            "help": "What to fine-tune: an export of a sparse model, plain or packed, a checkpoint of one, or a dense "
            "model; a directory or a Hub id."
        },
    )
    dataset: str = field(
        default="embedded",
        metadata={
            "help": "A .jsonl, .json, .csv or .parquet file, a directory, or a Hub id, with a column messages, or with "
            "prompt and completion. Default: embedded, questions on the Python standard library."
        },
    )
    dataset_split: str = field(default="train", metadata={"help": "Split to train on. Default: train."})
    validation_split: str | None = field(
        default=None, metadata={"help": "Split to validate on. Default: a share of the rows is held out."}
    )
    validation_fraction: float = field(default=0.05, metadata={"help": "That share, in (0, 1). Default: 0.05."})
    zeros: str = field(
        default="keep",
        metadata={
            "help": "keep: a sparse model keeps its links, and stays sparse. fill: all weights train, those without a "
            "link from 0 on, and the result is dense. Default: keep."
        },
    )
    lora_rank: int = field(
        default=0,
        metadata={"help": "Train LoRA adapters of this rank on the frozen model instead of its weights. Default: 0."},
    )
    lora_alpha: int | None = field(default=None, metadata={"help": "Scale of LoRA. Default: twice the rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before LoRA, in [0, 1). Default: 0."})
    merge: str = field(
        default="masked",
        metadata={
            "help": "What becomes of adapters in the export: masked: added to the links alone, so that the model stays "
            "as sparse; dense: added to all weights of the adapted layers; none: no export, the adapters are saved. "
            "Default: masked, and dense for a dense model."
        },
    )
    export: str = field(default="plain", metadata={"help": "plain or packed, as in `train`. Default: plain."})
    export_dir: str | None = field(
        default=None, metadata={"help": "Where the model is exported. Default: the folder 'export' in output_dir."}
    )
    attn_implementation: str = field(
        default="sdpa", metadata={"help": "Attention kernel: sdpa, eager, flash_attention_2, … Default: sdpa."}
    )

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("no model is named: --model DIR_OR_HUB_ID, such as an export")
        for name, known in (("zeros", ("keep", "fill")), ("merge", ("masked", "dense", "none"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose {' or '.join(known)}")
        if self.export not in ("plain", "packed"):
            raise ValueError(f"export is plain or packed, got {self.export!r}")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction is {self.validation_fraction}; it must lie between 0 and 1")
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank is {self.lora_rank}; it must be 0 (no adapters) or more")
        if self.merge != "masked" and not self.lora_rank:
            raise ValueError(f"merge is {self.merge!r}, and there are no adapters: set lora_rank, or leave it out")
        if self.lora_alpha is not None and self.lora_alpha < 1:
            raise ValueError(f"lora_alpha is {self.lora_alpha}; it must be 1 or more, or left out")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout}; it must lie in [0, 1)")
        if self.zeros == "fill" and self.export == "packed":
            raise ValueError("export packed: with zeros: fill the result is dense, and has nothing to pack")
        if self.zeros == "fill" and self.lora_rank:
            raise ValueError("zeros is 'fill', and LoRA freezes the weights that it is to train: leave one out")


@dataclass
class FineTuningConfig(SFTConfig):
    """trl's SFTConfig; by default the loss is on the assistant's messages alone, and no activation is recomputed."""

    _argument_group_name = "training, as in trl.SFTConfig"  # HfArgumentParser reads it

    output_dir: str | None = field(default="runs/fine_tuned", metadata={"help": "Default: runs/fine_tuned."})
    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Begin anew in an output_dir that has complete checkpoints of another run, as in `train`. Default: "
            "raise an error."
        },
    )
    skip_damaged_checkpoints: bool = field(
        default=False,
        metadata={
            "help": "With resume_from_checkpoint true: if the newest checkpoint is damaged, resume from the newest "
            "complete one, as in `train`. Default: raise an error."
        },
    )
    # trl's default is the old name, on; transformers warns of it
    gradient_checkpointing: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "The old name of activation_checkpointing. Default: null."}
    )
    assistant_only_loss: bool = field(
        default=True,
        metadata={
            "help": "For data with messages: the loss is that of the assistant's messages, not of the whole "
            "conversation. With prompt and completion it is the completion's. Default: true."
        },
    )
