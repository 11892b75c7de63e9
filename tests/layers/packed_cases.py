"""Weights for tests of packed layers."""

import torch

# (out, in), share of links
CASES = {
    "some": ((40, 72), 0.3),
    "empty rows and columns": ((50, 30), 0.02),
    "no link": ((7, 5), 0.0),
    "all links": ((33, 20), 1.0),
    "one weight": ((1, 1), 1.0),
    "wide gaps": ((20, 3000), 0.004),
    "more than 65536 columns": ((3, 70_000), 0.0002),
    "rows of very different lengths": ((100, 64), None),
}
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-4},
    torch.bfloat16: {"rtol": 8e-3, "atol": 1e-4},
    torch.float16: {"rtol": 1e-3, "atol": 1e-3},
}


def weight_of(case, dtype=torch.float32):
    """A mask and a weight, (out, in)."""
    shape, share = CASES[case]
    torch.manual_seed(len(case))
    chance = torch.rand(shape[0], 1) ** 6 if share is None else share
    mask = torch.rand(shape) < chance
    return mask, (torch.randn(shape) * mask).to(dtype)
