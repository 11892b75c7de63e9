"""Correlated sparse topological initialization (CSTI), from what a layer or the whole model sees."""

import torch
from torch import Tensor

from hf_chts.topology.allocation import check_links
from hf_chts.topology.parts import register
from hf_chts.topology.sampling import choose

# Rows of the correlation matrix to compute at a time, in float64
_BLOCK_ROWS = 1024


def correlated(
    inputs: Tensor, out_features: int, links: int, *, generator: torch.Generator, in_features: int | None = None
) -> Tensor:
    """CSTI: links where input features are correlated over calibration inputs (arXiv 2501.19107, App. D).

    The Pearson correlations between features, 0 for constant ones and on the diagonal, are tiled and cut to (out, in):
    output i stands for feature i mod features, and so does input j. The links are at the largest absolute values; equal
    ones are chosen uniformly at random.

    Args:
        inputs: (samples, features) floating point or integer, at least two samples: what the layer sees, flattened to
            rows; or what the model sees, which the authors' code tiles over all layers of an MLP.
        out_features: outputs of the layer.
        in_features: inputs of the layer; None: as many as there are features.

    Returns:
        bool (out, in) with exactly `links` links, on the generator's device.

    Raises:
        ValueError: `inputs` has another shape, fewer than two samples, or values that are not finite; or a size or
            `links` is out of range.
    """
    if inputs.dim() != 2:
        raise ValueError(
            f"calibration inputs are (samples, in_features); got {tuple(inputs.shape)}: flatten(0, -2) them"
        )
    samples, features = inputs.shape
    if samples < 2:
        raise ValueError(f"a correlation takes at least two calibration samples; got {samples}")
    in_features = features if in_features is None else in_features
    total = check_links(out_features, in_features, links)
    values = inputs.detach().to(generator.device, torch.float64, copy=True)  # the one copy; the rest is done in place
    low, high = values.aminmax(dim=0)
    if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise ValueError(
            f"{int((~torch.isfinite(values)).sum())} of the {values.numel()} calibration inputs are not finite: "
            "leave those samples out"
        )

    # compared by value: the deviations of a constant from its mean are rounding errors, which correlate with anything
    constant = low == high
    values /= torch.maximum(low.abs(), high.abs()).clamp(min=torch.finfo(torch.float64).tiny)  # no square overflows
    values -= values.mean(0)
    values /= values.norm(dim=0)
    values[:, constant] = 0  # (samples, features), each feature of mean 0 and length 1

    scores = torch.empty(min(out_features, features), features, dtype=torch.float32, device=generator.device)
    for start in range(0, len(scores), _BLOCK_ROWS):
        block = slice(start, min(start + _BLOCK_ROWS, len(scores)))
        # rounded to float32, so that (a, b) and (b, a) are equal
        scores[block] = (values[:, block].t() @ values).abs_().float()
    scores.diagonal().zero_()
    scores = scores.repeat(-(-out_features // features), -(-in_features // features))[:out_features, :in_features]
    return choose(scores, total, torch.ones_like(scores, dtype=torch.bool), soft=False, generator=generator)


@register.initial_topology("correlated")
def _correlated(inputs: Tensor, out_features: int, in_features: int, links: int, generator: torch.Generator) -> Tensor:
    return correlated(inputs, out_features, links, generator=generator, in_features=in_features)
