"""The topology on disk: saved with every checkpoint, and verified before anything is loaded.

`masks.safetensors` holds `<layer>.mask`, and in training checkpoints `<layer>.explored`, both bit-packed
(topology/bits.py). Depending on the method it also holds `<layer>.stored`, the weights of removed links, and
`<layer>.born`, the update that regrew each link. Its metadata has the shapes, the step and a digest of the contents.
`topology_history.json` holds the figures of each update.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_chts.files.atomic import write_json
from hf_chts.files.reading import LazyMapping, read_json, reading
from hf_chts.files.tensor_file import Planned, write_file
from hf_chts.layers.wrappers import original_name
from hf_chts.topology.bits import pack_bits, unpack_bits

MASKS_NAME = "masks.safetensors"
HISTORY_NAME = "topology_history.json"
FORMAT = "hf_chts masks, 1"

_OPTIONAL = ("explored", "stored", "born", "left", "slots")  # the kinds of tensors beside "mask"
_REMEDY = "Restore it from a backup, or use an earlier checkpoint"


@dataclass
class TopologyState:
    """The state of a run's topology beyond the weights.

    Attributes:
        masks: bool (out, in) by layer name. These and other tensors may be read, or made, when they are looked up.
        shapes: (out, in) by layer name; by default those of the masks.
        explored: the links that were ever active, bit-packed uint8 by layer name; empty for static topologies.
        stored: the weights of removed links, (out, in) by layer name, or (n,) with their positions in `left`; empty
            unless the method keeps them.
        step: finished optimizer steps.
        history: one dict of figures for each update so far.
        born: the number of the update that regrew each link, int16 by layer name, (out, in), or (slots,) with `slots`;
            empty unless Adam needs it.
        left: int64 (n,) by layer name, see `stored`.
        slots: the position of the link in each slot, integer (slots,) by layer name; empty where there are none.
        softness: δ of each layer's next removal, by name; empty unless it adapts.
        loss_before_update: the loss of the step just finished, if an update followed it.
        sparsity: the scheduled sparsity, or the run's floor, at the last update; None if it is not known.
        compute: the largest number of links with which a layer multiplies with them alone, by name, -1 for never; empty
            unless it was measured.
        run: the id of the run (run_identity.py); None if it is not known.
    """

    masks: Mapping[str, Tensor]
    explored: Mapping[str, Tensor] = field(default_factory=dict)
    stored: Mapping[str, Tensor] = field(default_factory=dict)
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    born: Mapping[str, Tensor] = field(default_factory=dict)
    softness: dict[str, float] = field(default_factory=dict)
    loss_before_update: float | None = None
    sparsity: float | None = None
    compute: dict[str, int] = field(default_factory=dict)
    run: str | None = None
    left: Mapping[str, Tensor] = field(default_factory=dict)
    slots: Mapping[str, Tensor] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.shapes:
            self.shapes = {name: (mask.shape[0], mask.shape[1]) for name, mask in self.masks.items()}

    def stored_of(self, name: str) -> dict[str, Tensor] | None:
        """The weights of removed links of a layer, by kind; None where they are not kept."""
        kinds = {"stored": self.stored, "left": self.left}
        return {kind: values[name] for kind, values in kinds.items() if name in values} or None


def save_masks(directory: str | Path, state: TopologyState) -> None:
    """Write masks.safetensors, with all tensors of the state, into `directory`."""
    planned = [
        Planned(f"{name}.mask", "U8", ((math.prod(shape) + 7) // 8,), partial(_bits, state.masks, name))
        for name, shape in state.shapes.items()
    ]
    for kind in _OPTIONAL:
        values: Mapping[str, Tensor] = getattr(state, kind)
        planned += [Planned.of(f"{name}.{kind}", tensor) for name, tensor in values.items()]
    made = {one.key: one.make for one in planned}
    metadata = mask_metadata(LazyMapping(lambda key: made[key](), made), state.shapes, state.step)
    write_file(Path(directory) / MASKS_NAME, planned, metadata)


def _bits(masks: Mapping[str, Tensor], name: str) -> Tensor:
    return pack_bits(masks[name]).cpu()


def mask_metadata(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], step: int = 0
) -> dict[str, str]:
    """The metadata of a masks.safetensors with these tensors, which are read one at a time.

    Args:
        tensors: by `<layer>.<kind>`.
        shapes: (out, in) by layer name.
    """
    metadata = {
        "format": FORMAT,
        "shapes": json.dumps({name: list(shape) for name, shape in shapes.items()}),
        "step": str(step),
    }
    return metadata | {"digest": _digest(tensors, metadata)}


def save_topology(directory: str | Path, state: TopologyState) -> None:
    """Write the state into a checkpoint directory: masks.safetensors and the history."""
    save_masks(directory, state)
    names = ("step", "history", "softness", "loss_before_update", "sparsity", "run", "compute")
    write_json(Path(directory) / HISTORY_NAME, {name: getattr(state, name) for name in names})


class MaskFile:
    """The verified masks.safetensors of an export or a checkpoint. Tensors are read on access.

    Attributes:
        shapes: (out, in) by layer name.
        step: finished optimizer steps.
        kinds: which of mask, explored, stored and born it holds, each for every layer.
        tensors: by `<layer>.<kind>`, masks bit-packed.

    Raises:
        FileNotFoundError: `directory` has no such file.
        ValueError: the file is truncated, damaged or in another format; the message names it.
    """

    def __init__(self, directory: str | Path) -> None:
        self.path = Path(directory) / MASKS_NAME
        if not self.path.is_file():
            raise FileNotFoundError(
                f"{self.path} is missing: {directory} is not a checkpoint or export of a sparse model, or it was not "
                "copied completely"
            )
        with reading(self.path, _REMEDY):
            try:
                self._read()
            except (SafetensorError, OSError) as error:
                raise ValueError(error) from error

    def mask(self, name: str) -> Tensor:
        """The mask of a layer, bool (out, in)."""
        with reading(self.path, _REMEDY):
            return unpack_bits(self.tensors[f"{name}.mask"], self.shapes[name])

    def tensor(self, kind: str, name: str) -> Tensor:
        """The tensor of another kind of a layer."""
        with reading(self.path, _REMEDY):
            return self.tensors[f"{name}.{kind}"]

    def _get(self, key: str) -> Tensor:
        # opened each time, since an open file is mapped into memory as far as it has been read
        with safe_open(str(self.path), framework="pt") as file:
            return file.get_tensor(key)

    def _read(self) -> None:
        with safe_open(str(self.path), framework="pt") as file:
            metadata, keys = dict(file.metadata() or {}), list(file.keys())
        self.tensors: Mapping[str, Tensor] = LazyMapping(self._get, keys)
        if metadata.get("format") != FORMAT:
            raise ValueError(f"its format is {metadata.get('format')!r}, and this version of hf_chts reads {FORMAT!r}")
        if metadata.pop("digest", None) != _digest(self.tensors, metadata):
            raise ValueError("its contents do not match the digest that was saved with them")
        self.shapes = {name: (rows, columns) for name, (rows, columns) in json.loads(metadata["shapes"]).items()}
        self.step = int(metadata["step"])
        self.kinds = {"mask"} | {key.rsplit(".", 1)[-1] for key in self.tensors}
        expected = {f"{name}.{kind}" for name in self.shapes for kind in self.kinds}
        if not self.kinds <= {"mask", *_OPTIONAL} or set(self.tensors) != expected:
            raise ValueError("its tensors are not those of the layers that its metadata lists")
        for name, shape in self.shapes.items():
            # math.prod of Python integers does not overflow, whatever the file says
            if min(shape) < 1 or self.tensors[f"{name}.mask"].shape != ((math.prod(shape) + 7) // 8,):
                raise ValueError(f"the mask of {name} does not have the bits of its shape {shape}")


def load_masks(directory: str | Path) -> TopologyState:
    """Verify masks.safetensors of an export or a checkpoint, and have its tensors read when they are looked up.

    The history is not in it.

    Raises:
        FileNotFoundError, ValueError: see `MaskFile`.
    """
    file = MaskFile(directory)
    others: dict[str, Any] = {
        kind: LazyMapping(partial(file.tensor, kind), file.shapes if kind in file.kinds else ()) for kind in _OPTIONAL
    }
    return TopologyState(LazyMapping(file.mask, file.shapes), shapes=file.shapes, step=file.step, **others)


def load_topology(directory: str | Path) -> TopologyState:
    """Read and verify what `save_topology` wrote.

    Raises:
        FileNotFoundError, ValueError: masks or history are missing, damaged or of different steps.
    """
    state = load_masks(directory)
    path = Path(directory) / HISTORY_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: {directory} is not a training checkpoint, or it was not copied completely"
        )
    with reading(path, _REMEDY):
        saved = read_json(path)
        if saved["step"] != state.step:
            raise ValueError(f"it is of step {saved['step']}, and the masks beside it are of step {state.step}")
        state.history = list(saved["history"])
        state.softness = {name: float(value) for name, value in saved["softness"].items()}
        # checkpoints of early versions lack these
        loss, sparsity, state.run = saved.get("loss_before_update"), saved.get("sparsity"), saved.get("run")
        state.loss_before_update = None if loss is None else float(loss)
        state.sparsity = None if sparsity is None else float(sparsity)
        state.compute = {name: int(links) for name, links in (saved.get("compute") or {}).items()}
    return state


def with_original_names(state: TopologyState, layers: Iterable[str]) -> TopologyState:
    """The state with the names of `layers`. Early versions saved the names that layers have in a wrapped model."""
    first, saved = next(iter(layers), ""), original_name(next(iter(state.masks), ""))
    prefix = saved.removesuffix(first) if saved.endswith(f".{first}") else ""

    def renamed(values: Mapping[str, Any]) -> Mapping[str, Any]:
        names = {original_name(name).removeprefix(prefix): name for name in values}
        return LazyMapping(lambda name: values[names[name]], names)

    changes: dict[str, Any] = {kind: renamed(getattr(state, kind)) for kind in ("masks", "shapes", *_OPTIONAL)}
    changes |= {kind: dict(renamed(getattr(state, kind))) for kind in ("softness", "compute")}
    return replace(state, **changes)


def verify_fits(state: TopologyState, layers: Mapping[str, Any], directory: str | Path) -> None:
    """Raises ValueError if the state does not fit these sparse layers."""
    shapes = {name: tuple(layer.storage.shape) for name, layer in layers.items()}
    saved = {name: tuple(shape) for name, shape in state.shapes.items()}
    if shapes != saved:
        name = sorted(set(shapes.items()) ^ set(saved.items()))[0][0]
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
