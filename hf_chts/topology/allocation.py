"""From a sparsity to a whole number of links."""


def links_at(numel: int, sparsity: float) -> int:
    """The number of links of a layer of `numel` weights at `sparsity`, to the nearest whole link."""
    return round(numel * (1 - sparsity))
