"""The model that a run trains."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from hf_chts.baseline import BASELINES
from hf_chts.config import SparsityConfig
from hf_chts.config_file import PRESETS_ROOT, find, read_mapping
from hf_chts.export.packed_loading import forget_packing
from hf_chts.sparse_model import SparsityHandle, sparsify


@dataclass
class ModelArguments:
    """Parameters that control the model and where it is exported."""

    _argument_group_name = "the model"  # HfArgumentParser reads it

    model: str = field(
        default="configs/models/llama_demo.json",
        metadata={
            "help": "Architecture: a config JSON, a directory with a config.json, or a Hub id; with init: weights, a "
            "directory or a Hub id with weights. Default: configs/models/llama_demo.json."
        },
    )
    init: str = field(
        default="random",
        metadata={
            "help": "random: new weights. weights: those of `model` and its tokenizer; an export of a sparse model "
            "goes on with its links, unless initial_topology chooses by weights, and a dense model is pruned by "
            "initial_topology (magnitude, relative_importance, wanda). Default: random."
        },
    )
    calibration_blocks: int = field(
        default=128,
        metadata={
            "help": "With init: weights, how many training sequences an initial topology that looks at the layers' "
            "inputs (wanda) is shown. Default: 128."
        },
    )
    attn_implementation: str = field(
        default="sdpa", metadata={"help": "Attention kernel: sdpa, eager, flash_attention_2, … Default: sdpa."}
    )
    export_dir: str | None = field(
        default=None,
        metadata={"help": "Where the trained model is exported. Default: the folder 'export' in output_dir."},
    )
    export: str = field(
        default="plain",
        metadata={
            "help": "plain: dense tensors, which load without hf_chts. packed: mask bits and link values, which need "
            "hf_chts to load. Default: plain."
        },
    )

    baseline: str = field(
        default="none",
        metadata={
            "help": "Train a dense, narrower model of the same depth in place of the sparse one that the other options "
            "describe, to compare it with: same_links, as many weights as that has links in the end; same_average, as "
            "it has on the mean over the run; same_bytes, as many bytes of memory in training. Default: none."
        },
    )

    def __post_init__(self) -> None:
        if self.export not in ("plain", "packed"):
            raise ValueError(f"export is plain or packed, got {self.export!r}")
        if self.init not in ("random", "weights"):
            raise ValueError(f"init is random or weights, got {self.init!r}")
        if self.calibration_blocks < 1:
            raise ValueError(f"calibration_blocks is {self.calibration_blocks}; it must be at least 1 sequence")
        if self.baseline not in BASELINES:
            raise ValueError(f"baseline is one of {', '.join(BASELINES)}, got {self.baseline!r}")
        if self.baseline != "none" and self.init == "weights":
            raise ValueError(
                f"baseline is {self.baseline!r}, a model of another size that starts with random weights, and init is "
                "weights: leave one of them out"
            )


def load_config(args: ModelArguments) -> PreTrainedConfig:
    """The model's config; a path is looked up from the working directory, then among the presets.

    Raises:
        ValueError: there is neither such a file nor such a Hub id, or the file cannot be read.
    """
    name = find(args.model, PRESETS_ROOT)
    if name.endswith(".json") and not Path(name).exists():
        raise ValueError(f"model {name!r}: there is no such config file, neither here nor in {PRESETS_ROOT}")
    file = Path(name) if name.endswith(".json") else Path(name, "config.json")
    if file.is_file():
        read_mapping(file, "the config of a model")
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model {args.model!r} is neither a config file nor a Hub id that can be read: {error}"
        ) from error
    forget_packing(config)
    return config


# a model of more bytes is never made dense where its links are all that is kept
_LARGE = 4 * 2**30


def build_model(
    args: ModelArguments,
    config: PreTrainedConfig,
    sparsity: SparsityConfig,
    device: torch.device | str = "cpu",
) -> tuple[PreTrainedModel, SparsityHandle | None]:
    """A causal language model with new random weights in float32, from the global random generator.

    Args:
        device: where a model that never is dense gets its weights; the others get them on the CPU.

    Returns:
        (the model, its handle if it was made sparse): a model of over 4 GiB with storage links is made sparse before it
        gets weights.
    """

    def build() -> PreTrainedModel:
        kind = args.attn_implementation
        return AutoModelForCausalLM.from_config(config, attn_implementation=kind, dtype=torch.float32)

    if sparsity.storage == "links" and not (sparsity.is_dense or sparsity.starts_from_weights):
        with torch.device("meta"):
            outline = build()
        if 4 * outline.num_parameters() > _LARGE:
            sparse = sparsify(outline, sparsity)
            sparse.materialize(device)
            return outline, sparse
    return build(), None
