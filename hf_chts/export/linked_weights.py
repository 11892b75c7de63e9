"""The weights of a model whose layers keep their links in slots, as an export has them: dense, or packed.

They are made layer by layer as they are written. Only where an architecture stores its weights under other names or in
other pieces than those of its layers, which transformers does with all of them at a time, they are all made dense.
"""

from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from hf_chts.export import packed_format, packed_index
from hf_chts.export.weight_files import PACKED_STEM, PLAIN_STEM, write_shards
from hf_chts.files.tensor_file import Planned, dtype_name
from hf_chts.layers.linked_layer import LinkedLayer
from hf_chts.layers.wrappers import original_name
from hf_chts.sparse_model import SparsityHandle


class LinkedWeights:
    """The weights of a sparse model, by the names of its plain parameters.

    Args:
        sparse: its handle.
        state: its state dict, or the whole one of a model that is split over ranks, by original names.
    """

    def __init__(self, sparse: SparsityHandle, state: Mapping[str, Tensor]) -> None:
        self.sparse = sparse
        self.layers = {
            f"{name}.{layer.parameter_name}": layer
            for name, layer in (sparse.layers | sparse.copies()).items()
            if isinstance(layer, LinkedLayer)
        }
        self.state = {original_name(key): value for key, value in state.items()}

    def dense(self) -> dict[str, Tensor]:
        """All weights, dense."""
        return {self._plain_key(key): self._dense(key) for key in self.state}

    def layer_by_layer(self) -> bool:
        """Whether transformers stores the layers' weights by the names and in the shapes that the layers have."""
        return self._stored is not None

    def write(self, directory: Path, *, packed: bool, max_shard_size: int | str) -> None:
        """Write the weights into a directory, in shards, one layer at a time.

        They get the names by which transformers stores them, or those of the plain parameters where it stores layers in
        other pieces.
        """
        layers = {self._plain_key(key): key for key in self.layers}
        state = self._stored or {self._plain_key(key): value for key, value in self._saved().items()}
        transposed = {key for key, own in layers.items() if self.layers[own].transposed}

        def metadata(planned: Any) -> dict[str, str]:
            if not packed:
                return {"format": "pt"}
            keys = transposed & {tensor.key.removesuffix("_bits") for tensor in planned}
            return packed_format.metadata(keys, self.sparse.config.links_pattern)

        groups = []
        for key, value in state.items():
            if key not in layers:
                groups.append([Planned.of(key, value)])
            else:
                groups.append(self._packed(layers[key]) if packed else [self._planned(layers[key])])
        stem = PACKED_STEM if packed else PLAIN_STEM
        write_shards(directory, stem, groups, max_shard_size=max_shard_size, metadata=metadata, single=not packed)

    @cached_property
    def _stored(self) -> dict[str, Tensor] | None:
        """What transformers stores, with an outline for the weight of each layer; None where it takes those apart."""
        state: dict[str, Tensor] = {}
        for key, value in self._saved().items():
            layer = self.layers.get(key)
            outline = None if layer is None else value.new_empty(layer.storage.weight_shape, device="meta")
            state[self._plain_key(key)] = value if outline is None else outline
        outlines = {key: value for key, value in state.items() if value.is_meta}
        try:
            stored = revert_weight_conversion(cast(PreTrainedModel, self.sparse.model), dict(state))
        except Exception:  # it needs the numbers
            return None
        found = {key: value for key, value in stored.items() if value.is_meta}
        same = found.keys() == outlines.keys() and all(found[key] is value for key, value in outlines.items())
        return stored if same else None

    def _saved(self) -> dict[str, Tensor]:
        """What of the state is saved: ties once."""
        model: Any = self.sparse.model
        ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
        state = {key: value for key, value in self.state.items() if key not in ignored}
        return remove_tied_weights_from_state_dict(state, model)

    def _plain_key(self, key: str) -> str:
        return f"{key.rpartition('.')[0]}.weight" if key in self.layers else key

    def _dense(self, key: str) -> Tensor:
        layer, value = self.layers.get(key), self.state[key]
        return value if layer is None else layer.matrix(layer.storage.matrix(value.detach())).contiguous()

    def _planned(self, key: str) -> Planned:
        value, layer = self.state[key], self.layers.get(key)
        shape = value.shape if layer is None else layer.storage.weight_shape
        return Planned(
            self._plain_key(key), dtype_name(value.dtype), tuple(shape), lambda: self._dense(key).detach().cpu()
        )

    def _packed(self, key: str) -> list[Planned]:
        layer, value, name = self.layers[key], self.state[key], self._plain_key(key)
        rows, columns = layer.storage.weight_shape
        links, pattern = layer.links, self.sparse.config.links_pattern
        header = packed_index.header((rows, columns), links, pattern, layer.transposed)
        size = packed_index.size(header, links)
        return [
            Planned(f"{name}_bits", "U8", (size,), partial(_index, layer, header)),
            Planned(f"{name}_values", dtype_name(value.dtype), (links,), partial(_ordered, layer, value)),
            Planned(f"{name}_shape", "I64", (len(header),), lambda: torch.tensor(header)),
        ]


def _index(layer: LinkedLayer, header: tuple[int, ...]) -> Tensor:
    return packed_index.packed_index(layer.matrix(layer.topology).cpu(), header)


def _ordered(layer: LinkedLayer, values: Tensor) -> Tensor:
    """The values of the links in the order of their positions."""
    return values.detach().cpu()[layer.storage.order().cpu()]
