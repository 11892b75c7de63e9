"""Masks and counters on disk: saved with every checkpoint, verified before anything is loaded.

`masks.safetensors` holds `<layer>.mask`, and in training checkpoints `<layer>.explored`, bit-packed (topology/bits.py),
and, where they are kept, `<layer>.stored`, the weights of links that left, and `<layer>.born`, when links were regrown.
Its metadata hold the shapes, the step and a digest of the contents. `topology_history.json` holds what each update did.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hf_chts.files.atomic import write_whole
from hf_chts.layers.wrappers import original_name
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
        born: the number of the update that regrew each link, int16 by layer name; empty where it is not kept.
        softness: δ of each layer's next removal, by name; empty where it does not adapt.
        step: finished optimizer steps.
        history: one dict of figures for each update so far.
        loss_before_update: of the step just finished, where an update followed it.
        sparsity: what the run's schedule, or its floor, had at the last update that took place; None: not known.
        run: the id of the run (training/run_identity.py); None: not known.
    """

    masks: dict[str, Tensor]
    explored: dict[str, Tensor] = field(default_factory=dict)
    stored: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    born: dict[str, Tensor] = field(default_factory=dict)
    softness: dict[str, float] = field(default_factory=dict)
    loss_before_update: float | None = None
    sparsity: float | None = None
    run: str | None = None


def save_masks(directory: str | Path, state: TopologyState) -> None:
    """Write masks.safetensors into `directory`, whole or not at all; the history is not in it."""
    tensors = {f"{name}.mask": pack_bits(mask).cpu() for name, mask in state.masks.items()}
    tensors |= {f"{name}.explored": bits.cpu() for name, bits in state.explored.items()}
    tensors |= {f"{name}.stored": weights.cpu().contiguous() for name, weights in state.stored.items()}
    tensors |= {f"{name}.born": updates.cpu().contiguous() for name, updates in state.born.items()}
    metadata = mask_metadata(tensors, {name: tuple(mask.shape) for name, mask in state.masks.items()}, state.step)
    write_whole(Path(directory) / MASKS_NAME, save(tensors, metadata))


def mask_metadata(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], step: int = 0
) -> dict[str, str]:
    """The metadata of masks.safetensors with these tensors; they are asked for one after the other."""
    metadata = {
        "format": FORMAT,
        "shapes": json.dumps({name: list(shape) for name, shape in shapes.items()}),
        "step": str(step),
    }
    return metadata | {"digest": _digest(tensors, metadata)}


def save_topology(directory: str | Path, state: TopologyState) -> None:
    """Write masks, explored links and history into a checkpoint directory."""
    save_masks(directory, state)
    contents = {
        "step": state.step,
        "history": state.history,
        "softness": state.softness,
        "loss_before_update": state.loss_before_update,
        "sparsity": state.sparsity,
        "run": state.run,
    }
    write_whole(Path(directory) / HISTORY_NAME, json.dumps(contents, indent=1).encode())


def load_masks(directory: str | Path) -> TopologyState:
    """Read and verify masks.safetensors of an export or a checkpoint; the history stays empty.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, damaged or not ours; the message names the file.
    """
    file = MaskFile(directory)
    explored, stored, born = (
        {name: file.tensors[f"{name}.{kind}"] for name in file.shapes if kind in file.kinds}
        for kind in ("explored", "stored", "born")
    )
    masks = {name: file.mask(name) for name in file.shapes}
    return TopologyState(masks, explored, stored, file.step, born=born)


class MaskFile:
    """masks.safetensors of an export or a checkpoint, verified; a tensor is read when it is asked for.

    Attributes:
        shapes: (out, in) by layer name.
        step: finished optimizer steps.
        kinds: which of mask, explored, stored and born there is of every layer.
        tensors: by `<layer>.<kind>`, as they are stored.

    Raises:
        FileNotFoundError, ValueError: see `load_masks`.
    """

    def __init__(self, directory: str | Path) -> None:
        self.path = Path(directory) / MASKS_NAME
        if not self.path.is_file():
            raise FileNotFoundError(
                f"{self.path} is missing: {directory} is not a checkpoint or export of a sparse model, or it "
                "was not copied whole"
            )
        try:
            self._read()
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise self._unusable(error) from error

    def mask(self, name: str) -> Tensor:
        """bool (out, in): the mask of a layer."""
        try:
            return unpack_bits(self.tensors[f"{name}.mask"], self.shapes[name])
        except ValueError as error:
            raise self._unusable(error) from error

    def _read(self) -> None:
        file = safe_open(str(self.path), framework="pt")
        metadata = dict(file.metadata() or {})
        self.tensors: Mapping[str, Tensor] = _Lazy(file)
        if metadata.get("format") != FORMAT:
            raise ValueError(f"its format is {metadata.get('format')!r}, this hf_chts reads {FORMAT!r}")
        if metadata.pop("digest", None) != _digest(self.tensors, metadata):
            raise ValueError("its contents do not have the digest that was saved with them")
        self.shapes = {name: tuple(shape) for name, shape in json.loads(metadata["shapes"]).items()}
        self.step = int(metadata["step"])
        self.kinds = {"mask"} | {key.rsplit(".", 1)[-1] for key in self.tensors}
        if not self.kinds <= {"mask", "explored", "stored", "born"} or set(self.tensors) != {
            f"{name}.{kind}" for name in self.shapes for kind in self.kinds
        }:
            raise ValueError("its tensors are not those that its list of shapes names")
        for name, shape in self.shapes.items():
            # Python's integers, which do not overflow
            if min(shape) < 1 or self.tensors[f"{name}.mask"].shape != ((math.prod(shape) + 7) // 8,):
                raise ValueError(f"the mask of {name} has another number of bits than its shape {shape}")

    def _unusable(self, error: Exception) -> ValueError:
        return ValueError(
            f"{self.path} cannot be used: {error}. Restore it from a backup, or take an earlier checkpoint"
        )


class _Lazy(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read anew whenever it is asked for."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._keys = list(file.keys())

    def __getitem__(self, key: str) -> Tensor:
        return self._file.get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


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
        state.softness = {name: float(value) for name, value in saved["softness"].items()}
        # checkpoints of older versions have none of them
        loss, sparsity, state.run = saved.get("loss_before_update"), saved.get("sparsity"), saved.get("run")
        state.loss_before_update = None if loss is None else float(loss)
        state.sparsity = None if sparsity is None else float(sparsity)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} cannot be used: {error}. Restore it from a backup, or take an earlier checkpoint"
        ) from error
    return state


def with_original_names(state: TopologyState, layers: Iterable[str]) -> TopologyState:
    """The state under the names of these layers, where an earlier version saved those of a wrapped model."""
    first, saved = next(iter(layers), ""), original_name(next(iter(state.masks), ""))
    prefix = saved.removesuffix(first) if saved.endswith(f".{first}") else ""

    def renamed(values: dict[str, Any]) -> dict[str, Any]:
        return {original_name(name).removeprefix(prefix): value for name, value in values.items()}

    kinds = ("masks", "explored", "stored", "born", "softness")
    changes: dict[str, Any] = {kind: renamed(getattr(state, kind)) for kind in kinds}
    return replace(state, **changes)


def verify_fits(state: TopologyState, layers: Mapping[str, Any], directory: str | Path) -> None:
    """Raises ValueError if the saved masks are not those of a model with these masked layers."""
    shapes = {name: tuple(layer.topology.shape) for name, layer in layers.items()}
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
