"""The position of each rank in a stream of training data, saved in checkpoints and restored from them.

A stream is any dataset with a method `loader` like that of `hf_chts.data.BlockStream`. The Trainer handles all others.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from hf_chts.files.atomic import write_json
from hf_chts.files.reading import read_json, reading
from hf_chts.training.any_trainer import AnyTrainer

DATA_STATE = "data_state_{rank}.json"
_FORMAT = "hf_chts data state, 1"


class ResumableLoader(Protocol):
    """An endless iterator over one rank's batches."""

    @property
    def skipped(self) -> int:
        """How many bad documents were skipped since the run began."""
        ...

    def __iter__(self) -> Iterator[Any]: ...

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch that was taken, as JSON."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from that position. Raises ValueError if it is of other data or another number of readers."""
        ...

    def restart(self, number: int) -> None:
        """Start from the beginning in another order, which depends on `number`; the default is 0."""
        ...


@runtime_checkable
class ResumableDataset(Protocol):
    """A dataset of which each rank reads its share, and that can be resumed."""

    def loader(
        self,
        *,
        rank: int,
        ranks: int,
        batch_size: int,
        collate: Callable[[list[Any]], Any],
        workers: int,
        prefetch: int | None,
        pin_memory: bool,
        context: Any,
    ) -> ResumableLoader: ...


class ResumableDataMixin(AnyTrainer):
    """The part of SparseTrainer that reads streams: each rank its own share, resumed exactly."""

    _stream: ResumableLoader | None = None
    _data_state: dict[str, Any] | None = None
    _restart: int = 0

    def count_epochs_of_stream(self) -> None:
        """Have the epoch of a stream follow the step. Called before other callbacks are added."""
        if isinstance(self.train_dataset, ResumableDataset):
            self.add_callback(_EpochOfStep)

    def get_train_dataloader(self) -> Any:
        if not isinstance(self.train_dataset, ResumableDataset):
            return super().get_train_dataloader()
        self._stream = self._new_loader(self.train_dataset)
        if self._data_state is not None:
            self._stream.load_state_dict(self._data_state)
        elif self._restart:
            self._stream.restart(self._restart)
        return self._stream

    def _new_loader(self, dataset: ResumableDataset) -> ResumableLoader:
        args = self.args
        return dataset.loader(
            rank=args.process_index,
            ranks=args.world_size,
            batch_size=self._train_batch_size,
            collate=self._get_collator_with_removed_columns(self.data_collator, description="training"),
            workers=args.dataloader_num_workers,
            prefetch=args.dataloader_prefetch_factor,
            pin_memory=args.dataloader_pin_memory and args.device.type != "cpu",
            context=args.dataloader_multiprocessing_context,
        )

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Like `Trainer.train`; a stream continues after the last batch before the checkpoint."""
        self._data_state, self._restart = None, 0
        ignore_data_skip = self.args.ignore_data_skip
        if isinstance(resume_from_checkpoint, str) and isinstance(self.train_dataset, ResumableDataset):
            self._data_state = self.data_state(resume_from_checkpoint)
            if ignore_data_skip:
                state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME))
                self._restart = max(1, state.global_step)
            self.args.ignore_data_skip = True  # else the Trainer would read those batches again to skip them
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.args.ignore_data_skip = ignore_data_skip

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Like `Trainer.log`; adds the number of documents that all ranks skipped, if any, to logs of training."""
        # only these are logged by all ranks at once
        together = ("loss" in logs and self.control.should_log) or "train_loss" in logs
        if together and self._stream is not None and isinstance(self.train_dataset, ResumableDataset):
            mine = torch.tensor(self._stream.skipped, device=self.args.device)
            skipped = int(self.accelerator.reduce(mine, reduction="sum"))
            if skipped:
                logs["documents_skipped"] = skipped
        super().log(logs, *args, **kwargs)

    def data_state(self, directory: str) -> dict[str, Any] | None:
        """This rank's state in a checkpoint; None for data other than streams, and with `ignore_data_skip`.

        Raises:
            FileNotFoundError, ValueError: it is missing, or of other data or another number of readers.
        """
        if self.args.ignore_data_skip:
            return None
        path = Path(directory) / DATA_STATE.format(rank=self.args.process_index)
        ranks = len(list(Path(directory).glob(DATA_STATE.format(rank="*"))))
        advice = "or begin the data anew in another order with --ignore_data_skip true"
        if not isinstance(self.train_dataset, ResumableDataset):
            if ranks:
                raise ValueError(f"{directory} was trained on a stream, this run does not read one: stream, {advice}")
            return None
        if not path.is_file():
            now = f"this is rank {self.args.process_index} of {self.args.world_size}"
            raise FileNotFoundError(
                f"{path} is missing: {directory} has the data states of {ranks} ranks, and {now}; use {ranks} ranks, "
                f"{advice}"
                if ranks
                else f"{directory} was not trained on a stream, this run reads one: use the data that it had, {advice}"
            )
        with reading(path, "Take an earlier checkpoint"):
            state = read_json(path, _FORMAT)
        del state["format"]
        try:
            self._new_loader(self.train_dataset).load_state_dict(state)
        except ValueError as error:
            raise ValueError(f"{directory} cannot be resumed: {error}") from error
        return state

    def save_data_state(self, directory: str | Path) -> None:
        """Write this rank's state into a checkpoint, if it reads a stream."""
        if self._stream is not None and isinstance(self.train_dataset, ResumableDataset):
            path = Path(directory) / DATA_STATE.format(rank=self.args.process_index)
            write_json(path, {"format": _FORMAT, **self._stream.state_dict()})


class _EpochOfStep(TrainerCallback):
    """Sets the epoch to the fraction of max_steps: a stream has no length, and a resumed Trainer would restart at 0."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        state.epoch = state.global_step / state.max_steps
