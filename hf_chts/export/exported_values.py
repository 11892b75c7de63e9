"""Only plain, finite weights that are 0 off their masks are exported, pushed and loaded."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from torch import Tensor

from hf_chts.export.weight_files import WeightFiles
from hf_chts.finite import not_finite
from hf_chts.layers.plain_weight import own_class
from hf_chts.names import listed


def check_values(state: Mapping[str, Tensor], buffers: Collection[str] = ()) -> None:
    """Check a model's weights and buffers, by name, before anything is written.

    Args:
        buffers: the names of the buffers, which may hold −∞ as attention masks do.

    Raises:
        ValueError: one is quantized.
        FloatingPointError: some hold NaN or infinity.
    """
    for name, tensor in state.items():
        if kind := own_class(tensor):
            raise ValueError(
                f"{name} is of the class {kind}, and only plain weights can be exported: export the model first, and "
                "quantize the export"
            )
    if bad := not_finite(state, masking=buffers):
        raise FloatingPointError(
            f"there is NaN or infinity in {listed(bad)}, so nothing is exported: repair it, or use an earlier "
            "checkpoint if training has diverged"
        )


def check_stored(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError if tensors of a file hold NaN or +∞; −∞ passes, for which of them are buffers is unknown."""
    if bad := not_finite(tensors, masking=tensors):
        raise ValueError(
            f"{path}: there is NaN or infinity in {listed(bad)}: repair it, or use an earlier checkpoint if training "
            "has diverged"
        )


def off_mask(weight: Tensor, mask: Tensor) -> bool:
    """Whether a weight has values other than 0 off its mask. Both have one shape; NaN is such a value, -0.0 is not."""
    return bool((weight.detach().ne(0) & ~mask.to(weight.device)).any())


def check_zeros(path: Path, layer: str, weight: Tensor, *masks: Tensor) -> None:
    """Raises ValueError if a weight of a file or directory is not 0 off its mask.

    With several masks it has to be 0 off one of them: the mask and its transpose, where the layout is not known.
    """
    if all(mask.shape != weight.shape or off_mask(weight, mask) for mask in masks):
        raise ValueError(
            f"{path}: {layer} has weights off its mask, so weights and masks are of different models: restore both "
            "from one export"
        )


def check_all_stored(files: WeightFiles, keys: Iterable[str]) -> None:
    """`check_stored` for these tensors, with one in memory at a time."""
    for key in keys:
        check_stored(files.entries[key].path, {key: files.read(key)})
