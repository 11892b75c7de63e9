"""Which of a model's own subclasses of linear layers still compute a linear product.

Falcon's does; its forward only rounds in another order. A subclass that scales or rounds its weight, or sends groups of
features through parts of it, does not: there a weight of 0 need not be a missing link.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from hf_chts.sharding.partitions import weight_shape
from hf_chts.topology.random_streams import random_stream

_ROWS = 3


def computes_a_product(layer: nn.Module) -> bool:
    """Whether a layer, `nn.Linear`, `Conv1D` or a subclass, computes x·Wᵀ + b, in training and in evaluation.

    A subclass with its own forward is tried with random inputs and a random weight, without its hooks and parameters,
    which may be split over ranks. The global random state does not change.
    """
    plain = Conv1D if isinstance(layer, Conv1D) else nn.Linear
    if type(layer).forward is plain.forward:
        return True
    weight = layer.get_parameter("weight")
    if not weight.dtype.is_floating_point:
        return False
    stream = random_stream(0)
    device = torch.device("cpu") if weight.is_meta else weight.device

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=stream, device="cpu").to(device, weight.dtype)

    rows, columns = weight_shape(weight)
    bias = getattr(layer, "bias", None)
    tried = {"weight": normal(rows, columns)}
    if bias is not None:
        tried["bias"] = normal(*weight_shape(bias))
    inputs = normal(_ROWS, rows if plain is Conv1D else columns)
    matrix = tried["weight"].t() if plain is Conv1D else tried["weight"]
    expected = functional.linear(inputs, matrix, tried.get("bias"))
    return all(_agrees(layer, training, tried, inputs, expected) for training in (True, False))


@torch.no_grad()
def _agrees(layer: nn.Module, training: bool, parameters: dict[str, Tensor], inputs: Tensor, expected: Tensor) -> bool:
    twin = layer.__new__(type(layer))
    twin.__dict__ = layer.__dict__ | {"_parameters": layer._parameters | parameters, "training": training}
    devices = [inputs.device] if inputs.device.type != "cpu" else []
    with torch.random.fork_rng(devices, device_type=inputs.device.type if devices else "cuda"):
        try:
            found = twin.forward(inputs)
        except Exception:  # it takes other inputs, or needs another weight
            return False
    tolerance = 64 * torch.finfo(expected.dtype).eps * float(expected.abs().max())
    return (
        isinstance(found, Tensor)
        and found.shape == expected.shape
        and bool(torch.allclose(found.to(expected.dtype), expected, rtol=0, atol=tolerance))
    )
