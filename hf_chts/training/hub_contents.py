"""The files of a push of the Trainer: model, checkpoint and logs."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo

from hf_chts.config import CONFIG_NAME, SparsityConfig
from hf_chts.export.hub import Contents, HubRepository
from hf_chts.export.hub_files import CARD, export_files, stale
from hf_chts.export.model_card import checkpoint_card
from hf_chts.export.pushed_card import with_repository
from hf_chts.export.zero_shot_results import RESULTS_NAME

STAGED = ".hub_push."  # prefix of folders that hold a checkpoint while it is pushed


def push_checkpoint(
    directory: Path,
    name: str | None,
    repository: HubRepository,
    sparsity: SparsityConfig,
    training: Mapping[str, Any],
    message: str,
) -> CommitInfo:
    """Commit a checkpoint's model at the top of the repository, and all its files in the folder `name` if given."""
    contents = model_contents(directory, sparsity, repository, training)
    if name is None:
        return repository.commit(contents, message)
    folder = f"{name}/"
    everything = sorted(path for path in directory.rglob("*") if path.is_file())
    contents |= {folder + path.relative_to(directory).as_posix(): path for path in everything}

    def obsolete(remote: Iterable[str], pushed: Mapping[str, Contents]) -> list[str]:
        remote = list(remote)
        return stale(remote, pushed) + [file for file in remote if file.startswith(folder) and file not in pushed]

    return repository.commit(contents, message, obsolete=obsolete)


def model_contents(
    directory: Path, sparsity: SparsityConfig, repository: HubRepository, training: Mapping[str, Any] | None
) -> dict[str, Contents]:
    """The files of an export, from a directory that the Trainer wrote. `training` is for a card, if it has none."""
    contents: dict[str, Contents] = dict(export_files(directory).paths)
    contents.pop(RESULTS_NAME, None)  # results of an earlier export
    contents.setdefault(CONFIG_NAME, (json.dumps(sparsity.to_dict(), indent=2) + "\n").encode())  # a dense run has none
    path = directory / CARD
    card = path.read_text(encoding="utf-8") if path.is_file() else None
    card = card or checkpoint_card(directory, sparsity=sparsity, training=training)
    contents[CARD] = with_repository(card, repository.repo_id, repository.revision).encode()
    return contents


def tensorboard_logs(output_dir: Path) -> dict[str, Contents]:
    """The logs that the Hub shows as training metrics, read now because they grow during the push."""
    found = sorted((output_dir / "runs").rglob("events.out.tfevents.*"))
    return {path.relative_to(output_dir).as_posix(): path.read_bytes() for path in found}


def stage(checkpoint: Path) -> Path:
    """A temporary folder beside a checkpoint with all its files, as hard links if the file system has them."""
    staged = Path(tempfile.mkdtemp(prefix=STAGED, dir=checkpoint.parent))
    try:
        shutil.copytree(checkpoint, staged, copy_function=_linked, dirs_exist_ok=True)
    except OSError:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    return staged


def _linked(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
