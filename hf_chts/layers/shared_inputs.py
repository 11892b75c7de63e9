"""Layers that read one input, such as q, k and v, are multiplied in one go: one launch, one conversion of the input.

Nobody says which layers these are: those that get the same tensor one right after the other are taken together from the
next time on. The first of them then multiplies for all, and the others take what is theirs. Where it turns out that not
all of them do, each multiplies for itself again.
"""

import threading
import weakref
from typing import Any

from torch import Tensor

from hf_chts.layers.packed_products import products

_ALONE: Any = "alone"  # in the place of a group: none is to be made
_last = threading.local()


class Group(threading.local):
    """Layers that read one input, for each thread that calls them.

    Attributes:
        layers: in the order of their calls.
        pending: (the input, its version, {layer's number: its product}) of the last product; None: all were taken.
    """

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers
        self.pending: tuple[Any, int, dict[int, Tensor]] | None = None


def multiply(layer: Any, x: Tensor, given: Tensor) -> Tensor:
    """The product of a `PackedLayer`, taken together with those of other layers that read `x`.

    Args:
        x: the layer's input, by which the others recognize it.
        given: `x`, in the dtype to multiply in.
    """
    group = layer.__dict__.get("group")
    if group is _ALONE or x.is_inference():  # whose changes nobody counts
        return products(given, [layer.packed], [layer.bias])[0]
    if group is None:
        _notice(layer, x)
        return products(given, [layer.packed], [layer.bias])[0]
    number, pending = group.layers.index(layer), group.pending
    if pending is not None:
        same = pending[0]() is x and pending[1] == x._version
        found = pending[2].get(number) if same else None
        if found is not None and found.dtype == given.dtype:
            del pending[2][number]
            if not pending[2]:
                group.pending = None
            return found
        for other in group.layers:
            other.__dict__["group"] = _ALONE
        group.pending = None
        return products(given, [layer.packed], [layer.bias])[0]
    results = products(given, [one.packed for one in group.layers], [one.bias for one in group.layers])
    group.pending = (weakref.ref(x), x._version, {n: result for n, result in enumerate(results) if n != number})
    return results[number]


def _notice(layer: Any, x: Tensor) -> None:
    """Remember that the layer got `x`, and make a group of it and those that got it right before."""
    seen: Any = getattr(_last, "seen", (None, 0, []))
    previous, version, layers = seen
    alive = [one() for one in layers]
    if previous is None or previous() is not x or version != x._version or not all(_fit(one, layer) for one in alive):
        _last.seen = (weakref.ref(x), x._version, [weakref.ref(layer)])
        return
    layers.append(weakref.ref(layer))
    for one in alive:
        one.__dict__.pop("group", None)
    group = Group([*alive, layer])
    for one in group.layers:
        one.__dict__["group"] = group


def _fit(one: Any, other: Any) -> bool:
    """Whether both can be multiplied in one launch."""
    if one is None or one is other or one.shape[1] != other.shape[1] or type(one.packed) is not type(other.packed):
        return False
    first, second = one.packed_values, other.packed_values
    return first.dtype == second.dtype and first.device == second.device
