"""Bipartite receptive field (BRF): outputs prefer inputs near their own place. Takes time in proportion to the links.

To draw inputs one after another without replacement, each ∝ its weight w, let each input arrive after an exponential
time of rate w and take the first ones. Most inputs are far away and arrive late, so only those in a window around the
output's place get a time each. The others come from a Poisson process whose rate is the sum of their weights: each of
its points is an input drawn ∝ w, which arrives at its first point.
"""

import math

import torch
from torch import Tensor

from hf_chts.topology.allocation import check_links
from hf_chts.topology.parts import register

# Arrival times to hold at a time: those of all rows of a large layer would be gigabytes
_BLOCK_ELEMENTS = 1 << 22
# Cost of a point outside the window relative to a time inside it
_POINT = 3.0


@register.initial_topology("bipartite_receptive_field", options={"r": "brf_r", "degree_distribution": "brf_degrees"})
def bipartite_receptive_field(
    out_features: int,
    in_features: int,
    links: int,
    *,
    r: float = 0.1,
    degree_distribution: str = "fixed",
    generator: torch.Generator,
) -> Tensor:
    """BRF (arXiv 2501.19107, §3.2).

    Output i sits at i·in/out on the ring of inputs, and takes its inputs without replacement with probability in
    proportion to (1 + distance)^(−(1 − r)/r).

    Args:
        r: spread of the receptive field: 0 takes the nearest inputs, 1 is uniform over all of them.
        degree_distribution: "fixed" gives every output the same degree (to within one link); "uniform" draws degrees
            uniformly from 1 to 2·mean − 1 (or an interval around the mean that in_features allows), with the exact
            total.

    Returns:
        bool (out, in) with exactly `links` links, on the generator's device.

    Raises:
        ValueError: a size, `links`, `r` or `degree_distribution` is out of range.
    """
    total = check_links(out_features, in_features, links)
    if not 0 <= r <= 1:
        raise ValueError(f"r of the bipartite receptive field is {r}; it must lie in [0, 1]")
    if degree_distribution == "fixed":
        degrees = _fixed_degrees(out_features, total, generator)
    elif degree_distribution == "uniform":
        degrees = _uniform_degrees(out_features, in_features, total, generator)
    else:
        raise ValueError(f"degree_distribution is {degree_distribution!r}; choose 'fixed' or 'uniform'")

    mask = torch.zeros(out_features, in_features, dtype=torch.bool, device=generator.device)
    most = int(degrees.max())
    field = _Nearest(in_features, most) if r == 0 else _Field(in_features, most, (1 - r) / r)
    for rows in torch.arange(out_features, device=mask.device).split(max(1, _BLOCK_ELEMENTS // field.width)):
        # place = at + part, in whole numbers: at is the input at or before it
        at, part = rows * in_features // out_features, rows * in_features % out_features / out_features
        inputs = field.first(at, part, degrees[rows], generator)
        wanted = torch.arange(inputs.shape[1], device=mask.device) < degrees[rows, None]
        mask.view(-1)[(rows[:, None] * in_features + inputs)[wanted]] = True
    return mask


class _Nearest:
    """r = 0: the nearest inputs, equals in random order."""

    def __init__(self, inputs: int, most: int) -> None:
        self.inputs = inputs
        self.width = min(inputs, most + 2)  # the nearest `most` to a place between two inputs

    def first(self, at: Tensor, part: Tensor, degrees: Tensor, generator: torch.Generator) -> Tensor:
        offsets = torch.arange(self.width, device=at.device) - (self.width - 1) // 2
        distance = _ring_distance(offsets, part, self.inputs)
        uniform = torch.rand(distance.shape, dtype=torch.float64, device=at.device, generator=generator)
        # distances differ by at least 1/out, so that the random part orders only equal ones
        order = distance.mul_(2**20).round_().add_(uniform).argsort(dim=1)
        return (at[:, None] + offsets[order]) % self.inputs


class _Field:
    """Arrivals at outputs that take up to `most` of `inputs` inputs, with weights (1 + distance)^−exponent.

    Attributes:
        width: about how many inputs each output considers.
    """

    def __init__(self, inputs: int, most: int, exponent: float) -> None:
        self.inputs, self.exponent = inputs, exponent
        self.low, self.width = 0, inputs  # the window: all inputs, unless a smaller one with points outside is cheaper
        self.log_unit = self.rate = 0.0
        # The unit of time: by time 1 somewhat more inputs than `most` have arrived
        expected = most + 4 * math.sqrt(most) + 4
        if expected >= inputs:
            return
        away = torch.arange(inputs, dtype=torch.float64)
        self.log_unit = _log_time_of(-exponent * torch.minimum(away, inputs - away).log1p(), expected)
        # From any place between offsets 0 and 1, inputs outside the window of offsets −reach to reach + 1 are further
        # away than `reach`, which bounds their weights
        bounds = self._bounds(torch.arange(1, inputs // 2, dtype=torch.float64))
        beyond = 2 * bounds.flip(0).cumsum(0).flip(0)
        cost = 2 * torch.arange(len(beyond)) + 2 + _POINT * beyond
        reach = int(cost.argmin())
        if cost[reach] < inputs:
            self.low, self.width = -reach, 2 * reach + 2
            offsets = torch.arange(reach + 2, inputs - reach, dtype=torch.float64)
            self.bounds = self._bounds(torch.minimum(offsets - 1, inputs - offsets))
            self.rate = float(self.bounds.sum())

    def _bounds(self, distance: Tensor) -> Tensor:
        return torch.exp(self.log_unit - self.exponent * distance.log1p())

    def first(self, at: Tensor, part: Tensor, degrees: Tensor, generator: torch.Generator) -> Tensor:
        """The first `degrees` inputs to arrive at outputs at at + part, in order of arrival, and others after them:
        int64 (rows, n)."""
        offsets = torch.arange(self.low, self.low + self.width, device=at.device)
        log_time = self._log_times(_ring_distance(offsets, part, self.inputs), generator)
        inputs = ((at[:, None] + offsets) % self.inputs).expand(log_time.shape)
        if not self.rate:
            return inputs.gather(1, log_time.argsort(dim=1)[:, : int(degrees.max())])
        points = torch.zeros(3, 0, dtype=torch.float64, device=at.device)
        begin, until = 0.0, 1.0
        while True:
            points = torch.cat([points, self._points(part, begin, until, generator)], 1)
            rows, outside, when = _earliest(points, self.inputs)
            arrived = (log_time <= math.log(until)).sum(1) + torch.bincount(rows, minlength=len(at))
            if bool((arrived >= degrees).all()):
                break
            begin, until = until, 1.25 * until
        number = torch.bincount(rows, minlength=len(at))
        column = torch.arange(len(rows), device=at.device) - (number.cumsum(0) - number)[rows]
        more = int(number.max())
        late = log_time.new_full((len(at), more), torch.inf)
        late[rows, column] = when.log()
        others = inputs.new_zeros(len(at), more)
        others[rows, column] = (at[rows] + outside) % self.inputs
        order = torch.cat([log_time, late], 1).argsort(dim=1)[:, : int(degrees.max())]
        return torch.cat([inputs, others], 1).gather(1, order)

    def _log_times(self, distance: Tensor, generator: torch.Generator) -> Tensor:
        uniform = torch.rand(distance.shape, dtype=torch.float64, device=distance.device, generator=generator)
        # −log(1 − u) is an exponential time of rate 1
        log_time = uniform.neg_().log1p_().neg_().log_()
        return log_time.add_(distance.log1p_(), alpha=self.exponent).sub_(self.log_unit)

    def _points(self, part: Tensor, begin: float, until: float, generator: torch.Generator) -> Tensor:
        """The points outside the window from time `begin` to `until`: (row, offset, time), float64 (3, n).

        They are drawn by the bounds of the weights and thinned to the weights.
        """
        device = part.device
        expected = torch.full((len(part),), self.rate * (until - begin), dtype=torch.float64, device=device)
        counts = torch.poisson(expected, generator=generator).long()
        rows = torch.arange(len(part), device=device).repeat_interleave(counts)
        uniform = torch.rand(3, len(rows), dtype=torch.float64, device=device, generator=generator)
        bounds = self.bounds.to(device)
        place = torch.searchsorted(bounds.cumsum(0), uniform[0] * self.rate, right=True).clamp_(max=len(bounds) - 1)
        offset = place + self.low + self.width
        distance = _ring_distance(offset, part[rows], self.inputs, paired=True)
        weight = torch.exp(self.log_unit - self.exponent * distance.log1p_())
        kept = uniform[1] * bounds[place] < weight
        when = begin + (until - begin) * uniform[2]
        return torch.stack([rows.double(), offset.double(), when])[:, kept]


def _earliest(points: Tensor, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each input's first point at each row: (row, offset, time), by row."""
    points = points[:, points[2].argsort()]
    key = points[0].long() * inputs + points[1].long()
    key, order = key.sort(stable=True)
    first = torch.ones_like(key, dtype=torch.bool)
    first[1:] = key[1:] != key[:-1]
    return key[first] // inputs, key[first] % inputs, points[2, order[first]]


def _ring_distance(offsets: Tensor, part: Tensor, inputs: int, *, paired: bool = False) -> Tensor:
    """The distance of the inputs at `offsets` (n,) from places `part` (rows,) beyond offset 0: float64 (rows, n), or
    (n,) of pairs of an offset and a place."""
    away = (offsets - (part if paired else part[:, None])).abs_()
    return torch.minimum(away, inputs - away)


def _log_time_of(log_weight: Tensor, expected: float) -> float:
    """The logarithm of the time by which `expected` inputs of these weights arrive in the mean."""
    low, high = -float(log_weight.max()) - 60.0, -float(log_weight.min()) + 60.0
    for _ in range(60):
        middle = (low + high) / 2
        if float(-torch.expm1(-torch.exp(log_weight + middle)).sum()) < expected:
            low = middle
        else:
            high = middle
    return high


def _fixed_degrees(nodes: int, total: int, generator: torch.Generator) -> Tensor:
    degrees = torch.full((nodes,), total // nodes, dtype=torch.int64, device=generator.device)
    order = torch.randperm(nodes, generator=generator, device=generator.device)
    degrees[order[: total % nodes]] += 1
    return degrees


def _uniform_degrees(nodes: int, largest: int, total: int, generator: torch.Generator) -> Tensor:
    mean = total / nodes
    half_width = max(0.0, min(mean - 1, largest - mean))
    low, high = int(mean - half_width), int(mean + half_width)
    low, high = min(low + (low < mean - half_width), int(mean)), max(high, -int(-mean // 1))
    device = generator.device
    degrees = torch.randint(low, high + 1, (nodes,), generator=generator, device=device)
    # The sum of independent draws misses the total by a few per mille; add or remove single links at random nodes that
    # have room, one per node and round
    while error := total - int(degrees.sum()):
        room = (degrees < high if error > 0 else degrees > low).nonzero().squeeze(1)
        order = torch.randperm(room.numel(), generator=generator, device=device)
        degrees[room[order[: abs(error)]]] += 1 if error > 0 else -1
    return degrees
