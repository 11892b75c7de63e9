"""Checksums of an export's weights, because a flipped bit would change the model unnoticed.

They are written after the weights. Exports of early versions have none. Checkpoints have a seal instead.
"""

from pathlib import Path

from hf_chts.export.weight_files import DamagedFile, find_shards, read_json
from hf_chts.files.atomic import write_json
from hf_chts.files.reading import crc32

CHECKSUMS_NAME = "weights_checksums.json"
_FORMAT = "hf_chts weights, 1"
_REMEDY = f"if you changed the weights on purpose, delete {CHECKSUMS_NAME}"


def write_checksums(directory: Path, stem: str) -> None:
    """Write size and CRC-32 of each shard with this stem."""
    files = {path.name: [path.stat().st_size, crc32(path)] for path in find_shards(directory, stem)[0]}
    write_json(directory / CHECKSUMS_NAME, {"format": _FORMAT, "files": files})


def forget_checksums(directory: Path) -> None:
    """Remove the checksums, before other weights are written."""
    (directory / CHECKSUMS_NAME).unlink(missing_ok=True)


def verify_checksums(directory: Path, stem: str) -> None:
    """Read the shards with this stem and compare them with the checksums, if there are any.

    Raises:
        FileNotFoundError: a shard is missing.
        DamagedFile: a shard, or the list, is not as it was written; the message names the file.
    """
    path = directory / CHECKSUMS_NAME
    if not path.is_file():
        return
    contents = read_json(path)
    files = contents.get("files")
    if contents.get("format") != _FORMAT or not isinstance(files, dict):
        raise DamagedFile(path, f"its format is {contents.get('format')!r} and should be {_FORMAT!r}")
    shards = {shard.name: shard for shard in find_shards(directory, stem)[0]}
    if shards.keys() != files.keys():
        odd = sorted(shards.keys() ^ files.keys())[0]
        raise DamagedFile(path, f"it and the weights disagree about {odd}, so it belongs to another export ({_REMEDY})")
    for name, shard in shards.items():
        if not shard.is_file():
            raise FileNotFoundError(f"{shard} is missing: copy or download the directory again")
        found = [shard.stat().st_size, crc32(shard)]
        if found != files[name]:
            what = "size" if found[:1] != files[name][:1] else "checksum"
            raise DamagedFile(shard, f"its {what} is not the one in {CHECKSUMS_NAME} ({_REMEDY})")
