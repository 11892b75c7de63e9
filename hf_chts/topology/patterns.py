"""Patterns: the same number of links in every run of neighbouring inputs, whatever chooses them.

A run is a piece of a row of a mask (out, in), so that it belongs to one output:

    fan_in   the whole row: constant fan-in, as in SRigL (arXiv 2305.02299)
    N:M      M neighbouring inputs, N of them linked; 2:4 is what sparse tensor cores multiply

A choice is put under a pattern by making it in each run on its own: hard takes the highest scores of the run, soft
draws among its candidates. The random numbers of a run are a function of the layer's seed and the run's number, with
torch's operations alone, so that they are the same in a stack, on a device, and with numba or without.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_chts.topology.hashed_numbers import fractions, hashed, race_keys, seeds_on
from hf_chts.topology.random_streams import number_from
from hf_chts.topology.sampling import choose

NONE, FAN_IN = "none", "fan_in"
# Candidates to sort at a time: keys and orders of a large layer would take sixteen times the mask
_ELEMENTS = 1 << 22
_LEAST = -(1 << 63)


@dataclass(frozen=True)
class Pattern:
    """N of each M neighbouring inputs are links; or, under fan_in, all outputs have the same number, or one more.

    Attributes:
        kept: N; 0 for fan_in.
        of: M; 0 for fan_in.
    """

    kept: int = 0
    of: int = 0

    @property
    def name(self) -> str:
        return f"{self.kept}:{self.of}" if self.of else FAN_IN

    @property
    def sparsity(self) -> float | None:
        """The only sparsity that the pattern has; None where it has any."""
        return 1 - self.kept / self.of if self.of else None

    def width(self, columns: int) -> int:
        """The number of inputs of a run.

        Raises:
            ValueError: the inputs are not a whole number of runs.
        """
        if self.of and columns % self.of:
            raise ValueError(
                f"pattern is {self.name!r}, and {columns} inputs are no whole number of groups of {self.of}: leave the "
                "layer dense (exclude_modules), or choose pattern: fan_in"
            )
        return self.of or columns

    def numbers(self, links: Sequence[int], rows: int, columns: int, device: torch.device) -> Tensor:
        """How many links each run has in layers of (rows, columns) with these numbers of links.

        Under fan_in the rows share a layer's links out evenly, and those left over go to the first rows. So a row never
        gains a link when the layer loses some.

        Returns:
            int64 (layers, runs).

        Raises:
            ValueError: a layer of this pattern cannot have as many links.
        """
        runs = rows * (columns // self.width(columns))
        of_layer = seeds_on(links, device)
        if not self.of:
            return of_layer // rows + (torch.arange(rows, device=device) < of_layer % rows)
        right = runs * self.kept
        for number in links:
            if number != right:
                raise ValueError(
                    f"a layer of {rows} x {columns} has {right} links under pattern {self.name!r}, not {number}"
                )
        return of_layer.new_full((len(links), runs), self.kept)

    def kept_by(self, mask: Tensor) -> bool:
        """Whether a mask has the pattern; bool (out, in). Under fan_in it does not matter which rows have one more."""
        counts = links_of_runs(mask[None], self.width(mask.shape[1]))
        low, high = (int(bound) for bound in torch.aminmax(counts))
        return low == high == self.kept if self.of else high - low <= 1


def pattern_of(name: str) -> Pattern | None:
    """The pattern that a config names; None for "none".

    Raises:
        ValueError: there is no such pattern.
    """
    if name in (NONE, FAN_IN):
        return None if name == NONE else Pattern()
    found = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", name)
    if not found or not int(found[1]) < int(found[2]):
        raise ValueError(
            f"pattern is {name!r}; choose none, fan_in, or N:M with N less than M, such as 2:4 for two links of every "
            "four neighbouring inputs"
        )
    return Pattern(int(found[1]), int(found[2]))


def links_of_runs(masks: Tensor, width: int) -> Tensor:
    """The number of links of each run: bool (layers, out, in) → int64 (layers, runs)."""
    return masks.reshape(len(masks), -1, width).sum(2)


def highest(pattern: Pattern | None, links: int, generator: torch.Generator) -> Callable[..., Tensor]:
    """A function of scores, floating point (out, in), that gives the mask of the `links` highest under a pattern.

    With `by_row` every output gets the same number of links also where there is no pattern. Among equal scores the
    choice is uniformly random.
    """

    def chosen(scores: Tensor, *, by_row: bool = False) -> Tensor:
        every = torch.ones_like(scores, dtype=torch.bool)
        kept = Pattern() if pattern is None and by_row else pattern
        if kept is None:
            return choose(scores, links, every, soft=False, generator=generator)
        rows, columns = scores.shape
        numbers = kept.numbers([links], rows, columns, scores.device)
        return choose_in_runs(scores[None], numbers, every[None], [number_from(generator)], soft=False)[0]

    return chosen


def under_pattern(mask: Tensor, pattern: Pattern, links: int, seed: int) -> Tensor:
    """The links of a topology that the pattern allows, and for those that it does not, others of the same run.

    Which links a run with too many gives up, and which one with too few gets, is uniformly random.

    Args:
        mask: bool (out, in).
        links: of the result.

    Returns:
        bool (out, in) under the pattern, with exactly `links` links.
    """
    rows, columns = mask.shape
    numbers = pattern.numbers([links], rows, columns, mask.device)
    every = torch.ones_like(mask)[None]
    return choose_in_runs(mask.to(torch.float32)[None], numbers, every, [seed], soft=False)[0]


def shares_of_runs(numbers: Tensor, wanted: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """Share numbers out over runs in proportion to the links of each, to within one, with exact totals.

    Systematic sampling: the runs lie end to end, and every (total/wanted)-th link from a random one on counts.

    Args:
        numbers: int64 (layers, runs).
        wanted: by layer, at most the layer's total.
        seeds: signed 64-bit, by layer.

    Returns:
        int64 (layers, runs), none above `numbers`.
    """
    ends = numbers.cumsum(1)
    total = ends[:, -1:]
    begin = fractions(hashed(seeds_on(seeds, numbers.device), torch.zeros_like(total))).mul_(total).long()
    passed = (ends * seeds_on(wanted, numbers.device) + begin) // total.clamp(min=1)
    return passed.diff(dim=1, prepend=torch.zeros_like(total))


def choose_in_runs(
    scores: Tensor,
    numbers: Tensor,
    candidates: Tensor,
    seeds: Sequence[int],
    *,
    soft: bool,
    temperature: Sequence[float] | float = 1.0,
) -> Tensor:
    """Like `choosing.choose_each`, with a number to choose in every run.

    Args:
        scores: floating point (layers, out, in), finite and >= 0 on the candidates.
        numbers: int64 (layers, runs).
        candidates: bool (layers, out, in).
        seeds: signed 64-bit, by layer.
        soft, temperature: as for `choose_each`.

    Returns:
        bool (layers, out, in).

    Raises:
        ValueError: a run has fewer candidates than it is to get, or a score is negative or not finite.
    """
    layers, runs = numbers.shape
    device = candidates.device
    table, valid = (tensor.reshape(layers * runs, -1) for tensor in (scores, candidates))
    of_run = hashed(seeds_on(seeds, device), torch.arange(runs, device=device)).view(-1, 1)
    temperatures = [float(temperature)] * layers if isinstance(temperature, (int, float)) else list(temperature)
    exponents = torch.tensor(temperatures, dtype=torch.float64).to(device).repeat_interleave(runs)[:, None]
    wanted = numbers.reshape(-1, 1)
    chosen = torch.zeros_like(valid)
    some = wanted.view(-1).nonzero().view(-1)  # under N:M most groups get nothing new
    for part in some.split(max(1, _ELEMENTS // table.shape[1])):
        picked = _first(table[part], wanted[part], valid[part], of_run[part], exponents[part] if soft else None)
        chosen[part] = picked
    return chosen.view(candidates.shape)


def _first(table: Tensor, wanted: Tensor, valid: Tensor, seeds: Tensor, exponents: Tensor | None) -> Tensor:
    """The first `wanted` of each row in the order of its choice: (runs, width) → bool (runs, width)."""
    short = wanted - valid.sum(1, keepdim=True)
    if int(short.max()) > 0:
        run = int(short.argmax())
        raise ValueError(f"cannot choose {int(wanted[run])} of {int(valid[run].sum())} candidates of a run")
    table = table.where(valid, 0)
    low, high = torch.stack(torch.aminmax(table)).tolist()
    if not (low >= 0 and high < torch.inf):
        raise ValueError(f"scores must be finite and >= 0; got a minimum of {low} and a maximum of {high}")
    if exponents is not None:
        table = race_keys(table, seeds, exponents)
    table = table.masked_fill(~valid, -torch.inf)
    # among equal ones by hash; ~ keeps the hashes apart from those of the race. What is no candidate comes last
    ties = hashed(~seeds, torch.arange(table.shape[1], device=table.device)).masked_fill_(~valid, _LEAST)
    order = ties.argsort(dim=1, descending=True)
    order = order.gather(1, table.gather(1, order).argsort(dim=1, descending=True, stable=True))
    ranks = torch.arange(table.shape[1], device=table.device)
    return torch.zeros_like(valid).scatter_(1, order, ranks < wanted)
