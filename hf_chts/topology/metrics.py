"""Figures about a topology and its changes, as plain floats between 0 and 1."""

import torch
from torch import Tensor


def density(mask: Tensor) -> float:
    """Links over possible links; bool (out, in)."""
    return int(torch.count_nonzero(mask)) / mask.numel()


def itop_rate(explored: Tensor) -> float:
    """In-time over-parametrisation: the share of all possible links that were active at least once.

    `explored` is the union of all masks so far, bool (out, in). arXiv 2102.02887.
    """
    return density(explored)


def active_neurons(mask: Tensor) -> int:
    """The number of a layer's input and output nodes that have a link; bool (out, in)."""
    links = mask.view(torch.uint8)  # any() over bool takes ten times as long as a maximum over bytes
    return int(torch.count_nonzero(links.amax(1)) + torch.count_nonzero(links.amax(0)))


def active_neuron_rate(mask: Tensor) -> float:
    """The share of a layer's input and output nodes that have a link; bool (out, in). arXiv 2501.19107, App. G."""
    return active_neurons(mask) / (mask.shape[0] + mask.shape[1])


def overlap_rate(removed: Tensor, regrown: Tensor) -> float:
    """The share of the regrown links that had just been removed; bool, one shape. 0 if nothing was regrown.

    Near 1, removal and regrowth undo each other: an epitopological local minimum (arXiv 2501.19107, App. A).
    """
    total = int(torch.count_nonzero(regrown))
    return int(torch.count_nonzero(removed & regrown)) / total if total else 0.0
