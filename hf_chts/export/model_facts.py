"""What a model card says about a model, read from the model or from the files of a directory."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from hf_chts.checkpoint import MASKS_NAME, MaskFile
from hf_chts.config import SparsityConfig
from hf_chts.export.packed_files import PackedFiles
from hf_chts.export.packed_format import is_packed, plain_config
from hf_chts.export.sources import architecture
from hf_chts.export.weight_files import read_json
from hf_chts.names import last_part
from hf_chts.sparse_model import SparsityHandle
from hf_chts.topology.bits import count_bits


@dataclass(frozen=True)
class LayerFacts:
    """A layer, or several of one kind and shape with their links together.

    Attributes:
        kind: the last part of its name that is not a number.
        shape: (out, in).
    """

    kind: str
    shape: tuple[int, int]
    links: int
    number: int = 1

    @property
    def sparsity(self) -> float:
        return 1 - self.links / (self.number * self.shape[0] * self.shape[1])


@dataclass(frozen=True)
class ModelFacts:
    """A model without its weights.

    Attributes:
        architecture: the name of its class.
        sparsity: how it was trained.
        layers: its sparse layers.
        config: the contents of its config.json, of a plain directory.
        packed: whether its weights are stored packed.
    """

    architecture: str
    sparsity: SparsityConfig
    layers: list[LayerFacts]
    config: Mapping[str, Any]
    packed: bool = False

    @property
    def links(self) -> int:
        return sum(layer.links for layer in self.layers)

    @property
    def missing(self) -> float:
        """The share of the sparse layers' weights that are missing links."""
        possible = sum(layer.shape[0] * layer.shape[1] for layer in self.layers)
        return 1 - self.links / possible if possible else 0.0

    @property
    def kinds(self) -> list[LayerFacts]:
        """The layers of the same kind and shape together, for a table."""
        links: dict[tuple[str, tuple[int, int]], list[int]] = {}
        for layer in self.layers:
            links.setdefault((layer.kind, layer.shape), []).append(layer.links)
        return [LayerFacts(kind, shape, sum(each), len(each)) for (kind, shape), each in links.items()]

    @classmethod
    def of_model(cls, sparse: SparsityHandle, masks: Mapping[str, Tensor] | None = None) -> "ModelFacts":
        """Facts of a sparse model; `masks`, bool (out, in) by layer name, stand in for its own."""
        layers = []
        for name, mask in (sparse.topologies() if masks is None else masks).items():
            rows, columns = mask.shape
            layers.append(LayerFacts(last_part(name), (rows, columns), int(mask.count_nonzero())))
        config = getattr(sparse.model, "config", None)
        contents = config.to_dict() if isinstance(config, PreTrainedConfig) else {}
        name = type(sparse.model).__name__.removeprefix("FSDP")  # as fully_shard renames it
        return cls(name, sparse.config, layers, contents)

    @classmethod
    def of_directory(cls, directory: Path, sparsity: SparsityConfig | None = None) -> "ModelFacts":
        """Facts of a directory. Reads headers and masks, but no weights.

        Args:
            directory: an export or a checkpoint.
            sparsity: for a directory that has no sparsity_config.json.

        Raises:
            FileNotFoundError, ValueError: a file is missing or damaged.
        """
        config = read_json(directory / "config.json")
        sparsity = sparsity or SparsityConfig.load(directory)
        layers = []
        if is_packed(config):
            for key, weight in PackedFiles(directory).weights.items():
                rows, columns = weight.shape[::-1] if weight.transposed else weight.shape
                layers.append(LayerFacts(last_part(key.removesuffix(".weight")), (rows, columns), weight.links))
        elif not sparsity.is_dense or (directory / MASKS_NAME).is_file():
            masks = MaskFile(directory)
            for name, shape in masks.shapes.items():
                links = count_bits(masks.tensors[f"{name}.mask"])
                layers.append(LayerFacts(last_part(name), (shape[0], shape[1]), links))
        return cls(architecture(config) or "model", sparsity, layers, plain_config(config), is_packed(config))
