"""Pushes of a run to the Hub: masks, configs and a model card go along with the weights, also from checkpoints.

The Trainer copies a checkpoint's weights into output_dir, uploads that folder in the background, and forgets what
became of it. Here a checkpoint is pushed as it is, in one commit; what failed is said, and the last checkpoint goes at
the end of training where its push had to be skipped or failed.
"""

import logging
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list
from huggingface_hub import CommitInfo
from transformers import Trainer
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import PushInProgress

from hf_chts.export.card_metadata import as_list
from hf_chts.export.checkpoint_card import last_evaluation, progress
from hf_chts.export.hub import HubRepository, explained, open_repository
from hf_chts.export.hub_errors import PushFailed
from hf_chts.export.hub_files import CARD
from hf_chts.export.model_card import model_card
from hf_chts.export.model_facts import ModelFacts
from hf_chts.files.atomic import write_whole
from hf_chts.sparse_model import SparsityHandle
from hf_chts.training.hub_contents import STAGED, model_contents, push_checkpoint, stage, tensorboard_logs

if TYPE_CHECKING:
    _AnyTrainer = Trainer
else:
    _AnyTrainer = object

logger = logging.getLogger(__name__)

_LAST_CHECKPOINT = "last-checkpoint"


class HubPushes(_AnyTrainer):
    """The part of `SparseTrainerMixin` that pushes; rank 0 alone does.

    Attributes:
        recipe: what model cards say about the training beyond what the arguments say: name → value. Its `dataset`, if
            that is a Hub id, goes into their metadata.
    """

    sparse: SparsityHandle
    recipe: Mapping[str, Any] | None = None
    hub_model_id: Any  # the Trainer's own, which says None of both
    push_in_progress: Any
    _repository: HubRepository
    _background: ThreadPoolExecutor | None = None
    _newest: str | None = None  # the checkpoint whose push was asked for last
    _unpushed: str | None = None  # the same, where it was skipped or failed

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As the Trainer's, before training; asks for the token and the right to write while nothing is lost yet.

        Collective: what rank 0 is refused, all ranks raise.

        Raises:
            PushFailed: the Hub refuses, or cannot be reached.
            ValueError: FSDP saves weights in parts, which nobody could load from the Hub.
        """
        if self.is_fsdp_enabled:
            kind = str(self.accelerator.state.fsdp_plugin.state_dict_type)
            if "FULL_STATE_DICT" not in kind:
                raise ValueError(
                    f"fsdp_state_dict_type is {kind}, so what is saved has no whole weights to push: set it to "
                    "FULL_STATE_DICT"
                )
        refused: list[str | None] = [None]
        if self.is_world_process_zero():
            try:
                self._repository = self._open(token, private, None)
            except PushFailed as error:
                refused = [str(error)]
        # else the others would train on until they miss rank 0
        (reason,) = broadcast_object_list(refused)
        if reason is not None:
            raise PushFailed(reason)
        if not self.is_world_process_zero():
            return
        output_dir = Path(self.args.output_dir or ".")
        self.hub_model_id = self._repository.repo_id
        self.push_in_progress = None
        for left in output_dir.glob(f"{STAGED}*"):  # by a run that was killed
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
        steps = progress(self.state.global_step, self.state.max_steps)
        card = model_card(
            ModelFacts.of_model(self.sparse),
            training={**training, **({"optimizer steps": steps} if steps else {})},
            metrics=last_evaluation(self.state.log_history),
            metadata={name: value for name, value in given.items() if value is not None},
        )
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
        """Save the model into output_dir and push it from there: what an export has, and the TensorBoard logs.

        All ranks call it. Arguments and returned values are the Trainer's: the commit, or a Future of it if not
        `blocking`, on rank 0.

        Raises:
            PushFailed: the Hub refuses, or cannot be reached. What was saved stays in output_dir.
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
        """Push a checkpoint in the background; whatever goes wrong is logged, and training goes on."""
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
                # nobody asks the future
                logger.error("%s", error)
                if self._newest == checkpoint:  # else it is out of date
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
        """At the end of training: wait, push the last checkpoint if it has not been, and say so if it cannot be."""
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
        # one after the other, and none is cut off when the process ends
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
        """What model cards say about the training: `recipe`, and what it does not name of the arguments."""
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
        return {**recipe, **facts, **recipe}


def _in_progress(future: "Future[CommitInfo]") -> PushInProgress:
    jobs: Any = [future]  # its annotation is of one
    return PushInProgress(jobs)
