"""Masks and counters on disk: saved with every checkpoint, verified before anything is loaded.

`masks.safetensors` holds `<layer>.mask`, and in training checkpoints `<layer>.explored`, bit-packed (topology/bits.py),
and `<layer>.stored`, where the weights of links that left are kept.
Its metadata hold the shapes, the step and a digest of the contents. `topology_history.json` holds what each update did.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hf_chts.topology.bits import pack_bits, unpack_bits

MASKS_NAME = "masks.safetensors"
HISTORY_NAME = "topology_history.json"
FORMAT = "hf_chts masks, 1"


@dataclass
class TopologyState:
    """What a run knows about its topology beyond the weights.

    Attributes:
        masks: bool (out, in) by layer name.
        explored: the links that were ever active, bit-packed uint8 by layer name; empty where nothing evolves.
        stored: the weights of links that left, (out, in) by layer name; empty where they are not kept.
        step: finished optimizer steps.
        history: one dict of figures for each update so far.
    """

    masks: dict[str, Tensor]
    explored: dict[str, Tensor] = field(default_factory=dict)
    stored: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


def save_masks(directory: str | Path, state: TopologyState) -> None:
    """Write masks.safetensors into `directory`, whole or not at all; the history is not in it."""
    tensors = {f"{name}.mask": pack_bits(mask).cpu() for name, mask in state.masks.items()}
    tensors |= {f"{name}.explored": bits.cpu() for name, bits in state.explored.items()}
    tensors |= {f"{name}.stored": weights.cpu() for name, weights in state.stored.items()}
    metadata = {
        "format": FORMAT,
        "shapes": json.dumps({name: list(mask.shape) for name, mask in state.masks.items()}),
        "step": str(state.step),
    }
    metadata["digest"] = _digest(tensors, metadata)
    _write_whole(Path(directory) / MASKS_NAME, save(tensors, metadata))


def save_topology(directory: str | Path, state: TopologyState) -> None:
    """Write masks, explored links and history into a checkpoint directory."""
    save_masks(directory, state)
    text = json.dumps({"step": state.step, "history": state.history}, indent=1)
    _write_whole(Path(directory) / HISTORY_NAME, text.encode())


def load_masks(directory: str | Path) -> TopologyState:
    """Read and verify masks.safetensors of an export or a checkpoint; the history stays empty.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, damaged or not ours; the message names the file.
    """
    path = Path(directory) / MASKS_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: {directory} is not a checkpoint or export of a sparse model, or it "
            "was not copied whole"
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is not iterable
        if metadata.get("format") != FORMAT:
            raise ValueError(f"its format is {metadata.get('format')!r}, this hf_chts reads {FORMAT!r}")
        if metadata.pop("digest", None) != _digest(tensors, metadata):
            raise ValueError("its contents do not have the digest that was saved with them")
        shapes = {name: tuple(shape) for name, shape in json.loads(metadata["shapes"]).items()}
        kinds = {"mask"} | {key.rsplit(".", 1)[-1] for key in tensors}
        if not kinds <= {"mask", "explored", "stored"} or set(tensors) != {
            f"{name}.{kind}" for name in shapes for kind in kinds
        }:
            raise ValueError("its tensors are not those that its list of shapes names")
        masks = {name: unpack_bits(tensors[f"{name}.mask"], shape) for name, shape in shapes.items()}
        explored, stored = (
            {name: tensors[f"{name}.{kind}"] for name in shapes if kind in kinds} for kind in ("explored", "stored")
        )
        return TopologyState(masks, explored, stored, int(metadata["step"]))
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        raise ValueError(
            f"{path} cannot be used: {error}. Restore it from a backup, or take an earlier checkpoint"
        ) from error


def load_topology(directory: str | Path) -> TopologyState:
    """Read and verify what `save_topology` wrote.

    Raises:
        FileNotFoundError, ValueError: as `load_masks`, and likewise for the history.
    """
    state = load_masks(directory)
    path = Path(directory) / HISTORY_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: {directory} is not a training checkpoint, or it was not copied whole"
        )
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved["step"] != state.step:
            raise ValueError(f"it is of step {saved['step']}, the masks beside it are of step {state.step}")
        state.history = list(saved["history"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be used: {error}. Restore it from a backup, or take an earlier checkpoint"
        ) from error
    return state


def verify_fits(state: TopologyState, layers: Mapping[str, Any], directory: str | Path) -> None:
    """Raises ValueError if the saved masks are not those of a model with these masked layers."""
    shapes = {name: tuple(layer.mask.shape) for name, layer in layers.items()}
    saved = {name: tuple(mask.shape) for name, mask in state.masks.items()}
    if shapes != saved:
        differing = sorted(set(shapes.items()) ^ set(saved.items()))
        name = differing[0][0]
        raise ValueError(
            f"the masks in {directory} are of another model or config: {name} is {saved.get(name, 'absent')} there and "
            f"{shapes.get(name, 'absent')} here. Resume with the model and sparsity config that wrote the checkpoint"
        )


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for key in sorted(tensors):
        digest.update(key.encode())
        digest.update(tensors[key].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _write_whole(path: Path, data: bytes) -> None:
    """Under another name first, so that no reader and no crash ever sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
