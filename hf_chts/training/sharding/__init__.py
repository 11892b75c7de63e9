"""The only package that knows how an engine holds weights, moments and ranks.

`engine_of` finds the engine of a run, and all engines answer the same few questions (interface.py): what is the whole
weight of a layer, where must zeros go when its topology changes, what would its gradient be without the mask.
"""

from hf_chts.training.sharding.detect import engine_of
from hf_chts.training.sharding.gradients import DenseGradient
from hf_chts.training.sharding.interface import Engine
from hf_chts.training.sharding.ranks import exchange, mean_over_ranks, rank_and_world, share_out
from hf_chts.training.sharding.replicated import ReplicatedWeights

__all__ = [
    "DenseGradient",
    "Engine",
    "ReplicatedWeights",
    "engine_of",
    "exchange",
    "mean_over_ranks",
    "rank_and_world",
    "share_out",
]
