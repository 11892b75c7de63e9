"""Writing safetensors files with one tensor in memory at a time, which safetensors' own functions cannot."""

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_chts.files.atomic import whole_file

# the dtypes that are copied, by safetensors' names, with their bytes per element
ITEM_BYTES = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1, "C64": 8},
    **{"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1},
}
_NAMES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL"},
    **{torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
}


@dataclass(frozen=True)
class Planned:
    """A tensor to write. Its size is known ahead; `make` gives its contents when they are written."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * ITEM_BYTES[self.dtype]

    @classmethod
    def of(cls, key: str, tensor: Tensor) -> "Planned":
        """A tensor that is there already."""
        return cls(key, dtype_name(tensor.dtype), tuple(tensor.shape), lambda: tensor.detach().cpu())


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in a safetensors file. Raises ValueError for one that has none."""
    if dtype not in _NAMES:
        raise ValueError(
            f"a tensor of {dtype} cannot be written: convert it to a floating-point or integer dtype first"
        )
    return _NAMES[dtype]


def write_file(path: Path, tensors: Sequence[Planned], metadata: dict[str, str]) -> None:
    """Write one safetensors file.

    Raises:
        ValueError: a tensor does not have the planned size.
    """
    # wide dtypes first, as in safetensors itself, so that each tensor starts at a multiple of its element size
    tensors = sorted(tensors, key=lambda tensor: -ITEM_BYTES[tensor.dtype])
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.bytes
        header[tensor.key] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            contents = tensor.make().contiguous().reshape(-1).view(torch.uint8)
            if contents.numel() != tensor.bytes:
                raise ValueError(f"{tensor.key} has {contents.numel()} bytes, and {tensor.bytes} were planned")
            file.write(contents.numpy().data)
