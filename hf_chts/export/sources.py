"""Where an export is loaded from, a directory or a Hub id, and which config.json is accepted. It may be hostile."""

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_chts.checkpoint import MASKS_NAME
from hf_chts.config import CONFIG_NAME
from hf_chts.export.checksums import CHECKSUMS_NAME
from hf_chts.export.packed_format import is_packed
from hf_chts.export.weight_files import PACKED_STEM, PLAIN_STEM, DamagedFile, find_shards, read_json

# all that load_sparse reads: no pickles, no code
_DOWNLOADED = [
    "config.json",
    "generation_config.json",
    CONFIG_NAME,
    MASKS_NAME,
    CHECKSUMS_NAME,
    *(f"{stem}{suffix}" for stem in (PLAIN_STEM, PACKED_STEM) for suffix in ("-*.safetensors", ".safetensors*")),
]
_HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")


def local_directory(source: str | Path, options: dict[str, Any]) -> Path:
    """`source` if it is a directory, else the local copy of the files of this Hub id.

    Args:
        options: for `from_pretrained`; for a Hub id, those that concern the download are removed from it.

    Raises:
        FileNotFoundError: it is neither, or it is not cached and the Hub is unreachable or refuses.
        NotADirectoryError: it is a file.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise NotADirectoryError(f"{path} is a file: name the directory of an export, or a Hub id")
    try:
        validate_repo_id(str(source))
    except HFValidationError as error:
        raise FileNotFoundError(f"there is no directory {source}: name an export's directory, or a Hub id") from error
    taken = {name: options.pop(name) for name in _HUB_OPTIONS if name in options}
    try:
        return Path(snapshot_download(str(source), allow_patterns=_DOWNLOADED, **taken))
    except OSError as error:  # errors of the Hub, offline mode, no connection
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise FileNotFoundError(f"{source} is not a local directory, and cannot be downloaded: {reason}") from error


def checked_config(directory: Path) -> dict[str, Any]:
    """The contents of config.json, if neither it nor the index of the weights names other files or code.

    Raises:
        FileNotFoundError: config.json or the weights are missing.
        ValueError: it is damaged, or names something that would be opened or run.
    """
    path = directory / "config.json"
    if not path.is_file():
        refuse_adapter(directory)
    config = read_json(path)
    packed = is_packed(config)
    for name in ("configuration_files", "transformers_weights", "quantization_config"):
        if name in config and not (packed and name != "configuration_files"):
            raise DamagedFile(path, f"it has {name}, which exports of hf_chts never have")
    if (directory / "adapter_config.json").exists():
        raise DamagedFile(directory / "adapter_config.json", "exports have no adapter: merge it into the model")
    attention = [value for name, value in config.items() if name.strip("_").startswith("attn_implementation")]
    if any("/" in str(value) for value in attention):
        raise DamagedFile(path, f"it names the attention code {attention[0]!r}: pass attn_implementation yourself")
    find_shards(directory, PACKED_STEM if packed else PLAIN_STEM)
    return config


def refuse_adapter(directory: Path) -> None:
    """Raises ValueError if a directory holds a PEFT adapter instead of a model."""
    if (directory / "adapter_config.json").is_file():
        raise ValueError(
            f"{directory} holds a PEFT adapter, not a model: load the sparse model that it was trained on with "
            "load_sparse, put the adapter on it with peft.PeftModel.from_pretrained(model, directory), and write both "
            "as one with export_sparse(…, adapters='merge' or 'merge_masked')"
        )


def architecture(config: dict[str, Any]) -> str | None:
    """The name of the model's class, from the contents of config.json."""
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else None
