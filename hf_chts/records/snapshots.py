"""Snapshots of a few layers at a few steps: their adjacency, reduced to a picture, and their degrees."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hf_chts.files.atomic import write_whole
from hf_chts.names import layer_kind
from hf_chts.schedule_plan import SchedulePlan

FORMAT = "hf_chts topology snapshot, 1"
PICTURE_SIZE = 256  # cells per side at most: a bitmap of LLaMA-7B's largest layer would take 5.6 MB
_NAME = re.compile(r"snapshot-(\d+)\.safetensors")


@dataclass(frozen=True)
class LayerSnapshot:
    """A layer at one step. Early versions did not write all three tensors; those are None.

    Attributes:
        picture: float16 (rows, columns), at most 256 each: the density of each cell of the mask. Row i of h covers the
            outputs from i·out/h to (i + 1)·out/h; columns cover inputs likewise.
        out_degrees: int32 (out,), the links of each output node.
        in_degrees: int32 (in,), the links of each input node.
    """

    picture: Tensor | None = None
    out_degrees: Tensor | None = None
    in_degrees: Tensor | None = None

    @classmethod
    def of(cls, mask: Tensor) -> "LayerSnapshot":
        """The snapshot of a mask, bool (out, in)."""
        outputs, inputs = mask.shape
        rows, columns = _edges(outputs), _edges(inputs).to(mask.device)
        # (rows, in): links in each column of each block of rows, without an integer copy of the whole mask
        blocks = [mask[a:b].sum(0, dtype=torch.int32) for a, b in pairwise(rows)]
        counts = torch.stack(blocks)
        until = torch.nn.functional.pad(counts.cumsum(1), (1, 0))
        cells = until[:, columns[1:]] - until[:, columns[:-1]]
        areas = rows.diff()[:, None].to(mask.device) * columns.diff()
        return cls(
            picture=(cells / areas).to(torch.float16).cpu(),
            out_degrees=mask.sum(1, dtype=torch.int32).cpu(),
            in_degrees=counts.sum(0, dtype=torch.int32).cpu(),
        )


def _edges(nodes: int) -> Tensor:
    cells = min(nodes, PICTURE_SIZE)
    return torch.arange(cells + 1) * nodes // cells


def snapshot_steps(plan: SchedulePlan) -> list[int]:
    """The steps of snapshots: before the first update, after the middle one and after the last."""
    interval = plan.interval
    updates = plan.number_of_updates(plan.last_update)
    return sorted({0, (updates + 1) // 2 * interval, plan.last_update})


def snapshot_layers(names: list[str]) -> list[str]:
    """The layers to record: the first and the last layer of the first and of the last kind.

    In LLaMA these are q_proj and down_proj of the first and the last block.
    """
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(layer_kind(name), []).append(name)
    chosen = [layer for kind in (*list(kinds)[:1], *list(kinds)[-1:]) for layer in (kinds[kind][0], kinds[kind][-1])]
    return list(dict.fromkeys(chosen))


def snapshot_path(directory: Path, step: int) -> Path:
    return directory / f"snapshot-{step}.safetensors"


def snapshot_paths(directory: Path) -> dict[int, Path]:
    """The snapshots in a directory by their step, in order."""
    found = {int(match[1]): path for path in directory.glob("snapshot-*") if (match := _NAME.fullmatch(path.name))}
    return dict(sorted(found.items()))


def save_snapshot(path: Path, masks: Mapping[str, Tensor]) -> None:
    """Write a snapshot of the layers with these masks, bool (out, in) by name."""
    tensors = {
        f"{name}.{kind}": tensor
        for name, mask in masks.items()
        for kind, tensor in vars(LayerSnapshot.of(mask)).items()
    }
    write_whole(path, save(tensors, {"format": FORMAT}))


def load_snapshot(path: Path) -> dict[str, LayerSnapshot]:
    """The layers of a snapshot by name.

    Raises:
        ValueError: the file is damaged or in another format; the message names it.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            if (file.metadata() or {}).get("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT!r}")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be used: {error}") from error
    kinds = LayerSnapshot.__dataclass_fields__
    names = sorted({key.rsplit(".", 1)[0] for key in tensors})
    return {name: LayerSnapshot(**{kind: tensors.get(f"{name}.{kind}") for kind in kinds}) for name in names}
