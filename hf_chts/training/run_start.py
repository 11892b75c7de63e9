"""How a run begins: which run it is, whether the output folder is its own, and whether all ranks agree."""

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import TrainerState
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import SaveStrategy, sort_checkpoints

from hf_chts.checkpoint.run_folder import (
    OutputLock,
    all_sealed,
    claim_folder,
    not_of_this_run,
    refuse_folder_of_another_run,
    sealed,
)
from hf_chts.checkpoint.run_identity import RunIdentity
from hf_chts.checkpoint.seal import verify_seal, what_is_unsealed
from hf_chts.files.full_disk import explain_failed_write
from hf_chts.layers.wrappers import original_name
from hf_chts.machine import version_of
from hf_chts.sharding.ranks import together
from hf_chts.sparse_model import SparsityHandle
from hf_chts.training.any_trainer import AnyTrainer
from hf_chts.training.callback import TopologyCallback

_log = logging.getLogger(__name__)

# Arguments that decide when ranks communicate and how weights change. Ranks with different ones would wait for each
# other forever or drift apart. Others, such as seeds of dropout, may differ.
_SAME_ON_RANKS = (
    "max_steps", "num_train_epochs", "gradient_accumulation_steps", "auto_find_batch_size",
    "logging_strategy", "logging_steps", "logging_first_step", "eval_strategy", "eval_steps", "eval_delay",
    "eval_on_start", "save_strategy", "save_steps", "save_only_model", "load_best_model_at_end",
    "metric_for_best_model", "greater_is_better", "best_at_any_sparsity", "update_warmup_steps",
    "optim", "optim_args", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "lr_schedule_until",
    "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "bf16", "fp16", "ignore_data_skip",
)  # fmt: skip


class BeginsRuns(AnyTrainer):
    """The part of SparseTrainer that identifies the run and claims its output folder.

    Attributes:
        made_of: settings beyond config and seeds that must be the same on resume, name → JSON value. Set by scripts
            that build model and data from their own options.
        identity: of the run; None before it begins.
        run_dir: where the run writes: output_dir, or a folder in it for each trial of a hyperparameter search.
        resumed_from: the checkpoint that `train` is resuming from; None outside of `train`.
    """

    sparse: SparsityHandle
    topology_callback: TopologyCallback | None
    made_of: dict[str, Any]
    identity: RunIdentity | None = None
    run_dir: str | None = None
    resumed_from: str | None = None
    _own_runs: frozenset[str | None] = frozenset()
    _lock: OutputLock | None = None
    _resumed_at: int | None = None  # the step of the checkpoint, on rank 0

    def begin_run(self, resume: str | bool | None, trial: Any, prepare: Callable[[str | None], None]) -> str | None:
        """Choose the checkpoint to resume from, and claim the output folder. Collective.

        Args:
            resume: as in `train`.
            prepare: checks the checkpoint and restores its topology, before any rank has written anything.

        Returns:
            The checkpoint to resume from, or None.

        Raises:
            FileNotFoundError, ValueError: the checkpoint cannot be resumed, the folder belongs to another run, another
                process trains there, or ranks differ.
            OSError: the folder cannot be written.
        """
        run_dir = self._get_output_dir(trial) or "."
        problem: Exception | None = None
        checkpoint, identity, facts = None, None, None
        damaged: list[Path] = []
        try:
            if self._writes() and self.is_world_process_zero():
                self._lock = OutputLock()
                self._lock.take(run_dir)
            checkpoint, damaged = self._whole_checkpoint(resume, run_dir)
            identity = self._identity(checkpoint, run_dir)
            prepare(checkpoint)
            facts = self._in_common(checkpoint)
        except Exception as error:  # of any kind: the other ranks must not wait for this one
            problem = error
        self.identity, self.run_dir = together(facts, problem, identity), run_dir
        assert self.identity is not None
        try:
            self._claim_folder(checkpoint, damaged)
        except OSError as error:
            problem = error
        together({}, problem)
        if self.topology_callback is not None:
            self.topology_callback.identity, self.topology_callback.run_dir = self.identity, run_dir
        self.resumed_from = checkpoint
        return checkpoint

    def end_run(self) -> None:
        """Release the output folder, whether training succeeded or failed."""
        self.resumed_from = None
        if self._lock is not None:
            self._lock.release()

    def _writes(self) -> bool:
        """Whether training writes anything into its folder: checkpoints, or records of the topology."""
        return self.topology_callback is not None or self.args.save_strategy != SaveStrategy.NO

    def _whole_checkpoint(self, resume: str | bool | None, run_dir: str) -> tuple[str | None, list[Path]]:
        """The verified checkpoint to resume from, and newer damaged ones if `skip_damaged_checkpoints` allows them."""
        if not resume:
            return None, []
        if not isinstance(resume, bool):
            verify_seal(resume)
            return str(resume), []
        candidates = list(reversed(sealed(run_dir)))
        if not candidates:
            unsealed = sort_checkpoints(run_dir) if Path(run_dir).is_dir() else []
            last = ""
            if others := all_sealed(run_dir):
                last = f" Those up to {others[-1]} were passed over, as of another run there."
            elif unsealed:
                last = f" The last one, {unsealed[-1]}, {what_is_unsealed(unsealed[-1])}."
            raise ValueError(
                f"there is no whole checkpoint of this run in {run_dir} to resume from: start without "
                f"resume_from_checkpoint, or name a checkpoint.{last}"
            )
        skip = getattr(self.args, "skip_damaged_checkpoints", False)
        found: list[str] = []
        for number, path in enumerate(candidates):
            try:
                verify_seal(path)
                return str(path), candidates[:number]
            except (ValueError, OSError) as error:
                if skip:
                    found.append(str(error))
                elif len(candidates) == 1:
                    raise
                else:
                    raise type(error)(
                        f"{error}: resume from another one, such as {candidates[1]}, or set skip_damaged_checkpoints "
                        "to take the newest complete one"
                    ) from error
        raise ValueError(f"all checkpoints in {run_dir} are damaged: {'; '.join(found)}")

    def _identity(self, checkpoint: str | None, run_dir: str) -> RunIdentity:
        now = RunIdentity.new(self.args, self.sparse.config, getattr(self, "made_of", {}), begun=checkpoint is None)
        mine: set[str | None] = {*self._own_runs}
        if checkpoint is not None:
            before = RunIdentity.of_checkpoint(checkpoint)
            mine.add(before.id if before else None)
            if before is not None:
                # ranks may have seeds of their own, and rank 0's is the run's
                data_anew = self.args.ignore_data_skip or not self.is_world_process_zero()
                now = before.check_same(now, checkpoint, data_anew=data_anew)
                mine.add(None)  # versions without identities may have written its earlier checkpoints
        if self._writes() and self.is_world_process_zero():
            refuse_folder_of_another_run(run_dir, mine, overwrite=getattr(self.args, "overwrite_output_dir", False))
        self._own_runs = frozenset({*mine, now.id})
        return now

    def _in_common(self, checkpoint: str | None) -> dict[str, str]:
        saved = RunIdentity.of_checkpoint(checkpoint) if checkpoint else None
        config = {f"sparsity's {name}": repr(value) for name, value in self.sparse.config.to_dict().items()}
        model = cast(nn.Module, self.model)
        shapes = sorted((original_name(name), tuple(weight.shape)) for name, weight in model.named_parameters())
        return {
            "hf_chts": version_of("hf_chts"),
            "the model": hashlib.sha256(repr(shapes).encode()).hexdigest()[:16],
            "the checkpoint to resume from": f"{Path(checkpoint).name} of {saved or 'a run'}" if checkpoint else "none",
            **{name: repr(getattr(self.args, name)) for name in _SAME_ON_RANKS if hasattr(self.args, name)},
            **config,
        }

    def _claim_folder(self, checkpoint: str | None, damaged: list[Path]) -> None:
        assert self.run_dir is not None
        assert self.identity is not None
        if not self._writes():
            return
        if self.args.should_save:
            for path in damaged:
                _set_aside(path, checkpoint)
        if not self.is_world_process_zero():
            return
        step, self._resumed_at = 0, None
        if checkpoint is not None:
            earlier = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
            step = self._resumed_at = earlier.global_step
            self._warn_of_other_length(earlier.max_steps)
        left = not_of_this_run(self.run_dir, checkpoint, step)
        later = [path for path in left if path in sealed(self.run_dir)]
        with explain_failed_write(
            self.run_dir, "Make room there, or give the run another output_dir; nothing has been trained"
        ):
            claim_folder(self.run_dir, self.identity.to_dict(), left)
        if later:
            _log.warning(
                "%s: this run %s, so that it passes over %s, and resume_from_checkpoint=True will too. They stay until "
                "they are overwritten or save_total_limit removes them",
                self.run_dir,
                f"goes on from step {step}" if checkpoint else "begins anew",
                ", ".join(path.name for path in later),
            )

    def _warn_of_other_length(self, earlier: int) -> None:
        """Warn of another length, unless topology updates depend on it: then begin_lines.py says more."""
        now = self.args.max_steps
        if now > 0 and earlier not in (0, now) and not (self.topology_callback and self.sparse.config.evolves):
            _log.warning(
                "The run goes on to step %d, that of the checkpoint would have gone to %d: the learning rate follows "
                "the schedule of the new length",
                now,
                earlier,
            )

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._inner_training_loop(*args, **kwargs)
        if self._resumed_at is not None and self.state.max_steps <= self._resumed_at and self.is_world_process_zero():
            _log.warning(
                "The checkpoint is of step %d, and this run has %d steps: nothing was left to train. To train on, "
                "raise max_steps",
                self._resumed_at,
                self.state.max_steps,
            )
        return result


def forget_evaluation(trainer: Any) -> None:
    """Have accelerate wrap a model in DDP that `evaluate` prepared before training.

    It marks that model as prepared, and `train` would then leave it as it is: each rank trains on its own, and nothing
    says so (transformers 5.23, accelerate 1.15).
    """
    model, accelerator = trainer.model, trainer.accelerator
    if trainer.args.world_size == 1 or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return
    if isinstance(model, nn.Module) and vars(model).pop("_is_accelerate_prepared", False):
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # its forward without autocast, which comes again
        accelerator._models = [other for other in accelerator._models if other is not model]


def check_state_is_there(directory: str | Path, *, deepspeed: bool) -> None:
    """Raises ValueError if a checkpoint has no state of the optimizer or schedule, as save_only_model leaves it."""
    there = [path.name for path in Path(directory).iterdir()]
    has_optimizer = any(name.startswith(("optimizer", "global_step", "rank")) and "rng" not in name for name in there)
    has_schedule = deepspeed or SCHEDULER_NAME in there
    if has_optimizer and has_schedule:
        return
    what = [name for name, found in (("optimizer", has_optimizer), ("schedule", has_schedule)) if not found]
    raise ValueError(
        f"{directory} has no state of the {' and the '.join(what)}, as save_only_model leaves a checkpoint: resumed, "
        "the moments would begin at 0 and the learning rate at its first step, in the midst of the run's topology "
        f"updates. To train on with its weights and masks as a new run, take load_sparse({str(directory)!r}) as the "
        "model, and leave out resume_from_checkpoint; to resume runs, save without save_only_model"
    )


def _set_aside(damaged: Path, whole: str | None) -> None:
    """Rename a damaged checkpoint: its name is needed for a new one, and its files may still be of use."""
    number = 0
    while (target := damaged.with_name(f"damaged-{damaged.name}" + (f"-{number}" if number else ""))).exists():
        number += 1
    damaged.rename(target)
    _log.warning("%s is damaged: it is %s now, and the run goes on from %s", damaged, target, whole)
