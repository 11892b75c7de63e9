"""Find the engine that holds a model's weights, and refuse the ones that are not supported."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from hf_chts.sharding.interface import Engine, HeldLayer
from hf_chts.sharding.optimizer_state import check_state
from hf_chts.sharding.replicated import ReplicatedWeights
from hf_chts.sharding.zero import ZeroStage3Weights, ZeroStage12Weights

_ZERO_STAGES_1_2 = ("DeepSpeedZeroOptimizer", "BF16_Optimizer")
_ZERO_STAGE_3 = "DeepSpeedZeroOptimizer_Stage3"

# Optimizers that keep one value of each state for each weight, and never move a weight of 0 whose gradient is 0
_ELEMENTWISE = (
    "adam", "adamw", "nadam", "radam", "adamax", "adagrad", "adadelta", "rmsprop", "rprop", "sgd", "asgd",
    "lion", "adan", "ademamix", "fusedadam", "deepspeedcpuadam", "deepspeedcpuadagrad", "deepspeedcpulion", "fusedlion",
    "stableadamw",
)  # fmt: skip
# Optimizers with which missing links could not be kept at 0 even by setting them to 0 after each step: they step inside
# the backward pass or more than once, or what they hold of a link that goes is quantized or projected
_IMPOSSIBLE = ("lbfgs", "lomo", "galore", "apollo", "onebit", "zeroone", "4bit", "8bit", "fp8")


def engine_of(model: nn.Module, layers: Mapping[str, HeldLayer], optimizer: Any) -> Engine:
    """Find the engine that holds the weights of `layers`. Collective; call it once model and optimizer are prepared.

    Args:
        model: the model that the layers are in, wrapped or not.
        layers: its masked layers by name.
        optimizer: torch's, Accelerate's or DeepSpeed's, as prepared for the run.

    Raises:
        ValueError: topologies cannot evolve with this engine or optimizer, or with the way a layer holds its weight;
            the message names it.
    """
    scaler = getattr(optimizer, "scaler", None)
    while type(optimizer).__module__.startswith("accelerate."):
        optimizer = optimizer.optimizer
    kind = type(optimizer).__name__
    if type(optimizer).__module__.startswith("deepspeed.runtime."):
        _check_elementwise(optimizer.optimizer, "DeepSpeed")
        if kind in _ZERO_STAGES_1_2:
            return ZeroStage12Weights(layers.values(), optimizer)
        if kind != _ZERO_STAGE_3:
            raise ValueError(
                f"DeepSpeed holds the weights with {kind}, of which the library cannot tell where master weights and "
                "moments lie: use ZeRO stage 1, 2 or 3 with fp32 or bf16"
            )
        _check_stage_3(layers, optimizer)
        return ZeroStage3Weights(layers.values(), optimizer)

    mixing = _mixes(optimizer)
    scale = (lambda: float(scaler.get_scale())) if scaler is not None else (lambda: 1.0)
    for name, layer in layers.items():
        if hasattr(layer.parameter, "_fsdp_flattened") or not isinstance(layer.parameter, nn.Parameter):
            raise ValueError(
                f"FSDP1 holds {name}, which flattens weights and moments together: set fsdp_version to 2 "
                "(configs/accelerate/fsdp2.yaml)"
            )
    if any(hasattr(layer.parameter, "device_mesh") for layer in layers.values()):
        from hf_chts.sharding.fsdp2 import Fsdp2Weights, check_fsdp2

        _check_elementwise(optimizer, "FSDP2")
        check_fsdp2(model, layers)
        return Fsdp2Weights(layers.values(), optimizer, scale)
    for name, layer in layers.items():
        if layer.parameter.shape != layer.storage.parameter_shape:
            raise ValueError(
                f"{name} has a weight of {tuple(layer.parameter.shape)} where {tuple(layer.storage.parameter_shape)} "
                f"is expected, under {kind}: what holds the weight is none of DDP, FSDP2, and DeepSpeed ZeRO 1, 2 and 3"
            )
    return ReplicatedWeights(optimizer, scale, mixing=mixing)


def _mixes(optimizer: Any) -> bool:
    """Whether the optimizer may move a weight whose gradient is 0; True as well if that is not known.

    Raises:
        ValueError: missing links cannot be kept at 0 with this optimizer.
    """
    kind = _kind(optimizer)
    quantized = kind.startswith("bitsandbytes.") and optimizer.args.optim_bits != 32
    if quantized or any(name in kind.lower() for name in _IMPOSSIBLE):
        raise ValueError(
            f"the optimizer {kind} cannot be used: missing links would not stay 0, or what it keeps of a link that "
            "goes could not be set to 0. Use one with a value for each weight, such as AdamW"
        )
    mixes = type(optimizer).__name__.lower() not in _ELEMENTWISE
    if not mixes:
        check_state(optimizer)
    return mixes


def _check_elementwise(optimizer: Any, engine: str) -> None:
    if _mixes(optimizer):
        raise ValueError(
            f"the optimizer {_kind(optimizer)} is none of those known to move each weight on its own, and under "
            f"{engine} its weights cannot be masked again after each step: use AdamW, SGD or Lion, or train with DDP"
        )


def _kind(optimizer: Any) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def _check_stage_3(layers: Mapping[str, HeldLayer], optimizer: Any) -> None:
    if getattr(optimizer, "swap_optimizer", False) or getattr(optimizer, "params_in_nvme_and_cpu", False):
        raise ValueError("ZeRO stage 3 keeps weights or moments on NVMe, which is not supported: offload to the CPU")
    for name, layer in layers.items():
        if getattr(layer.parameter, "ds_secondary_tensor", None) is not None:
            raise ValueError(
                f"ZeRO++ keeps a second copy of {name} (zero_hpz_partition_size), which is not supported: set it to 1"
            )
