"""SparseTrainer: a Trainer that makes its model sparse, evolves it, and keeps masks with weights."""

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from hf_chts.checkpoint import MASKS_NAME, load_topology, save_topology, verify_fits
from hf_chts.config import CONFIG_NAME, SparsityConfig
from hf_chts.layers.patching import SparseModel, sparsify
from hf_chts.seal import SEAL_NAME, last_sealed, seal, verify_seal
from hf_chts.training.callback import TopologyCallback
from hf_chts.training.console import use_console
from hf_chts.training.data_state import ResumableDataMixin
from hf_chts.training.hub import HubPushes
from hf_chts.training.lr_schedules import add_update_warmup

# The mixin goes before any Trainer class, and is not one itself
if TYPE_CHECKING:
    _AnyTrainer = Trainer
else:
    _AnyTrainer = object


# What gloo and NCCL say where another rank is gone
_LOST = re.compile(r"closed by peer|connection (was )?(reset|closed|refused)|timed? ?out|remote process", re.IGNORECASE)


class SparseTrainerMixin(HubPushes, ResumableDataMixin, _AnyTrainer):
    """Sparse training for any `Trainer` subclass: `class MyTrainer(SparseTrainerMixin, Seq2SeqTrainer): pass`.

    Args (beside the Trainer's own):
        sparsity: the config to sparsify the model with, or the handle that `sparsify` returned for it; None takes the
            handle of a model that is sparse already, and the defaults of SparsityConfig for one that is not.

    Raises:
        ValueError: the config does not fit the model, or its schedules do not fit `args.max_steps`.
    """

    sparse: SparseModel
    topology: TopologyCallback | None
    _finite: Tensor | None = None  # whether all losses since the last look were

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *positional: Any,
        sparsity: SparsityConfig | SparseModel | None = None,
        **kwargs: Any,
    ) -> None:
        self._sparsity = sparsity
        if model is not None:
            config = sparsity.config if isinstance(sparsity, SparseModel) else sparsity
            if config is not None and args is not None and args.max_steps > 0:
                config.plan(args.max_steps)  # refuses what cannot work before the model is touched
            self.sparse = self._sparsify(model)
        super().__init__(model, args, *positional, **kwargs)
        if model is None:  # it came from model_init
            assert self.model is not None
            self.sparse = self._sparsify(self.model)
        self.follow_stream()
        use_console(self)
        self._follow_topology()

    def _sparsify(self, model: nn.Module) -> SparseModel:
        existing = SparseModel.of(model)
        given = self._sparsity
        if isinstance(given, SparseModel):
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
        self.topology = None
        if self.sparse.layers:
            self.topology = TopologyCallback(self.sparse, log=self.log)
            self.add_callback(self.topology)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        model = super().call_model_init(trial)
        # train() asks for a fresh model each time; during __init__ there is nothing to replace yet
        if hasattr(self, "topology"):
            if self.topology is not None:
                self.remove_callback(self.topology)
            self.sparse = self._sparsify(model)
            self._follow_topology()
        return model

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; True resumes from the last checkpoint that was written whole.

        Raises:
            FileNotFoundError, ValueError: the checkpoint is not whole, damaged, or of another model or config. Nothing
                has been loaded then.
            FloatingPointError: the loss became NaN or infinite.
            RuntimeError: another rank died or hangs.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_sealed(self.args.output_dir or ".")
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"there is no whole checkpoint in {self.args.output_dir} to resume from: start without "
                    "resume_from_checkpoint, or name a checkpoint"
                )
        if isinstance(resume_from_checkpoint, str | Path):
            resume_from_checkpoint = str(resume_from_checkpoint)
            verify_seal(resume_from_checkpoint)
            self.data_state(resume_from_checkpoint)  # refuses other data before anything is restored
            self._restore_topology(resume_from_checkpoint)
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        except RuntimeError as error:
            if dist.is_initialized() and _LOST.search(str(error)):
                raise RuntimeError(
                    f"rank {dist.get_rank()} of {dist.get_world_size()} lost the others in step "
                    f"{self.state.global_step + 1}; one of them died or hangs, and its own output says why: {error}\n"
                    f"{_last_whole(last_sealed(self.args.output_dir or '.'))}"
                ) from error
            raise

    def _restore_topology(self, directory: str) -> None:
        if self.topology is None:
            if (Path(directory) / MASKS_NAME).exists():
                raise ValueError(f"{directory} is a checkpoint of a sparse model, this run is dense: use its config")
            return
        saved_config = SparsityConfig.load(directory)
        state = load_topology(directory)
        verify_fits(state, self.sparse.layers, directory)
        _verify_same_run(saved_config, self.sparse.config, directory)
        self.topology.restore(state)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # the Trainer looks for the end after a step: resumed from its last checkpoint, a run would train one too many
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        # kept on the device: to look at each loss would have the GPU wait
        self._finite = (
            self._finite & torch.isfinite(loss.detach()) if self._finite is not None else torch.isfinite(loss)
        )
        if self.topology is not None:
            self.topology.losses.add(loss)
        return loss

    def log(self, *args: Any, **kwargs: Any) -> None:
        self._check_finite()
        super().log(*args, **kwargs)

    def _check_finite(self) -> None:
        """Raises FloatingPointError if a loss since the last call was NaN or infinite."""
        finite, self._finite = self._finite, None
        if finite is not None and not bool(finite):
            last = last_sealed(self.args.output_dir or ".")
            raise FloatingPointError(
                f"the loss was NaN or infinite at or before step {self.state.global_step}: lower the learning rate, "
                f"lengthen the warm-up or set max_grad_norm. {_last_whole(last)}"
            )

    def _load_best_model(self) -> None:
        super()._load_best_model()
        assert self.state.best_model_checkpoint is not None
        verify_seal(self.state.best_model_checkpoint)
        self._restore_topology(self.state.best_model_checkpoint)

    def whole_state_dict(self) -> dict[str, Tensor] | None:
        """The whole weights on rank 0, for `export_sparse`, where ranks hold parts; None where the model has them.

        Collective. Other ranks may get parts of it, or nothing.
        """
        if self.is_deepspeed_enabled:
            return self.accelerator.get_state_dict(self.deepspeed)
        return self.accelerator.get_state_dict(self.model) if self.is_fsdp_enabled else None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.topology is not None:
            state = self.topology.state(self.state.global_step)  # all ranks take part
            if self.args.should_save:
                directory = Path(output_dir or self.args.output_dir or ".")
                directory.mkdir(parents=True, exist_ok=True)
                self.sparse.config.save(directory / CONFIG_NAME)
                save_topology(directory, state)
        super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._check_finite()
        run_dir = self._get_output_dir(trial=trial)
        directory = Path(run_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # none goes before this one is whole
        try:
            if self.args.should_save and directory.is_dir():
                shutil.rmtree(directory)  # what a run that died left there, temporary files too
            self.accelerator.wait_for_everyone()
            self.save_data_state(directory)
            super()._save_checkpoint(model, trial)
            self._seal(directory)
        except OSError as error:
            raise OSError(
                error.errno, f"{directory} could not be written: {error}. {_last_whole(last_sealed(run_dir))}"
            ) from error
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            rotate_checkpoints(run_dir, limit, self.state.best_model_checkpoint, use_mtime=True)

    def _seal(self, directory: Path) -> None:
        self.accelerator.wait_for_everyone()  # every rank has files of its own in there
        if self.args.should_save and not (directory / SEAL_NAME).exists():
            seal(directory, self.state.global_step)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._seal(Path(checkpoint_folder))  # what is pushed can be resumed from
        super()._push_from_checkpoint(checkpoint_folder)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        fresh = self.lr_scheduler is None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        warmup_steps = getattr(self.args, "update_warmup_steps", 0)
        if fresh and warmup_steps and self.topology is not None and self.sparse.config.evolves:
            if not isinstance(scheduler, LambdaLR):
                raise ValueError(
                    f"update_warmup_steps is {warmup_steps}, but the schedule {self.args.lr_scheduler_type!r} is no "
                    "function of the step: set update_warmup_steps to 0, or choose another lr_scheduler_type"
                )
            add_update_warmup(scheduler, self.sparse.config.plan(num_training_steps), warmup_steps)
        return scheduler


class SparseTrainer(SparseTrainerMixin, Trainer):
    """`transformers.Trainer` with sparse training; see `SparseTrainerMixin`.

    With method "dense" it does what `transformers.Trainer` does, bit for bit.
    """


def _last_whole(checkpoint: str | None) -> str:
    return f"The last whole checkpoint is {checkpoint}" if checkpoint else "There is no earlier checkpoint"


def _verify_same_run(saved: SparsityConfig, current: SparsityConfig, directory: str) -> None:
    if saved != current:
        before, now = saved.to_dict(), current.to_dict()
        changed = "; ".join(f"{k}: {before[k]!r} there, {now[k]!r} here" for k in now if before[k] != now[k])
        raise ValueError(
            f"{directory} was written with another sparsity config ({changed}): resume with its {CONFIG_NAME}, or "
            "start a new run from its weights"
        )
