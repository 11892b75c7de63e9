"""What a run of `train_llama.py` is made of: a run that is resumed must have the same model and the same data."""

import hashlib
from typing import Any

import torch
from transformers import PreTrainedConfig

from hf_chts.data.arguments import DataArguments
from hf_chts.data.loading import LoadedData
from hf_chts.data.stream import BlockStream

# What no weight depends on
_NOT_THE_MODEL = ("transformers_version", "_name_or_path", "dtype", "architectures", "use_cache")
# What decides which blocks there are, and their order; where data lie may change
_THE_DATA = (
    "dataset_config", "dataset_split", "text_column", "streaming", "shuffle_buffer", "block_size", "packing",
    "validation_split", "validation_fraction",
)  # fmt: skip
_LOOKED_AT = 64  # blocks


def made_of(config: PreTrainedConfig, args: DataArguments, data: LoadedData) -> dict[str, Any]:
    """By name, as JSON can hold it. A stream is known by its state in the checkpoint, other data by some blocks."""
    made = {f"model.{name}": value for name, value in config.to_dict().items() if name not in _NOT_THE_MODEL}
    made |= {name: getattr(args, name) for name in _THE_DATA}
    if not isinstance(data.train, BlockStream):
        made["training data"] = _summary(data.train)
    return made


def _summary(blocks: Any) -> str:
    number, digest = len(blocks), hashlib.sha256()
    for index in range(0, number, -(-number // _LOOKED_AT) or 1):
        digest.update(torch.as_tensor(blocks[index]["input_ids"]).to(torch.int64).numpy().tobytes())
    return f"{number} blocks, {digest.hexdigest()[:16]}"
