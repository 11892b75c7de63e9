"""Which rows of a projection belong to which attention head, according to the attention module."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from hf_chts.layers.wrappers import named_originals
from hf_chts.names import listed

# Names that projections onto heads have in transformers: of queries; of keys; of values; of keys and values, one head
# after the other (DeepSeek); of the heads of q, k and v, one after the other
_QUERIES = ("q_proj", "q_b_proj", "query", "q")
_KEYS = ("k_proj", "key", "k")
_VALUES = ("v_proj", "value", "v")
_KEYS_AND_VALUES = ("kv_b_proj",)
_ALL = ("qkv_proj", "query_key_value", "c_attn")
_ONTO_HEADS = (*_QUERIES, *_KEYS, *_VALUES, *_KEYS_AND_VALUES, *_ALL)

# What attentions in transformers call the size of a head, and the numbers of heads of queries, and of keys and values
_SIZE = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads")


def head_blocks(model: nn.Module, shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """The number of equal blocks of rows, one for each head, of the layers that project onto attention heads; by name.

    Raises:
        ValueError: an attention module has no size or number of heads, its rows do not match them, or no layer projects
            onto heads.
    """
    modules = named_originals(model)
    blocks = {}
    for name, (rows, _) in shapes.items():
        before, _, last = name.rpartition(".")
        if last not in _ONTO_HEADS:
            continue
        block = modules[before]
        kind = type(block).__name__
        size, heads = _heads_of(block, last)
        if size is None or heads is None:
            raise ValueError(
                f"per_head is true, but {before or 'the model'}, a {kind}, does not tell the size of a head "
                f"({', '.join(_SIZE)}) and their number ({', '.join(_HEADS)}): set per_head to false"
            )
        if rows != size * heads:
            raise ValueError(
                f"per_head is true, but {name} has {rows} rows, which are not the {heads} heads of {size} that its "
                f"{kind} tells of: set per_head to false, or leave the layer dense (exclude_modules)"
            )
        blocks[name] = heads
    if not blocks:
        raise ValueError(
            f"per_head is true, but no sparse layer of {type(model).__name__} projects onto heads (known: "
            f"{', '.join(_ONTO_HEADS)}): set per_head to false. Sparse layers: {listed(list(shapes))}"
        )
    return blocks


def _heads_of(attention: nn.Module, projection: str) -> tuple[int | None, int | None]:
    """(rows of a head, number of heads) of a projection; None for what the attention module does not have."""
    config = getattr(attention, "config", None)
    size = _first(_SIZE, attention)
    heads = _first(_HEADS, attention, config)
    key_value_heads = _first(_KEY_VALUE_HEADS, attention, config) or heads
    # multi-head latent attention: queries and keys have a part with rotary positions and one without, values have less
    query_key, value = _first(("qk_head_dim",), attention) or size, _first(("v_head_dim",), attention) or size
    without_positions = _first(("qk_nope_head_dim",), attention)
    if projection in _QUERIES:
        return query_key, heads
    if projection in _KEYS:
        return query_key, key_value_heads
    if projection in _VALUES:
        return value, key_value_heads
    if projection in _KEYS_AND_VALUES:
        both = None if without_positions is None or value is None else without_positions + value
        return both, heads
    return size, None if heads is None or key_value_heads is None else heads + 2 * key_value_heads


def _first(names: tuple[str, ...], *places: Any) -> int | None:
    """The first positive integer that one of the places has under one of the names."""
    for place in places:
        for name in names:
            found = getattr(place, name, None)
            if isinstance(found, int) and not isinstance(found, bool) and found > 0:
                return found
    return None
