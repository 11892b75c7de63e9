"""The weights of a packed directory, checked before they are unpacked."""

import json
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hf_chts.export.checksums import verify_checksums
from hf_chts.export.packed_format import KINDS, METHOD, VERSION, unpack_weight
from hf_chts.export.weight_files import FLOATS, PACKED_STEM, DamagedFile, WeightFiles, strays
from hf_chts.topology.bits import count_bits, unpack_bits


@dataclass(frozen=True)
class PackedWeight:
    """What is known of a sparse weight before its values are read; the shape is that in which it lies."""

    shape: tuple[int, int]
    dtype: str
    links: int
    transposed: bool


class PackedFiles:
    """The tensors of a packed directory. Making one reads headers and shapes.

    Attributes:
        weights: the sparse weights by key.
        files: all stored tensors; those that `others` names are stored as they are.

    Raises:
        FileNotFoundError: a shard or the index is missing.
        DamagedFile: sizes, types or names do not fit each other; nothing of that size has been allocated.
    """

    def __init__(self, directory: Path) -> None:
        self.files = WeightFiles(directory, PACKED_STEM)
        extra = strays(directory, PACKED_STEM)
        if extra:
            raise DamagedFile(directory / extra[0], "the index does not have it, so it is of another export")
        transposed = {key for path in self.files.metadata for key in self._transposed(path)}
        entries = self.files.entries
        keys = list(dict.fromkeys(key.rsplit("_", 1)[0] for key in entries if _is_part(key)))
        self.weights = {key: self._weight(key, key in transposed) for key in keys}
        self.others = [key for key in entries if not _is_part(key)]
        for key in [key for key in keys if key in entries] + sorted(transposed - set(keys)):
            raise DamagedFile(next(iter(self.files.metadata)).parent, f"{key} is not stored once as a packed weight")

    def bits(self, key: str) -> Tensor:
        """uint8: the mask as the weight lies."""
        return self.files.read(f"{key}_bits")

    def mask(self, key: str) -> Tensor:
        """bool (out, in): the topology of a layer."""
        mask = unpack_bits(self.bits(key), self.weights[key].shape)
        return mask.t() if self.weights[key].transposed else mask

    def weight(self, key: str) -> Tensor:
        """The weight as it lies, with zeros off its links."""
        return unpack_weight(self.bits(key), self.files.read(f"{key}_values"), self.weights[key].shape)

    def check_contents(self) -> None:
        """Raises DamagedFile if a mask has not as many links as there are values, or checksums are not those of then.

        All files are read.
        """
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
            raise DamagedFile(path, "its metadata are not those of packed weights") from error
        if version != VERSION:
            raise DamagedFile(path, f"its format is version {version!r} and this hf_chts reads {VERSION}: upgrade it")
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise DamagedFile(path, "its metadata have no list of transposed weights")
        return keys

    def _weight(self, key: str, transposed: bool) -> PackedWeight:
        entries = self.files.entries
        missing = [f"{key}_{kind}" for kind in KINDS if f"{key}_{kind}" not in entries]
        if missing:
            raise DamagedFile(next(iter(self.files.metadata)).parent, f"{missing[0]} is missing")
        bits, values, shape = (entries[f"{key}_{kind}"] for kind in KINDS)
        if (bits.dtype, shape.dtype, shape.shape) != ("U8", "I64", (2,)) or len(bits.shape) != 1:
            raise DamagedFile(bits.path, f"{key} has bits {bits.dtype} {bits.shape}, shape {shape.dtype} {shape.shape}")
        if values.dtype not in FLOATS or len(values.shape) != 1:
            raise DamagedFile(values.path, f"the values of {key} are {values.dtype} {values.shape}")
        rows, columns = (int(size) for size in self.files.read(f"{key}_shape"))
        # Python's integers do not overflow; after this check the product is at most eight times the bytes of the file
        if min(rows, columns) < 1 or bits.shape != ((rows * columns + 7) // 8,):
            raise DamagedFile(
                bits.path, f"{key} is said to be {rows} × {columns}, and has {bits.shape[0]} bytes of bits"
            )
        if values.shape[0] > rows * columns:
            raise DamagedFile(values.path, f"{key} has {values.shape[0]} values for {rows} × {columns} weights")
        return PackedWeight((rows, columns), values.dtype, values.shape[0], transposed)


def _is_part(key: str) -> bool:
    return key.endswith(tuple(f"weight_{kind}" for kind in KINDS))
