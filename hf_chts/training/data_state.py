"""Where each rank is in a stream of training data: saved in checkpoints, and resumed from them.

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
        """Where the batches that were taken end; JSON."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on there. Raise ValueError if the state is of other data or readers."""
        ...

    def restart(self, number: int) -> None:
        """Begin anew, in an order that belongs to `number`; a first run has 0."""
        ...


@runtime_checkable
class ResumableDataset(Protocol):
    """A dataset of which each rank reads its share, and that resumes where it was left."""

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
    """The part of SparseTrainer that reads such datasets: each rank its own share, exactly resumed."""

    _stream: ResumableLoader | None = None
    _data_state: dict[str, Any] | None = None
    _restart: int = 0

    def follow_stream(self) -> None:
        """Called when the Trainer is made, before other callbacks are added."""
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
        """Like `Trainer.train`; a stream goes on after the batches that were trained on before the checkpoint."""
        self._data_state, self._restart = None, 0
        ignore_data_skip = self.args.ignore_data_skip
        if isinstance(resume_from_checkpoint, str) and isinstance(self.train_dataset, ResumableDataset):
            self._data_state = self.data_state(resume_from_checkpoint)
            if ignore_data_skip:
                self._restart = max(1, _last_step(resume_from_checkpoint))
            self.args.ignore_data_skip = True  # else the Trainer would read those batches again to skip them
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.args.ignore_data_skip = ignore_data_skip

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Like `Trainer.log`; a log of training has the number of documents that all ranks have skipped, if any."""
        # these are logged by all ranks at once
        together = ("loss" in logs and self.control.should_log) or "train_loss" in logs
        if together and self._stream is not None and isinstance(self.train_dataset, ResumableDataset):
            mine = torch.tensor(self._stream.skipped, device=self.args.device)
            skipped = int(self.accelerator.reduce(mine, reduction="sum"))
            if skipped:
                logs["documents_skipped"] = skipped
        super().log(logs, *args, **kwargs)

    def data_state(self, directory: str) -> dict[str, Any] | None:
        """This rank's state in a checkpoint; None if the data do not go on from there.

        Raises:
            FileNotFoundError, ValueError: there is none, or it is of other data or another number of readers.
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
                f"{path} is missing: {directory} has the data states of {ranks} ranks, and {now}; use as many ranks "
                f"as wrote it, {advice}"
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


def _last_step(directory: str) -> int:
    """The number of finished optimizer steps of a checkpoint."""
    return TrainerState.load_from_json(str(Path(directory) / TRAINER_STATE_NAME)).global_step


class _EpochOfStep(TrainerCallback):
    """A stream has no length, so the epoch is the share of max_steps; a resumed Trainer would start it at 0 again."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        state.epoch = state.global_step / state.max_steps
