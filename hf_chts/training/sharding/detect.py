"""Which engine holds the weights, and which cannot be worked with."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from hf_chts.layers.masked_layer import MaskedLayer
from hf_chts.training.sharding.interface import Engine
from hf_chts.training.sharding.replicated import ReplicatedWeights
from hf_chts.training.sharding.zero import ZeroStage3Weights, ZeroStage12Weights

_ZERO_STAGES_1_2 = ("DeepSpeedZeroOptimizer", "BF16_Optimizer")
_ZERO_STAGE_3 = "DeepSpeedZeroOptimizer_Stage3"

# Optimizers whose state is not one value for each weight, or that move weights whose gradient is 0
_NOT_ELEMENTWISE = (
    "adafactor", "apollo", "galore", "lbfgs", "lomo", "muon", "onebit", "shampoo", "soap", "zeroone",
    "4bit", "8bit", "fp8",
)  # fmt: skip


def engine_of(model: nn.Module, layers: Mapping[str, MaskedLayer], optimizer: Any) -> Engine:
    """The engine that holds the weights of `layers`. Collective; to be called when model and optimizer are prepared.

    Args:
        model: the model that the layers are in, wrapped or not.
        layers: its masked layers by name.
        optimizer: torch's, Accelerate's or DeepSpeed's, as prepared for the run.

    Raises:
        ValueError: the engine, or the optimizer, is one with which topologies cannot be evolved rightly; the message
            names it.
    """
    scaler = getattr(optimizer, "scaler", None)
    while type(optimizer).__module__.startswith("accelerate."):
        optimizer = optimizer.optimizer
    kind = type(optimizer).__name__
    if type(optimizer).__module__.startswith("deepspeed.runtime."):
        _check_optimizer(optimizer.optimizer)
        if kind in _ZERO_STAGES_1_2:
            return ZeroStage12Weights(layers.values(), optimizer)
        if kind != _ZERO_STAGE_3:
            raise ValueError(
                f"DeepSpeed holds the weights with {kind}, of which the library cannot tell where master weights and "
                "moments lie: use ZeRO stage 1, 2 or 3 with fp32 or bf16"
            )
        _check_stage_3(layers, optimizer)
        return ZeroStage3Weights(layers.values(), optimizer)

    _check_optimizer(optimizer)
    scale = (lambda: float(scaler.get_scale())) if scaler is not None else (lambda: 1.0)
    for name, layer in layers.items():
        if hasattr(layer.weight, "_fsdp_flattened") or not isinstance(layer.weight, nn.Parameter):
            raise ValueError(
                f"FSDP1 holds {name}, which flattens weights and moments together: set fsdp_version to 2 "
                "(configs/accelerate/fsdp2.yaml)"
            )
    if any(hasattr(layer.weight, "device_mesh") for layer in layers.values()):
        from hf_chts.training.sharding.fsdp2 import Fsdp2Weights, check_fsdp2

        check_fsdp2(model, layers)
        return Fsdp2Weights(layers.values(), optimizer, scale)
    for name, layer in layers.items():
        if layer.weight.shape != layer.mask.shape:
            raise ValueError(
                f"{name} has a weight of {tuple(layer.weight.shape)} and a mask of {tuple(layer.mask.shape)} under "
                f"{kind}: what holds the weight is none of DDP, FSDP2, and DeepSpeed ZeRO 1, 2 and 3"
            )
    return ReplicatedWeights(optimizer, scale)


def _check_optimizer(optimizer: Any) -> None:
    kind = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
    quantized = kind.startswith("bitsandbytes.") and optimizer.args.optim_bits != 32
    if quantized or any(name in kind.lower() for name in _NOT_ELEMENTWISE):
        raise ValueError(
            f"the optimizer {kind} does not keep one value of its state for each weight, or moves weights that have no "
            "gradient: missing links would not stay 0. Use one with elementwise state, such as AdamW"
        )


def _check_stage_3(layers: Mapping[str, MaskedLayer], optimizer: Any) -> None:
    if getattr(optimizer, "swap_optimizer", False) or getattr(optimizer, "params_in_nvme_and_cpu", False):
        raise ValueError("ZeRO stage 3 keeps weights or moments on NVMe, which is not supported: offload to the CPU")
    for name, layer in layers.items():
        if getattr(layer.weight, "ds_secondary_tensor", None) is not None:
            raise ValueError(
                f"ZeRO++ keeps a second copy of {name} (zero_hpz_partition_size), which is not supported: set it to 1"
            )
