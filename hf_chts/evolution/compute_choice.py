"""compute: auto. Which layers multiply with their links alone: a measurement, kept with the run's checkpoints.

A product with the links alone takes a time in proportion to their number, and a dense one does not. So each kind of
layer is measured densely, with its links and with half of them, and gets the number of links up to which they alone are
faster. Where sparsity rises in training, a layer changes over when it comes to have no more.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_chts import kernels
from hf_chts.layers.link_index import LinkIndex
from hf_chts.layers.link_products import product
from hf_chts.layers.linked_layer import LinkedLayer
from hf_chts.layers.sparse_layers import SparseLayers
from hf_chts.layers.sparse_products import DTYPES, sparse_product
from hf_chts.schedule_plan import SchedulePlan
from hf_chts.sharding.ranks import rank_and_world, together

# More tokens change no decision, and would keep a large model waiting
MOST_TOKENS = 1024
_ROUNDS = 4
_PATIENCE = 1.5  # seconds for each kind of layer, after two rounds
_CLEARLY = 0.97  # as a share of the dense time


@dataclass(frozen=True)
class Measured:
    """Seconds of a layer's forward and backward pass."""

    dense: float
    links: float
    half: float

    def up_to(self, links: int) -> int:
        """The number of links up to which they alone are faster; -1 if they never are."""
        slope = (self.links - self.half) / max(1, links - links // 2)
        if slope <= 0:  # so few that their number does not matter
            return links if self.links < _CLEARLY * self.dense else -1
        most = int(links + (_CLEARLY * self.dense - self.links) / slope)
        return max(most, links) if self.links < _CLEARLY * self.dense else min(most, links - 1)


def settle_compute(
    sparse: SparseLayers,
    plan: SchedulePlan,
    known: Mapping[str, int],
    tokens: int,
    dtype: torch.dtype | None,
    say: Callable[[str], None],
) -> dict[str, int]:
    """Have each layer multiply as a checkpoint says, or as rank 0 measures it. Collective.

    Args:
        known: what this returned in the run that wrote the checkpoint; empty if it is not known.
        tokens: in each forward pass.
        dtype: of autocast; None: products are in the dtype of the weights.
        say: called on rank 0 with what was measured, or that a checkpoint has it.
    """
    layers = {name: layer for name, layer in sparse.layers.items() if isinstance(layer, LinkedLayer)}
    limits = dict(known)
    if set(limits) != set(layers):
        found = None
        if rank_and_world()[0] == 0:
            left = min(1.0, (1 - plan.sparsity(plan.max_steps)) / max(1 - sparse.sparsity(), 1e-9))
            final = {name: int(layer.links * left) for name, layer in layers.items()}
            weights = next((layer.link_values.dtype for layer in layers.values()), torch.float32)
            found, line = choose_compute(layers, final, tokens, dtype or weights)
            say(line)
        limits = together({}, word=found)
    elif rank_and_world()[0] == 0:
        say("compute: auto: as the checkpoint says")
    for name, layer in layers.items():
        layer.storage.multiply_links(up_to=limits[name])
    return limits


def alone(sparse: SparseLayers) -> int:
    """The number of layers that multiply with their links alone."""
    return sum(getattr(layer.storage, "index", None) is not None for layer in sparse.layers.values())


def choose_compute(
    layers: Mapping[str, LinkedLayer], final: Mapping[str, int], tokens: int, dtype: torch.dtype
) -> tuple[dict[str, int], str]:
    """Measure which layers multiply faster with their links alone.

    Args:
        layers: by name.
        final: the number of links that each will have in the end.
        tokens: in each forward pass.
        dtype: of the products.

    Returns:
        For each layer the largest number of links with which it takes them alone, -1 for never; and a line that says
        so.
    """
    tokens = max(1, min(tokens, MOST_TOKENS))
    why = _never(layers, dtype)
    if why:
        return dict.fromkeys(layers, -1), f"compute: auto: dense, {why}"
    measured: dict[Any, Measured] = {}
    limits: dict[str, int] = {}
    gains: list[float] = []
    now = 0
    for name, layer in layers.items():
        storage = layer.storage
        kind = (storage.shape, storage.room, storage.count, layer.transposed)
        if kind not in measured:
            measured[kind] = _measure(layer, tokens, dtype)
        found = measured[kind]
        limit = found.up_to(storage.count)
        limits[name] = min(limit, storage.room) if limit >= min(final[name], storage.count) else -1
        if storage.count <= limits[name]:
            now += 1
            gains.append(found.dense / found.links)
    later = sum(limits[name] >= 0 for name in layers) - now
    line = f"compute: auto: {now} of {len(layers)} layers multiply with their links alone"
    if gains:
        low, high = f"{min(gains):.1f}", f"{max(gains):.1f}"
        line += f", {low if low == high else f'{low} to {high}'} times as fast as densely"
    if later:
        line += f"; {later} will when they are sparser"
    return limits, f"{line} (measured with {tokens:,} tokens in {str(dtype).removeprefix('torch.')})"


def _never(layers: Mapping[str, LinkedLayer], dtype: torch.dtype) -> str:
    devices = {layer.storage.device.type for layer in layers.values()}
    if devices != {"cpu"}:
        return f"because products with links alone run on a CPU, and the model is on {', '.join(sorted(devices))}"
    if dtype not in DTYPES:
        return f"because products with links alone are in float32 or bfloat16, and these are in {dtype}"
    if not kernels.available():
        return 'because numba is not there (pip install "hf_chts[cpu]")'
    return ""


def _measure(layer: LinkedLayer, tokens: int, dtype: torch.dtype) -> Measured:
    storage = layer.storage
    rows, columns = storage.shape
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        x = torch.randn(tokens, columns, generator=generator).to(dtype).requires_grad_()
        values = torch.randn(storage.room, generator=generator).to(layer.link_values.dtype).requires_grad_()
        grad = torch.randn(tokens, rows, generator=generator).to(dtype)
        positions = storage.slot_positions
        slots = storage.slots(positions, values.element_size())
        fewer = positions.clone()
        with_link = (~storage.missing()).nonzero()[:, 0]
        fewer[with_link[::2]] = rows * columns
        ways: list[Callable[[], Tensor]] = [lambda: product(x, values, slots)]
        for some in (positions, fewer):
            index = LinkIndex.empty(storage.room, storage.shape)
            index.refresh(some, layer.transposed, 0)
            ways.append(lambda index=index: sparse_product(x, values, None, index))  # type: ignore[misc]
        times: list[list[float]] = [[] for _ in ways]
        begin = time.perf_counter()
        for number in range(_ROUNDS):
            for way, taken in zip(ways, times, strict=True):
                start = time.perf_counter()
                torch.autograd.grad(way(), (x, values), grad)
                taken.append(time.perf_counter() - start)
            if number and time.perf_counter() - begin > _PATIENCE:
                break
    # the first round compiles, and maps memory
    return Measured(*(min(taken[1:]) for taken in times))
