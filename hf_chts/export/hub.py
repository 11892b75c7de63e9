"""Push an export or a checkpoint to the Hub: it is checked first, and sent as one commit."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from hf_chts.checkpoint.seal import SEAL_NAME, verify_seal
from hf_chts.config import CONFIG_NAME
from hf_chts.export.hub_errors import PushFailed, reason, retried
from hf_chts.export.hub_files import CARD, PICTURES, ExportFiles, check_contents, export_files, stale
from hf_chts.export.model_card import checkpoint_card
from hf_chts.export.pushed_card import FIGURES, check_card, with_figures, with_repository, with_results
from hf_chts.export.zero_shot_results import RESULTS_NAME, published, read_results

Contents: TypeAlias = Path | bytes


def push_directory(
    directory: str | Path,
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    results: str | Path | None = None,
    figures: Iterable[str | Path] = (),
) -> CommitInfo:
    """Push an export, plain or packed, or a checkpoint of SparseTrainer, to a model repository.

    Weights, masks, configs, tokenizer, model card, figures and results are sent, and nothing else: no optimizer state,
    no pickle, no other file of the directory. They are one commit, which also deletes the weights of an earlier push
    with another layout, so that the repository is never a mixture. Nothing in `directory` changes. If it has no model
    card, one is made for the repository.

    Args:
        repo_id: NAMESPACE/NAME, or a NAME in your own namespace. It is created if it does not exist.
        token: of the Hub; None or True: HF_TOKEN, or the one that `hf auth login` stored.
        private: whether a new repository is private; None: the namespace's default.
        revision: a branch, created if it does not exist; None: main.
        commit_message: None: "Upload sparse model with hf_chts".
        results: what eval_zero_shot.py wrote, for a section of the model card; None: `zero_shot.json` of `directory`.
        figures: pictures for the model card, in addition to those in the folder `figures` of `directory`.

    Returns:
        The commit; as a str its URL.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: `directory`, `results` or `figures` are incomplete, damaged
            or something else. Nothing was sent.
        PushFailed: the Hub refuses or cannot be reached. The repository did not change.
    """
    export = export_files(directory)
    if export.sparsity is None:
        raise FileNotFoundError(
            f"{directory} has no {CONFIG_NAME}, so it is not an export of hf_chts: write one with export_sparse, or "
            f"upload it as it is with `hf upload {repo_id} {directory}`"
        )
    if (export.directory / SEAL_NAME).is_file():
        verify_seal(export.directory)
    check_contents(export)
    extra = [Path(path) for path in figures]
    contents = _contents(export, repo_id, revision, results, extra)
    again = f"{directory} did not change; to push it again: hf-chts push {directory} {repo_id}"
    with explained(f"{directory} was not pushed to {repo_id}", repo_id, again):
        repository = open_repository(repo_id, token=token, private=private, revision=revision)
        if repository.repo_id != repo_id:
            contents = _contents(export, repository.repo_id, revision, results, extra)
        return repository.commit(contents, commit_message or "Upload sparse model with hf_chts")


@dataclass(frozen=True)
class HubRepository:
    """A model repository that exists, and the branch to write to; made by `open_repository`."""

    api: HfApi
    repo_id: str
    revision: str | None

    def commit(
        self,
        contents: Mapping[str, Contents],
        message: str,
        *,
        obsolete: Callable[[Iterable[str], Mapping[str, Contents]], list[str]] = stale,
    ) -> CommitInfo:
        """Add files, and delete obsolete ones, in one commit.

        Large files are uploaded before the commit, and not again after a failure.

        Args:
            contents: path in the repository → local file or bytes.
            obsolete: gives the files to delete, from the names in the repository and `contents`.
        """
        additions = [
            CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in contents.items()
        ]
        # retries by itself
        self.api.preupload_lfs_files(self.repo_id, additions, revision=self.revision, free_memory=False)

        def commit() -> CommitInfo:
            # listed again on every try: a commit whose answer was lost has already deleted files
            remote = self.api.list_repo_files(self.repo_id, revision=self.revision)
            deletions = [CommitOperationDelete(name, is_folder=False) for name in obsolete(remote, contents)]
            return self.api.create_commit(
                self.repo_id, [*additions, *deletions], commit_message=message, revision=self.revision
            )

        return retried(commit, f"committing to {self.repo_id}")


def open_repository(
    repo_id: str, *, token: str | bool | None = None, private: bool | None = None, revision: str | None = None
) -> HubRepository:
    """A repository to write to. It and its branch are created if they do not exist.

    Raises:
        PushFailed: `repo_id` is invalid, there is no token, or the repository is public although `private` is True.
        HTTPError, OSError, ValueError: a request fails; `explained` turns these into PushFailed.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PushFailed(
            f"{repo_id!r} is not a repository id: use NAMESPACE/NAME with letters, digits, '-', '_' and '.'"
        ) from error
    found = token if isinstance(token, str) else get_token() if token is not False else None
    if not found:
        raise PushFailed(
            f"there is no token for {constants.ENDPOINT}: create one with write access at "
            f"{constants.ENDPOINT}/settings/tokens, then log in with `hf auth login` or set HF_TOKEN"
        )
    api = HfApi(endpoint=constants.ENDPOINT, token=found, library_name="hf_chts")
    url = retried(lambda: api.create_repo(repo_id, private=private, exist_ok=True), f"opening {repo_id}")
    repo_id = url.repo_id
    if private and not retried(lambda: api.model_info(repo_id), f"opening {repo_id}").private:
        raise PushFailed(
            f"{repo_id} already exists and is public: make it private in {constants.ENDPOINT}/{repo_id}/settings, or "
            "choose another name"
        )
    if revision not in (None, "main") and not str(revision).startswith("refs/"):
        branch = str(revision)
        retried(lambda: api.create_branch(repo_id, branch=branch, exist_ok=True), f"making the branch {branch}")
    return HubRepository(api, repo_id, revision)


@contextmanager
def explained(what: str, repo_id: str, then: str) -> Iterator[None]:
    """Turn errors of the Hub's client into PushFailed, which says: "`what`: the reason. `then`"."""
    try:
        yield
    except (PushFailed, HTTPError, OSError, RuntimeError, ValueError) as error:
        said = str(error) if isinstance(error, PushFailed) else reason(error, repo_id)
        raise PushFailed(f"{what}: {said}. {then}") from error


def _contents(
    export: ExportFiles, repo_id: str, revision: str | None, results: str | Path | None, figures: list[Path]
) -> dict[str, Contents]:
    """What to push, with further results and figures: path in the repository → local file or bytes."""
    contents: dict[str, Contents] = dict(export.paths)
    pictures = [name.rpartition("/")[2] for name in export.paths if name.startswith(f"{FIGURES}/")]
    for path in figures:
        if not path.is_file():
            raise FileNotFoundError(f"there is no figure {path}")
        if path.suffix.lower() not in PICTURES:
            raise ValueError(f"{path} is not a picture that a model card can show: use one of {', '.join(PICTURES)}")
        name = f"{FIGURES}/{path.name}"
        if name in contents and contents[name] != export.paths.get(name):
            raise ValueError(f"two figures are called {path.name}: rename one")
        contents[name] = path
        pictures = [*(other for other in pictures if other != path.name), path.name]
    found = None
    if results is not None or RESULTS_NAME in export.paths:
        source = Path(results) if results is not None else export.paths[RESULTS_NAME]
        found = read_results(source, [str(export.directory), repo_id])
        contents[RESULTS_NAME] = published(found)
    contents[CARD] = _card(export, repo_id, revision, found, pictures).encode()
    return contents


def _card(
    export: ExportFiles, repo_id: str, revision: str | None, results: dict[str, Any] | None, pictures: list[str]
) -> str:
    path = export.paths.get(CARD)
    try:
        card = path.read_text(encoding="utf-8") if path else checkpoint_card(export.directory)
        if results is not None:
            card = with_results(card, results)
        else:
            check_card(card)
    except ValueError as error:
        raise ValueError(f"{path or export.directory}: {error}") from error
    return with_repository(with_figures(card, pictures), repo_id, revision)
