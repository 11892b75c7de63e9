"""The weights of a packed directory, checked before they are unpacked. It may be hostile."""

import json
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hf_chts.export import packed_index
from hf_chts.export.checksums import verify_checksums
from hf_chts.export.packed_format import KINDS, METHOD, VERSION, known_version, unpack_weight
from hf_chts.export.weight_files import FLOATS, PACKED_STEM, DamagedFile, WeightFiles, unlisted_shards
from hf_chts.topology.bits import count_bits, unpack_bits


@dataclass(frozen=True)
class PackedWeight:
    """A sparse weight as the headers describe it. The shape is (in, out) if it is stored transposed; `claimed` is
    K_shape."""

    shape: tuple[int, int]
    dtype: str
    links: int
    transposed: bool
    claimed: tuple[int, ...]


class PackedFiles:
    """The tensors of a packed directory. Opening it reads headers and shapes.

    Attributes:
        weights: the sparse weights by key.
        files: all stored tensors.
        others: the keys of tensors that are stored as they are.

    Raises:
        FileNotFoundError: a shard or the index is missing.
        DamagedFile: sizes, dtypes or names contradict each other. Nothing of a claimed size is allocated before.
    """

    def __init__(self, directory: Path) -> None:
        self.files = WeightFiles(directory, PACKED_STEM)
        if extra := unlisted_shards(directory, PACKED_STEM):
            raise DamagedFile(directory / extra[0], "the index does not list it, so it belongs to another export")
        transposed = {key for path in self.files.metadata for key in self._transposed(path)}
        entries = self.files.entries
        keys = list(dict.fromkeys(key.rsplit("_", 1)[0] for key in entries if _is_part(key)))
        self.weights = {key: self._weight(key, key in transposed) for key in keys}
        self.others = [key for key in entries if not _is_part(key)]
        for key in [key for key in keys if key in entries] + sorted(transposed - set(keys)):
            raise DamagedFile(
                next(iter(self.files.metadata)).parent, f"{key} is not stored exactly once as a packed weight"
            )

    def bits(self, key: str) -> Tensor:
        """uint8 (ceil(n / 8),): the bits of the mask, in the order in which the weight is stored.

        Raises:
            DamagedFile: another index stands for no mask with a link for each value.
        """
        weight, name = self.weights[key], f"{key}_bits"
        try:
            return packed_index.index_bits(self.files.read(name), weight.claimed, weight.links)
        except ValueError as error:
            raise DamagedFile(self.files.entries[name].path, f"{key} has {error}") from error

    def mask(self, key: str) -> Tensor:
        """The mask of a layer, bool (out, in)."""
        mask = unpack_bits(self.bits(key), self.weights[key].shape)
        return mask.t() if self.weights[key].transposed else mask

    def weight(self, key: str) -> Tensor:
        """The weight as it is stored in a plain directory."""
        return unpack_weight(self.bits(key), self.files.read(f"{key}_values"), self.weights[key].shape)

    def check_contents(self) -> None:
        """Read all files. Raises DamagedFile if a checksum does not match, or a mask has not one link per value."""
        verify_checksums(self.files.directory, PACKED_STEM)
        for key, weight in self.weights.items():
            bits, path = self.bits(key), self.files.entries[f"{key}_bits"].path
            n = weight.shape[0] * weight.shape[1]
            if n % 8 and int(bits[-1]) >> n % 8:
                raise DamagedFile(path, f"a bit of {key} after its {n} weights is set")
            if count_bits(bits) != weight.links:
                raise DamagedFile(path, f"{key} has {count_bits(bits)} links and {weight.links} values")

    def _transposed(self, path: Path) -> list[str]:
        try:
            said = json.loads(self.files.metadata[path][METHOD])
            version, keys = said["version"], said["transposed"]
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedFile(path, "it has no metadata of packed weights") from error
        if not known_version(version):
            raise DamagedFile(path, f"its format is version {version!r}, upgrade hf_chts, which reads 1 to {VERSION}")
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise DamagedFile(path, "its metadata has no list of transposed weights")
        return keys

    def _weight(self, key: str, transposed: bool) -> PackedWeight:
        entries = self.files.entries
        missing = [f"{key}_{kind}" for kind in KINDS if f"{key}_{kind}" not in entries]
        if missing:
            raise DamagedFile(self.files.directory, f"{missing[0]} is missing")
        bits, values, shape = (entries[f"{key}_{kind}"] for kind in KINDS)
        if (bits.dtype, shape.dtype) != ("U8", "I64") or shape.shape not in ((2,), (5,)) or len(bits.shape) != 1:
            raise DamagedFile(bits.path, f"{key} has bits {bits.dtype} {bits.shape}, shape {shape.dtype} {shape.shape}")
        if values.dtype not in FLOATS or len(values.shape) != 1:
            raise DamagedFile(values.path, f"the values of {key} are {values.dtype} {values.shape}")
        claimed = tuple(int(size) for size in self.files.read(f"{key}_shape"))
        rows, columns = claimed[:2]
        try:
            packed_index.check(claimed)
        except ValueError as error:
            raise DamagedFile(bits.path, f"{key} has {error}") from error
        # Python integers do not overflow; after this check the product is in proportion to the file's bytes
        if min(rows, columns) < 1 or bits.shape != (packed_index.size(claimed, values.shape[0]),):
            raise DamagedFile(bits.path, f"{key} claims {rows} × {columns}, and has {bits.shape[0]} bytes of bits")
        if values.shape[0] > rows * columns:
            raise DamagedFile(values.path, f"{key} has {values.shape[0]} values for {rows} × {columns} weights")
        return PackedWeight((rows, columns), values.dtype, values.shape[0], transposed, claimed)


def _is_part(key: str) -> bool:
    return key.endswith(tuple(f"weight_{kind}" for kind in KINDS))
