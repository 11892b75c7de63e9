"""SparseTrainer: a Trainer that makes its model sparse, evolves the topology, and saves masks with the weights."""

import inspect
import re
import shutil
import warnings
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints, unwrap_peft_model
from transformers.utils import can_return_loss, find_labels

from hf_chts.checkpoint import MASKS_NAME, load_topology, save_topology, verify_fits, with_original_names
from hf_chts.checkpoint.other_storage import converting_state
from hf_chts.checkpoint.run_folder import last_sealed
from hf_chts.checkpoint.run_identity import RunIdentity
from hf_chts.checkpoint.seal import SEAL_NAME, seal, verify_seal
from hf_chts.config import CONFIG_NAME, SparsityConfig
from hf_chts.evolution.evolver import Evolver, check_same_config
from hf_chts.evolution.half_precision import refuse_half_precision
from hf_chts.export.checksums import forget_checksums
from hf_chts.export.linked_weights import LinkedWeights
from hf_chts.files.full_disk import explain_failed_write
from hf_chts.files.reading import directory_size
from hf_chts.layers.wrappers import original_keys, original_name, saves_adapters_alone, uncompiled, unwrap
from hf_chts.names import listed
from hf_chts.sparse_model import SparsityHandle, follow_masks, sparsify
from hf_chts.training.any_trainer import AnyTrainer
from hf_chts.training.attempts import FreshAttempts
from hf_chts.training.best_model import BestAtTargetSparsity
from hf_chts.training.callback import TopologyCallback
from hf_chts.training.console import say, use_console
from hf_chts.training.data_state import ResumableDataMixin
from hf_chts.training.divergence import StopsOnDivergence, last_whole
from hf_chts.training.hub import HubPushes
from hf_chts.training.other_trainers import arguments_by_name, refuse_unloaded, start_reference
from hf_chts.training.run_start import BeginsRuns, check_state_is_there, forget_evaluation
from hf_chts.training.stored_names import names_of_model
from hf_chts.training.warm_up import WarmsUpAfterUpdates, asked_warmup

# messages of gloo and NCCL when another rank has died or hangs
_LOST = re.compile(r"closed by peer|connection (was )?(reset|closed|refused)|timed? ?out|remote process", re.IGNORECASE)


class SparseTrainerMixin(
    StopsOnDivergence,
    BestAtTargetSparsity,
    FreshAttempts,
    BeginsRuns,
    HubPushes,
    ResumableDataMixin,
    WarmsUpAfterUpdates,
    AnyTrainer,
):
    """Sparse training for any `Trainer` subclass: `class MyTrainer(SparseTrainerMixin, Seq2SeqTrainer): pass`.

    Args (beside the Trainer's own):
        sparsity: the config to sparsify the model with, or the handle that `sparsify` returned for it. None: the
            handle of a model that is already sparse, otherwise the defaults of SparsityConfig.

    A second `train()` continues with the weights, the masks and, as in the Trainer, the optimizer of the first, but
    restarts the schedules. Sparsity never falls: it stays until the schedule has caught up.

    Raises:
        ValueError: the config does not fit the model, its schedules do not fit `args.max_steps`, or
            `args.update_warmup_steps` does not fit `update_interval`.
    """

    sparse: SparsityHandle
    topology_callback: TopologyCallback | None
    _saved: Path | None = None  # the last checkpoint of this call of `train`
    _for_others: bool = False  # whether what is being saved is no checkpoint

    def __init__(self, *positional: Any, sparsity: SparsityConfig | SparsityHandle | None = None, **named: Any) -> None:
        self._sparsity = sparsity
        # passed on as they came: other classes have other arguments between model and args
        given = arguments_by_name(type(self), SparseTrainerMixin, positional, named)
        model, args = given.get("model"), given.get("args")
        if isinstance(model, str):
            refuse_unloaded(model, sparsity)
        existing = SparsityHandle.of(model) if isinstance(model, nn.Module) else None
        config = existing.config if existing is not None else sparsity
        if model is not None and isinstance(config, SparsityConfig) and args is not None:
            if args.max_steps > 0:  # raises before the model is changed
                config.plan(args.max_steps)
            asked_warmup(args, config, args.max_steps)
        if isinstance(model, nn.Module):
            self.sparse = self._sparsify(model)
        super().__init__(*positional, **named)
        if not hasattr(self, "sparse"):  # it came from model_init
            assert self.model is not None
            self.sparse = self._sparsify(self.model)
        start_reference(self, self.sparse, given.get("ref_model") is not None)
        assert self.model is not None
        self.sparse.ignore_masks_in_ddp(self.model)
        if uncompiled(self.model) is not self.model:  # the Trainer has inspected the wrapper's forward
            kind = type(self._inspected())
            self.can_return_loss = can_return_loss(kind)
            if self.args.label_names is None:
                self.label_names = find_labels(kind)
        self.count_epochs_of_stream()
        use_console(self)
        self._follow_topology()

    def create_accelerator_and_postprocess(self) -> None:
        # the first method to see the model where a class of trl loads it by name
        if not hasattr(self, "sparse") and isinstance(self.model, nn.Module):
            self.sparse = self._sparsify(self.model)
        super().create_accelerator_and_postprocess()

    def _sparsify(self, model: nn.Module) -> SparsityHandle:
        existing = SparsityHandle.of(model)
        given = self._sparsity
        if isinstance(given, SparsityHandle):
            if given is not existing:
                raise ValueError(
                    "sparsity is the handle of another model: pass the one that sparsify(model, …) returned"
                )
            return given
        if existing is None:
            return sparsify(model, given or SparsityConfig())
        if given is not None and given != existing.config:
            raise ValueError(
                "the model is sparse already, with another config: leave sparsity out, or unsparsify() it first"
            )
        return existing

    def _follow_topology(self) -> None:
        self.topology_callback = None
        if self.sparse.layers:
            self.topology_callback = TopologyCallback(self.sparse, say=partial(say, self))
            self.topology_callback.identity, self.topology_callback.run_dir = self.identity, self.run_dir
            self.add_callback(self.topology_callback)
            # this one saves at SIGTERM in on_step_end, and must do so after the update of the step
            callbacks = self.callback_handler.callbacks
            callbacks.sort(key=lambda callback: isinstance(callback, JITCheckpointCallback))

    def call_model_init(self, trial: Any = None) -> nn.Module:
        model = super().call_model_init(trial)
        # train() asks for a fresh model each time; during __init__ there is nothing to replace yet
        if hasattr(self, "topology_callback"):
            if self.topology_callback is not None:
                self.remove_callback(self.topology_callback)
            self.sparse = self._sparsify(model)
            self._follow_topology()
            if self.resumed_from is not None:  # its topology was restored into the previous model
                self._restore_topology(self.resumed_from)
        return model

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; True resumes from the last complete checkpoint.

        Raises:
            FileNotFoundError, ValueError: the checkpoint is incomplete, damaged, or of another model or config, or the
                weights have half precision. Nothing has been loaded then.
            FloatingPointError: a loss, a gradient, a weight or a moment became NaN or infinite.
            RuntimeError: another rank died or hangs.
        """
        self.reset_attempts()
        try:
            trial = kwargs.get("trial", args[0] if args else None)
            checkpoint = self.begin_run(resume_from_checkpoint or None, trial, self._prepare)
            forget_evaluation(self)
            return super().train(checkpoint, *args, **kwargs)
        except RuntimeError as error:
            if dist.is_initialized() and _LOST.search(str(error)):
                raise RuntimeError(
                    f"rank {dist.get_rank()} of {dist.get_world_size()} lost the others in step "
                    f"{self.state.global_step + 1}; one of them died or hangs, and its own output says why: {error}\n"
                    f"{last_whole(last_sealed(self.args.output_dir or '.'))}"
                ) from error
            raise
        finally:
            self.end_run()

    def _prepare(self, checkpoint: str | None) -> None:
        """Check that the model can be trained, and restore a checkpoint's topology, not yet its weights."""
        if self.topology_callback is not None:
            if not self.is_deepspeed_enabled:  # it keeps fp32 master weights
                trained = {name: x.parameter for name, x in self.sparse.layers.items() if x.parameter.requires_grad}
                refuse_half_precision(trained)
            if self.args.save_strategy != "no":
                self._refuse_adapters_alone()
            self._refuse_other_sizes()
            self.topology_callback.restore(None)
            self.topology_callback.warmup, self.topology_callback.scales_rate = None, False
        if checkpoint is not None:
            check_state_is_there(checkpoint, deepspeed=self.is_deepspeed_enabled)
            self.data_state(checkpoint)  # raises for other data before anything is restored
            self._restore_topology(checkpoint)

    def _saves_adapters_alone(self) -> bool:
        """Whether checkpoints have no weights of sparse layers."""
        if self.is_deepspeed_enabled and not self.args.save_only_model:
            return False  # its own files have all weights
        return saves_adapters_alone(cast(nn.Module, self.model))

    def _refuse_other_sizes(self) -> None:
        """Raises ValueError for options that put back earlier weights of parameters that have shrunk since."""
        for name in ("load_best_model_at_end", "auto_find_batch_size"):
            if self.sparse.config.compact_after_decay and getattr(self.args, name, False):
                raise ValueError(
                    f"{name} puts earlier weights back, and compact_after_decay may have made parameters smaller "
                    "since: leave one of them out"
                )

    def _refuse_adapters_alone(self) -> None:
        """Raises ValueError if sparse layers train whose weights would be missing from checkpoints."""
        trained = [name for name, layer in self.sparse.layers.items() if layer.parameter.requires_grad]
        if trained and self._saves_adapters_alone():
            raise ValueError(
                "the model has PEFT adapters, which are all that its checkpoints would hold, and sparse layers that "
                f"train: {listed(trained)}. Freeze these (requires_grad_(False)), train them without adapters, or set "
                "save_strategy to 'no' and write the model with export_sparse(…, adapters=…)"
            )

    def _restore_topology(self, directory: str) -> None:
        if self.topology_callback is None:
            if (Path(directory) / MASKS_NAME).exists():
                raise ValueError(f"{directory} is a checkpoint of a sparse model, this run is dense: use its config")
            return
        saved_config = SparsityConfig.load(directory)
        state = with_original_names(load_topology(directory), self.sparse.layers)
        run = RunIdentity.of_checkpoint(directory)
        if run is not None and state.run not in (None, run.id):
            raise ValueError(
                f"{directory} is of {run}, and its masks are of run {state.run[:8]}: its files were put together from "
                "checkpoints of two runs. Take another one"
            )
        if saved_config == self.sparse.config:
            follow_masks(self.sparse, state.masks)
            self.sparse.ignore_masks_in_ddp(cast(nn.Module, self.model))
        verify_fits(state, self.sparse.layers, directory)
        storage = "links" if state.slots else "masked"
        if storage != self.sparse.config.storage and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            raise ValueError(
                f"{directory} is of a run with storage {storage!r}, and this run has {self.sparse.config.storage!r}: "
                f"under {self.accelerator.distributed_type.value} set storage: {storage}; one process and DDP resume "
                "from either"
            )
        check_same_config(saved_config, self.sparse.config, directory)
        masks = self.sparse.topologies() if self._saves_adapters_alone() else {}
        for name, mask in masks.items():
            if not mask.equal(state.masks[name].to(mask.device)):
                raise ValueError(
                    f"{directory} holds adapters alone, and the mask of {name} in it is not that of the model: put the "
                    "adapters on the sparse model that they were trained on"
                )
        earlier = TrainerState.load_from_json(str(Path(directory) / TRAINER_STATE_NAME))
        self.topology_callback.restore(state, max_steps=earlier.max_steps)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self.reset_watch()
        self._saved = None
        return super()._inner_training_loop(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # the Trainer checks for the end only after a step: resumed from its last checkpoint, it would do one too many
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.topology_callback is not None:
            self.topology_callback.losses.add(loss, self.unlabelled)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As `Trainer.log`; the figures of a topology update go into the entry that has the loss of its step, and the
        sizes of the model into that of the run's end."""
        if self.topology_callback is not None and "loss" in logs:
            logs.update(self.topology_callback.take_figures())
        elif self.topology_callback is not None and "train_loss" in logs:  # the last log of the run
            logs.update(self.topology_callback.sizes(self.state.global_step))
        super().log(logs, *args, **kwargs)

    def _inspected(self) -> nn.Module:
        """The model whose forward takes the columns of the data, inside its wrappers."""
        return unwrap_peft_model(uncompiled(cast(nn.Module, self.model)))

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None and uncompiled(cast(nn.Module, self.model)) is not self.model:
            columns = list(inspect.signature(self._inspected().forward).parameters)
            self._signature_columns: Any = [*columns, *sorted({"label", "label_ids", *self.label_names})]
        super()._set_signature_columns_if_needed()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        loaded: Any = self.model if model is None else model
        with names_of_model(loaded, resume_from_checkpoint), original_keys(loaded):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with converting_state(self.optimizer, self.sparse.layers.values()):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        model = cast(nn.Module, self.model)
        with names_of_model(model, self.state.best_model_checkpoint), original_keys(model):
            super()._load_best_model()
        verify_seal(self.state.best_model_checkpoint)
        held = {name: layer.storage.slot_positions for name, layer in self.sparse.layers.items()}
        slots = {name: positions.clone() for name, positions in held.items() if positions is not None}
        self._restore_topology(self.state.best_model_checkpoint)
        if self.topology_callback is not None:
            self.topology_callback.evolver.take_parts()
            # the optimizer's state is not loaded: its moments belong to the links of the last step
            self.topology_callback.evolver.move_moments(slots)
            self.topology_callback.evolver.forget_missing()
            self.log_best_model()

    @property
    def evolver(self) -> Evolver | None:
        """Evolves the topology; None for a dense model."""
        return None if self.topology_callback is None else self.topology_callback.evolver

    @property
    def topology(self) -> Evolver | None:
        """The old name of `evolver`."""
        warnings.warn("trainer.topology is called trainer.evolver now", DeprecationWarning, stacklevel=2)
        return self.evolver

    def whole_state_dict(self) -> dict[str, Tensor] | None:
        """The full weights on rank 0, for `export_sparse`, if ranks hold shards; else None. Collective.

        Other ranks may get some of them, or none.
        """
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            return None
        state = self.accelerator.get_state_dict(self.deepspeed if self.is_deepspeed_enabled else self.model)
        return state and {original_name(key): value for key, value in state.items()}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.topology_callback is not None:
            state = self.topology_callback.state(self.state.global_step)  # all ranks take part
            if self.args.should_save:
                directory = Path(output_dir or self.args.output_dir or ".")
                directory.mkdir(parents=True, exist_ok=True)
                self.sparse.config.save(directory / CONFIG_NAME, measured=self.sparse.sparsity())
                save_topology(directory, state)
        self._for_others = not _internal_call
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            self._for_others = False

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if state_dict is not None:
            state_dict = {original_name(key): value for key, value in state_dict.items()}
        forget_checksums(Path(output_dir or self.args.output_dir or "."))  # of an earlier export into the same folder
        model = unwrap(cast(nn.Module, self.model))
        links = self.topology_callback is not None and self.sparse.config.storage == "links"
        if links and self._for_others and isinstance(model, PreTrainedModel) and state_dict != {}:
            # not a checkpoint of this run: what save_model writes is read by from_pretrained
            state_dict = LinkedWeights(self.sparse, state_dict or model.state_dict()).dense()
        with original_keys(cast(nn.Module, self.model)):
            super()._save(output_dir, state_dict)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.refuse_not_finite("no checkpoint is made of them")
        if self.topology_callback is not None:
            self._refuse_adapters_alone()
        run_dir = self._get_output_dir(trial=trial)
        directory = Path(run_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self._saved == directory:  # complete already; a signal may ask for it twice
            return
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # delete none before this one is complete
        then = partial(self._after_failed_save, run_dir)
        try:
            with explain_failed_write(directory, then, needs=partial(self._size_of_checkpoint, run_dir)):
                if self.args.should_save and directory.is_dir():
                    shutil.rmtree(directory)  # left by a run that was killed
                self.accelerator.wait_for_everyone()
                self.save_data_state(directory)
                super()._save_checkpoint(model, trial)
                self._seal(directory)
        finally:
            self.args.save_total_limit = limit
        self._saved = directory
        if self.args.should_save:
            rotate_checkpoints(run_dir, limit, self.state.best_model_checkpoint, use_mtime=True)

    def _after_failed_save(self, run_dir: str) -> str:
        last = last_sealed(run_dir)
        remedy = f"Make room, and resume with resume_from_checkpoint={last!r}" if last else "Make room, and begin anew"
        return f"{last_whole(last)}. {remedy}; a checkpoint is written before an older one is removed"

    def _size_of_checkpoint(self, run_dir: str) -> int:
        """The size of the last checkpoint in bytes, or of the weights and moments of this process."""
        if (last := last_sealed(run_dir)) is not None:
            return directory_size(last)
        weights, state = cast(nn.Module, self.model).state_dict(), getattr(self.optimizer, "state", {})
        moments = [value for of_one in state.values() for value in of_one.values() if isinstance(value, Tensor)]
        return sum(tensor.nbytes for tensor in (*weights.values(), *moments) if isinstance(tensor, Tensor))

    def _seal(self, directory: Path) -> None:
        self.accelerator.wait_for_everyone()  # every rank writes files of its own
        if self.args.should_save and not (directory / SEAL_NAME).exists():
            seal(directory, self.state.global_step, self.identity.to_dict() if self.identity else None)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._seal(Path(checkpoint_folder))  # so that the pushed checkpoint can be resumed
        super()._push_from_checkpoint(checkpoint_folder)


class SparseTrainer(SparseTrainerMixin, Trainer):
    """`transformers.Trainer` with sparse training; see `SparseTrainerMixin`.

    With method "dense" it equals `transformers.Trainer` bit for bit, except that a loss or gradient that is NaN or
    infinite ends the run, where the Trainer would train on and save the result.
    """
