"""A check after the first optimizer step, which finds masks that do not hold before hours of training are lost."""

from collections.abc import Mapping

import torch
import torch.distributed as dist

from hf_chts.layers.sparse_layer import SparseLayer
from hf_chts.names import listed
from hf_chts.sharding.interface import Engine
from hf_chts.sharding.ranks import rank_and_world


def check_first_step(engine: Engine, layers: Mapping[str, SparseLayer]) -> None:
    """Raises RuntimeError on all ranks, naming the layers, if anything of a layer is not 0 off its mask. Collective.

    NaN is left to the checks for it, since clipping spreads a gradient that is NaN.
    """
    found = [any(layer.storage.strays(engine, finite=True).values()) for layer in layers.values()]
    if layers and rank_and_world()[1] > 1:
        device = next(iter(layers.values())).storage.device
        anywhere = torch.tensor(found, dtype=torch.int32, device=device)
        dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
        found = anywhere.bool().tolist()
    names = [name for name, stray in zip(layers, found, strict=True) if stray]
    if names:
        raise RuntimeError(
            f"after the first optimizer step these layers are not 0 off their masks: {listed(names)}. The model uses "
            "their weights past the layers' forward, as in x @ layer.weight.t(), where no mask reaches, or the "
            f"optimizer moves weights whose gradient is 0. Leave them dense (exclude_modules={names[:8]}). Nothing was "
            "saved"
        )
