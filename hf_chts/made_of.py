"""What must stay the same when a run of `train_llama.py` is resumed: its model and its data."""

import hashlib
from typing import Any

import torch
from transformers import PreTrainedConfig

from hf_chts.data.arguments import DataArguments
from hf_chts.data.loading import LoadedData
from hf_chts.data.stream import BlockStream

# settings that no weight depends on
_NOT_THE_MODEL = ("transformers_version", "_name_or_path", "dtype", "architectures", "use_cache")
# settings that decide which blocks there are, and their order; where the data are stored may change
_THE_DATA = (
    "dataset_config", "dataset_split", "text_column", "streaming", "shuffle_buffer", "block_size", "packing",
    "validation_split", "validation_fraction",
)  # fmt: skip
_BLOCKS_READ = 64  # of the training data, for their digest


def made_of(config: PreTrainedConfig, args: DataArguments, data: LoadedData) -> dict[str, Any]:
    """Model settings, data settings and a digest of some blocks, by name, as JSON can hold them.

    A stream has no digest: its state in the checkpoint identifies it.
    """
    made = {f"model.{name}": value for name, value in config.to_dict().items() if name not in _NOT_THE_MODEL}
    made |= {name: getattr(args, name) for name in _THE_DATA}
    if not isinstance(data.train, BlockStream):
        made["training data"] = _summary(data.train)
    return made


def _summary(blocks: Any) -> str:
    number, digest = len(blocks), hashlib.sha256()
    for index in range(0, number, -(-number // _BLOCKS_READ) or 1):
        digest.update(torch.as_tensor(blocks[index]["input_ids"]).to(torch.int64).numpy().tobytes())
    return f"{number} blocks, {digest.hexdigest()[:16]}"
