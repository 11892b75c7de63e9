"""Runs that round differently and yet have to come to one topology.

The last score that is chosen and the first that is not may differ by one rounding: which of the two links is taken is
then up to the processor, and the runs part for good. So the choices of the first run are noted, and the second run,
whose scores have to be the same within rounding, takes them over.
"""

from contextlib import ExitStack, contextmanager
from functools import partial
from unittest import mock

from hf_chts.topology import evolution, patterned_evolution, patterns, sampling

# every function that chooses links by their scores in an update, with each module that calls it by name
CHOOSING = [
    (evolution, "choose_among"),
    (evolution, "choose_each"),
    (patterned_evolution, "choose_each"),
    (patterned_evolution, "choose_in_runs"),
    (patterns, "choose_in_runs"),
    (sampling, "choose_each"),
]


class SameChoices:
    """The choices of a first run, by the seeds of each, and the number of those that later runs took over."""

    def __init__(self, rounding: float):
        """rounding: how far scores may lie apart, as a share of the largest."""
        self.rounding = rounding
        self.first = {}
        self.taken = 0

    @contextmanager
    def noted(self):
        with self._patched(self._note):
            yield
        assert self.first

    @contextmanager
    def taken_over(self):
        with self._patched(self._take_over):
            yield

    def _note(self, key, scores, chosen):
        assert key not in self.first
        self.first[key] = scores.clone(), chosen.clone()
        return chosen

    def _take_over(self, key, scores, chosen):
        expected, first = self.first[key]
        assert (scores - expected).abs().max() <= self.rounding * expected.abs().max()
        assert chosen.shape == first.shape
        self.taken += 1
        return first.clone()

    @contextmanager
    def _patched(self, decide):
        with ExitStack() as stack:
            for module, name in CHOOSING:
                choose = partial(_choose, decide, getattr(module, name), (module.__name__, name))
                stack.enter_context(mock.patch.object(module, name, choose))
            yield


def _choose(decide, function, where, scores, *others, **options):
    """others: (counts, k, seeds) of choose_among, (k or numbers, candidates, seeds) of the others."""
    chosen = function(scores, *others, **options)
    of_candidates = scores if where[1] == "choose_among" else scores.where(others[1], 0)
    return decide((*where, tuple(others[2])), of_candidates, chosen)
