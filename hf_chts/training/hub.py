"""Pushes of a run to the Hub, with masks, configs and a model card beside the weights.

The Trainer copies a checkpoint's weights into output_dir and uploads that folder in the background, without checking
the result. Here a checkpoint is pushed as it is, in one commit, and failures are logged. If the push of the last
checkpoint failed or was skipped, it is repeated at the end of training.
"""

import logging
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from huggingface_hub import CommitInfo
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import PushInProgress

from hf_chts.export.card_metadata import as_list
from hf_chts.export.hub import HubRepository, explained, open_repository
from hf_chts.export.hub_errors import PushFailed
from hf_chts.export.hub_files import CARD
from hf_chts.export.model_card import run_card
from hf_chts.export.model_facts import ModelFacts
from hf_chts.files.atomic import write_whole
from hf_chts.sparse_model import SparsityHandle
from hf_chts.training.any_trainer import AnyTrainer
from hf_chts.training.hub_contents import STAGED, model_contents, push_checkpoint, stage, tensorboard_logs

logger = logging.getLogger(__name__)

_LAST_CHECKPOINT = "last-checkpoint"


class HubPushes(AnyTrainer):
    """The part of `SparseTrainerMixin` that pushes; rank 0 alone does.

    Attributes:
        recipe: entries of model cards about the training, beside those from the arguments: name → value. A `dataset`
            that is a Hub id also goes into the card's metadata.
    """

    sparse: SparsityHandle
    recipe: Mapping[str, Any] | None = None
    hub_model_id: Any  # this and the next are the Trainer's, which annotates both as None
    push_in_progress: Any
    _repository: HubRepository
    _background: ThreadPoolExecutor | None = None
    _newest: str | None = None  # the last checkpoint that was to be pushed
    _unpushed: str | None = None  # the same, if its push was skipped or failed

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As in the Trainer; checks the token and the permission to write before training starts.

        Collective: an error of rank 0 is raised on all ranks.

        Raises:
            PushFailed: the Hub refuses, or cannot be reached.
            ValueError: FSDP saves sharded weights, which `from_pretrained` could not load from the Hub.
        """
        if self.is_fsdp_enabled:
            kind = str(self.accelerator.state.fsdp_plugin.state_dict_type)
            if "FULL_STATE_DICT" not in kind:
                raise ValueError(
                    f"fsdp_state_dict_type is {kind}, so the saved weights would be sharded: set it to FULL_STATE_DICT"
                )
        refused: list[str | None] = [None]
        if self.is_world_process_zero():
            try:
                self._repository = self._open(token, private, None)
            except PushFailed as error:
                refused = [str(error)]
        # otherwise the others would train on until they wait for rank 0
        (reason,) = broadcast_object_list(refused)
        if reason is not None:
            raise PushFailed(reason)
        if not self.is_world_process_zero():
            return
        output_dir = Path(self.args.output_dir or ".")
        self.hub_model_id = self._repository.repo_id
        self.push_in_progress = None
        for left in output_dir.glob(f"{STAGED}*"):  # left by a run that was killed
            shutil.rmtree(left, ignore_errors=True)

    def create_model_card(
        self,
        language: str | list[str] | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write README.md into output_dir: the model card of an export, with the Trainer's last evaluation."""
        if not self.is_world_process_zero():
            return
        given = {"language": language, "license": license, "tags": tags, "model_name": model_name}
        given |= {"base_model": finetuned_from, "datasets": dataset_tags}
        given |= {"pipeline_tag": tasks if isinstance(tasks, str) else None}
        described = {"dataset": dataset, "dataset arguments": dataset_args}
        training = {**self.training_facts(), **{name: value for name, value in described.items() if value is not None}}
        metadata = {name: value for name, value in given.items() if value is not None}
        card = run_card(ModelFacts.of_model(self.sparse), vars(self.state), training=training, metadata=metadata)
        write_whole(Path(self.args.output_dir or ".") / CARD, card.encode())

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the model into output_dir and push it with the files of an export and the TensorBoard logs. Collective.

        Arguments are as in the Trainer. Returns, on rank 0, the commit, or a Future of it if not `blocking`.

        Raises:
            PushFailed: the Hub refuses, or cannot be reached. The saved files stay in output_dir.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        tags = [*as_list(kwargs.pop("tags", None)), *as_list(getattr(self.model, "model_tags", None))]
        self.create_model_card(tags=tags, **kwargs)
        self._wait_for_push()
        output_dir = Path(self.args.output_dir or ".")
        repository = self._repository
        if token is not None or revision not in (None, repository.revision):
            repository = self._open(token, private, revision)

        def push() -> CommitInfo:
            what = f"{output_dir} was not pushed to {repository.repo_id}"
            with explained(what, repository.repo_id, "What was saved there is whole; push_to_hub() tries again"):
                contents = model_contents(output_dir, self.sparse.config, repository, None)
                return repository.commit(contents | tensorboard_logs(output_dir), commit_message or "End of training")

        if blocking:
            return push()
        future = self._in_background(push)
        self.push_in_progress = _in_progress(future)
        return future

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        strategy = HubStrategy(self.args.hub_strategy)
        if strategy == HubStrategy.END or not self.is_world_process_zero():
            return
        if not self.args.hub_always_push and self.push_in_progress is not None and not self.push_in_progress.is_done():
            self._newest = self._unpushed = checkpoint_folder
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self._start_push(checkpoint_folder, strategy)

    def _start_push(self, checkpoint: str, strategy: HubStrategy) -> None:
        """Push a checkpoint in the background. Errors are logged, and training goes on."""
        by_step = self.args.save_strategy != SaveStrategy.EPOCH
        message = f"Training in progress, {Path(checkpoint).name.replace('checkpoint-', 'step ')}"
        if not by_step and self.state.epoch is not None:
            message = f"Training in progress, epoch {int(self.state.epoch)}"
        names = {HubStrategy.CHECKPOINT: _LAST_CHECKPOINT, HubStrategy.ALL_CHECKPOINTS: Path(checkpoint).name}
        repository, sparsity, training = self._repository, self.sparse.config, self.training_facts()
        self._newest, self._unpushed = checkpoint, None
        try:
            # the Trainer may delete the checkpoint (save_total_limit) while it is still being sent
            staged = stage(Path(checkpoint))
        except OSError as error:
            logger.error("%s is not pushed: %s. Training goes on", checkpoint, error)
            self._unpushed = checkpoint
            return

        def push() -> CommitInfo:
            what = f"{checkpoint} was not pushed to {repository.repo_id}"
            try:
                with explained(what, repository.repo_id, "Training goes on, and the checkpoint is whole"):
                    return push_checkpoint(staged, names.get(strategy), repository, sparsity, training, message)
            except BaseException as error:
                logger.error("%s", error)  # nobody reads the future
                if self._newest == checkpoint:
                    self._unpushed = checkpoint
                raise
            finally:
                shutil.rmtree(staged, ignore_errors=True)

        future = self._in_background(push)
        if self.push_in_progress is None or self.push_in_progress.is_done():
            self.push_in_progress = _in_progress(future)
        else:
            self.push_in_progress.jobs.append(future)

    def _finish_current_push(self) -> None:
        """At the end of training, wait for pushes, and push the last checkpoint if that has not succeeded yet."""
        if not hasattr(self, "push_in_progress"):
            return
        self._wait_for_push()
        checkpoint = self._unpushed
        if checkpoint is None:
            return
        self._start_push(checkpoint, HubStrategy(self.args.hub_strategy))
        self._wait_for_push()
        if self._unpushed is not None:
            logger.error(
                "the last checkpoint is NOT on the Hub: %s is whole here, and push_to_hub() or `hf-chts push "
                "%s %s` pushes it",
                checkpoint, checkpoint, self.hub_model_id,
            )  # fmt: skip

    def _wait_for_push(self) -> None:
        if self.push_in_progress is not None:
            self.push_in_progress.wait_until_done()

    def _in_background(self, push: Callable[[], CommitInfo]) -> "Future[CommitInfo]":
        # in order, and not interrupted when the process ends
        if self._background is None:
            self._background = ThreadPoolExecutor(1, "hub push")
        return self._background.submit(push)

    def _open(self, token: str | None, private: bool | None, revision: str | None) -> HubRepository:
        output_dir = Path(self.args.output_dir or ".")
        name = self.hub_model_id or self.args.hub_model_id or output_dir.absolute().name
        with explained(f"{name} cannot be pushed to", name, "Nothing was sent"):
            return open_repository(
                name,
                token=token if token is not None else self.args.hub_token,
                private=private if private is not None else self.args.hub_private_repo,
                revision=revision if revision is not None else self.args.hub_revision,
            )

    def training_facts(self) -> dict[str, Any]:
        """Entries of model cards about the training: those of `recipe`, then those of the arguments."""
        args, recipe = self.args, self.recipe or {}
        facts = {
            "sequences per step": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "optimizer": str(getattr(args.optim, "value", args.optim)),
            "learning rate": args.learning_rate,
            "schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
            "warm-up steps": args.get_warmup_steps(self.state.max_steps or args.max_steps),
            "warm-up steps after each topology update": getattr(self, "update_warmup_steps", 0),
            "weight decay": args.weight_decay,
            "seed": args.seed,
        }
        return {**recipe, **facts, **recipe}  # in this order, with the values of `recipe`


def _in_progress(future: "Future[CommitInfo]") -> PushInProgress:
    jobs: Any = [future]  # annotated as a single one
    return PushInProgress(jobs)
