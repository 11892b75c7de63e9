"""What is checked before an evaluation loads anything: the model and the options."""

from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_chts.checkpoint import HISTORY_NAME, MASKS_NAME
from hf_chts.checkpoint.run_folder import RUN_NAME
from hf_chts.checkpoint.seal import SEAL_NAME, verify_seal
from hf_chts.export.activation_code import activations_of, refuse_plain
from hf_chts.export.packed_format import is_packed

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def check_options(
    limit: int | None,
    num_fewshot: int | None,
    batch_size: int | str,
    device: str | None = None,
    task_data: str | Path | None = None,
) -> None:
    """Check options of `evaluate_zero_shot`.

    Raises:
        ValueError: a number is out of range, or there is no such device.
        FileNotFoundError: `task_data` is not a directory.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: use at least 1 document per task, or None for all.")
    if num_fewshot is not None and num_fewshot < 0:
        raise ValueError(f"num_fewshot={num_fewshot}: use 0 or more examples, or None for each task's own number.")
    if batch_size != "auto" and not (isinstance(batch_size, int) and batch_size >= 1):
        raise ValueError(f"batch_size={batch_size!r}: use 1 or more sequences, or 'auto'.")
    if device is not None:  # the harness silently uses the default device instead of an unknown one
        try:
            found = torch.device(device)
        except RuntimeError as error:
            raise ValueError(f"device={device!r} does not exist: use cpu, cuda, cuda:1 or mps.") from error
        gpus = torch.cuda.device_count()
        if found.type == "cuda" and (found.index or 0) >= gpus:
            raise ValueError(f"device={device!r}: this machine shows {gpus} CUDA devices to this process.")
    if task_data is not None and not Path(task_data).is_dir():
        raise FileNotFoundError(
            f"task_data={str(task_data)!r} is not a directory: it has to hold a folder per task (rte/validation.jsonl)."
        )


def check_model(
    model: str | Path,
    *,
    revision: str = "main",
    tokenizer: bool = True,
    max_length: int | None = None,
    unsealed: bool = False,
) -> str:
    """`model` as an argument for `from_pretrained`: the path of a directory, or a Hub id.

    Args:
        model: a directory with a config.json, or a Hub id such as "org/name".
        revision: branch, tag or commit of a Hub id.
        tokenizer: whether the directory must have a tokenizer.
        max_length: tokens of context that the model must have positions for.
        unsealed: accept a checkpoint without a seal, and one whose files have changed since it was sealed.

    Raises:
        FileNotFoundError: the directory is missing or has no model or tokenizer, a checkpoint has no seal, or the Hub
            has no such model or cannot be reached and the model is not cached.
        ValueError: transformers knows no such causal language model, its context is shorter, or a checkpoint is
            damaged.
    """
    name = _find(model, revision, tokenizer)
    if not unsealed:
        _check_seal(Path(name))
    config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    if not is_packed(config.to_dict()):
        refuse_plain(activations_of(name), f"`hf-chts pack {name} OUT`, and evaluate OUT")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{name} is a {config.model_type}, which is not a causal language model.")
    check_max_length(max_length, getattr(config, "max_position_embeddings", None), f" of {name}")
    return name


def check_max_length(max_length: int | None, positions: int | None, whose: str = "") -> None:
    """Raise ValueError if `max_length` is not from 1 to `positions`; None stands for any."""
    if max_length is not None and not 1 <= max_length <= (positions or max_length):
        raise ValueError(f"max_length={max_length}: use from 1 to {positions} tokens, the model's context{whose}.")


def _check_seal(path: Path) -> None:
    """Raise FileNotFoundError or ValueError if a checkpoint of hf_chts is not complete."""
    advice = "to evaluate it anyway, pass --unsealed (in Python: unsealed=True)"
    if (path / SEAL_NAME).is_file():
        try:
            # without the optimizer, which is slow to read and not used here
            verify_seal(path, lambda name: "/" not in name and not name.endswith((".pt", ".pth")))
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"{error}, or, {advice}.") from error
    elif _is_of_a_run(path):
        raise FileNotFoundError(
            f"{path / SEAL_NAME} is missing: the checkpoint was not completely written or copied. Evaluate an earlier "
            f"one, or, {advice}."
        )


def _is_of_a_run(path: Path) -> bool:
    """Whether a run of hf_chts began to write this checkpoint. Of a dense run, the files next to it show that."""
    if (path / MASKS_NAME).is_file() and (path / HISTORY_NAME).is_file():
        return True
    path = path.resolve()
    if not path.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"):
        return False
    # runs of the first versions have no run file
    return (path.parent / RUN_NAME).is_file() or any(path.parent.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{SEAL_NAME}"))


def _find(model: str | Path, revision: str, tokenizer: bool) -> str:
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(
                f"{path} has no config.json, so it is not a saved model: export one into it, or name one of its "
                "checkpoints."
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
    except (EntryNotFoundError, OSError) as error:  # all errors of the Hub, offline mode, and no connection
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise FileNotFoundError(f"{name} is neither a directory nor a model on the Hub: {reason}") from error
    return name
