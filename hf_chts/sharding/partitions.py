"""Weights that are split over ranks: FSDP2 and DeepSpeed's stage 3 may split a model before it is made sparse.

Such weights are recognized by their attributes; neither library is imported.
"""

from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def weight_shape(weight: Tensor) -> torch.Size:
    """The shape of the whole weight."""
    return torch.Size(getattr(weight, "ds_shape", weight.shape))


def held_part(weight: Tensor) -> tuple[Tensor, int]:
    """The live elements of a weight that this rank holds, and the position of the first one.

    Returns:
        (part, start): a flat tensor without padding, or the weight itself if it is whole, and the position of its first
        element in the flattened weight.

    Raises:
        ValueError: the weight is not split by rows over one dimension of ranks.
    """
    split: Any = weight.detach()
    if hasattr(weight, "ds_tensor"):
        split = weight
        size = split.partition_numel()
        start = min(size * dist.get_rank(split.ds_process_group), split.ds_numel)
        return split.ds_tensor.detach().view(-1)[: min(size, split.ds_numel - start)], start
    if hasattr(split, "device_mesh"):
        mesh, placements = split.device_mesh, split.placements
        if len(placements) != 1 or not placements[0].is_shard(0):
            raise ValueError(
                f"a weight is placed {placements} on a mesh of {tuple(mesh.shape)} ranks: only FSDP2 by rows is "
                "supported (no hybrid, tensor or pipeline parallelism)"
            )
        rows, *columns = split.shape
        chunk = -(-rows // mesh.size())  # as torch.chunk splits rows
        return split.to_local().view(-1), min(mesh.get_local_rank() * chunk, rows) * prod(columns)
    return split, 0


def whole_weight(weight: Tensor) -> Tensor:
    """The whole weight on every rank, read only. Collective if it is split."""
    split: Any = weight.detach()
    if hasattr(split, "full_tensor"):
        return split.full_tensor()
    if hasattr(weight, "ds_tensor"):
        split = weight
        part = split.ds_tensor.detach().to(weight.device).view(-1)
        parts = part.new_empty(part.numel() * dist.get_world_size(split.ds_process_group))
        dist.all_gather_into_tensor(parts, part, group=split.ds_process_group)
        return parts[: split.ds_numel].view(split.ds_shape)
    return split
