"""What rows padded to 16 bytes save on a GPU, where a width such as LLaMA-1B's 5,461 keeps products off tensor cores.

    python benchmarks/odd_widths.py [--tokens 4096]

Forward and backward pass of one layer in bf16: with links in slots, padded (as it is) and not, and of `nn.Linear`, at
the odd width and at the next multiple of eight. Prints one JSON line for each layer; needs a GPU.
"""

import argparse
import json
import statistics

import torch
from torch import nn

from hf_chts import SparsityConfig, sparsify
from hf_chts.layers.weight_parts import Slots


def milliseconds(layer: nn.Module, x: torch.Tensor, repeats: int = 20) -> float:
    """Of one forward and backward pass: the median."""
    found = []
    for _ in range(repeats + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        with torch.autocast("cuda", torch.bfloat16):
            y = layer(x)
        y.backward(torch.ones_like(y))
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end))
    return round(statistics.median(found[3:]), 3)


def linear(width_in: int, width_out: int) -> nn.Module:
    with torch.device("cuda"):
        return nn.Sequential(nn.Linear(width_in, width_out, bias=False))


def linked(width_in: int, width_out: int) -> nn.Module:
    model = linear(width_in, width_out)
    sparsify(model, SparsityConfig("set", sparsity=0.9, storage="links", target_modules=["0"]))
    return model


def measure(width_in: int, width_out: int, tokens: int) -> dict:
    x = torch.randn(tokens, width_in, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    model, as_it_is = linked(width_in, width_out), Slots.padded
    found = {"links, padded": milliseconds(model, x)}
    Slots.padded = lambda slots, x: slots.shape
    found["links, not padded"] = milliseconds(model, x)
    Slots.padded = as_it_is
    found["dense"] = milliseconds(linear(width_in, width_out), x)
    even_in, even_out = (-(-width // 8) * 8 for width in (width_in, width_out))
    even = torch.randn(tokens, even_in, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    found["dense, multiple of 8"] = milliseconds(linear(even_in, even_out), even)
    found["links, multiple of 8"] = milliseconds(linked(even_in, even_out), even)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    arguments = parser.parse_args()
    for shape in ((2048, 5461), (5461, 2048)):
        row = {"benchmark": "odd_widths", "in": shape[0], "out": shape[1], "tokens": arguments.tokens}
        milli = measure(*shape, arguments.tokens)
        print(json.dumps(row | {"device": torch.cuda.get_device_name(), "milliseconds": milli}), flush=True)
