"""Where a model to be evaluated comes from, checked before anything is loaded."""

from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_chts.checkpoint import HISTORY_NAME, MASKS_NAME
from hf_chts.checkpoint.run_folder import RUN_NAME
from hf_chts.checkpoint.seal import SEAL_NAME, verify_seal

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def check_model(
    model: str | Path,
    *,
    revision: str = "main",
    tokenizer: bool = True,
    max_length: int | None = None,
    unsealed: bool = False,
) -> str:
    """`model` as the argument of `from_pretrained`: a path that is a directory, or a Hub id.

    Args:
        model: a directory with a config.json, or a Hub id such as "org/name".
        revision: branch, tag or commit of a Hub id.
        tokenizer: the directory must have a tokenizer too.
        max_length: tokens of context that the model has to have positions for.
        unsealed: a checkpoint of a run will do without a seal, and where its files are not those of the seal.

    Raises:
        FileNotFoundError: the directory is missing or has no model or no tokenizer, a checkpoint has no seal, or the
            Hub has no such model or is out of reach and the model not cached.
        ValueError: it is no causal language model that transformers knows, its context is shorter, or a checkpoint is
            damaged.
    """
    name = _found(model, revision, tokenizer)
    if not unsealed:
        _check_seal(Path(name))
    config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{name} is a {config.model_type}, which is no causal language model.")
    positions = getattr(config, "max_position_embeddings", None)
    check_max_length(max_length, positions, f" of {name}")
    return name


def check_max_length(max_length: int | None, positions: int | None, whose: str = "") -> None:
    """Raise a ValueError for a `max_length` that is not from 1 to `positions`; None allows for any."""
    if max_length is not None and not 1 <= max_length <= (positions or max_length):
        raise ValueError(f"max_length={max_length}: use from 1 to {positions} tokens, the model's context{whose}.")


def _check_seal(path: Path) -> None:
    """Raises FileNotFoundError or ValueError where a checkpoint of ours is not whole; exports, and what others wrote,
    have no seal."""
    advice = "to evaluate it all the same, pass --unsealed (in Python: unsealed=True)"
    if (path / SEAL_NAME).is_file():
        try:
            verify_seal(path, _evaluated)
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"{error}, or, {advice}.") from error
    elif _is_of_a_run(path):
        raise FileNotFoundError(
            f"{path / SEAL_NAME} is missing: the checkpoint was not written whole, or not copied whole. Evaluate an "
            f"earlier one, or, {advice}."
        )


def _evaluated(name: str) -> bool:
    """Whether a file of a checkpoint is read for more than to go on with its training; optimizers take long to read."""
    return "/" not in name and not name.endswith((".pt", ".pth"))


def _is_of_a_run(path: Path) -> bool:
    """Whether it is a checkpoint that a run of ours began to write. A dense one is known by what is beside it."""
    if (path / MASKS_NAME).is_file() and (path / HISTORY_NAME).is_file():
        return True
    path = path.resolve()
    if not path.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"):
        return False
    known = (path.parent / RUN_NAME).is_file()  # which runs of earlier versions have not
    return known or any(path.parent.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{SEAL_NAME}"))


def _found(model: str | Path, revision: str, tokenizer: bool) -> str:
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(
                f"{path} has no config.json, so it is not a saved model: export one into it, "
                "or name one of its checkpoints."
            )
        if tokenizer and not any((path / name).is_file() for name in _TOKENIZER_FILES):
            raise FileNotFoundError(f"{path} has a model but no tokenizer: save one beside it, or pass tokenizer.")
        return str(path)
    if path.exists():
        raise FileNotFoundError(f"{path} is a file: name the directory of an exported model, or a Hub id.")
    name = str(model)
    try:
        validate_repo_id(name)
        meant_as_directory = isinstance(model, Path) or ("/" in name and path.parent.is_dir())
    except HFValidationError:
        meant_as_directory = True
    if meant_as_directory or name.startswith((".", "~", "/")):
        raise FileNotFoundError(f"There is no directory {name}: export a model there first, or check the path.")
    try:
        hf_hub_download(name, "config.json", revision=revision)
    except (EntryNotFoundError, OSError) as error:  # all of the Hub's errors, offline mode, and no connection
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise FileNotFoundError(
            f"{name} is neither a directory here nor a model that the Hub gave us: {reason}"
        ) from error
    return name
