"""What may be exported and pushed: plain numbers that are finite."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from torch import Tensor

from hf_chts.export.weight_files import WeightFiles
from hf_chts.finite import not_finite
from hf_chts.layers.plain_weight import own_class
from hf_chts.layers.shares import some


def check_values(state: Mapping[str, Tensor], buffers: Collection[str] = ()) -> None:
    """Raises of a model's weights and buffers by name, before anything is written:

    ValueError: one is quantized.
    FloatingPointError: some hold NaN or infinity.
    """
    for name, tensor in state.items():
        if kind := own_class(tensor):
            raise ValueError(
                f"{name} is of the class {kind}, and an export has plain weights alone: export before the model "
                "is quantized, and quantize what is exported"
            )
    if bad := not_finite(state, masking=buffers):
        raise FloatingPointError(
            f"there is NaN or infinity in {some(bad)}, so nothing is exported: repair it, or, where training has "
            "diverged, go on from an earlier checkpoint"
        )


def check_stored(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError where tensors that a file holds are not finite."""
    if bad := not_finite(tensors, masking=tensors):  # which of them are buffers is not known
        raise ValueError(
            f"{path}: there is NaN or infinity in {some(bad)}: repair it, or, where training had diverged, take an "
            "earlier checkpoint"
        )


def check_all_stored(files: WeightFiles, keys: Iterable[str]) -> None:
    """The same for all of these tensors, one at a time in memory."""
    for key in keys:
        check_stored(files.entries[key].path, {key: files.read(key)})
