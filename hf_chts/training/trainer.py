"""SparseTrainer: a Trainer that makes its model sparse, evolves it, and keeps masks with weights."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from hf_chts.checkpoint import HISTORY_NAME, MASKS_NAME, load_topology, save_topology, verify_fits
from hf_chts.config import CONFIG_NAME, SparsityConfig
from hf_chts.layers.patching import SparseModel, sparsify
from hf_chts.training.callback import TopologyCallback
from hf_chts.training.lr_schedules import add_update_warmup

# The mixin goes before any Trainer class, and is not one itself
if TYPE_CHECKING:
    _AnyTrainer = Trainer
else:
    _AnyTrainer = object


class SparseTrainerMixin(_AnyTrainer):
    """Sparse training for any `Trainer` subclass: `class MyTrainer(SparseTrainerMixin, Seq2SeqTrainer): pass`.

    Args (beside the Trainer's own):
        sparsity: the config to sparsify the model with, or the handle that `sparsify` returned for it; None takes the
            handle of a model that is sparse already, and the defaults of SparsityConfig for one that is not.

    Raises:
        ValueError: the config does not fit the model, or its schedules do not fit `args.max_steps`.
    """

    sparse: SparseModel
    topology: TopologyCallback | None

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
        """As `Trainer.train`. A checkpoint is refused before anything is loaded if its masks are missing, damaged or of
        another model or config (FileNotFoundError, ValueError)."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
        if isinstance(resume_from_checkpoint, str | Path):
            resume_from_checkpoint = str(resume_from_checkpoint)
            self._restore_topology(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

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

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.topology is not None:
            self.topology.losses.add(loss)
        return loss

    def _load_best_model(self) -> None:
        super()._load_best_model()
        assert self.state.best_model_checkpoint is not None
        self._restore_topology(self.state.best_model_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        args = self.args
        if args.should_save and self.topology is not None:
            directory = Path(output_dir or args.output_dir or ".")
            self.sparse.config.save(directory / CONFIG_NAME)
            save_topology(directory, self.topology.state(self.state.global_step))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # the Trainer copies only its own files from the checkpoint into what it pushes
        if self.is_world_process_zero():
            for name in (CONFIG_NAME, MASKS_NAME, HISTORY_NAME):
                source = Path(checkpoint_folder) / name
                if source.is_file():
                    (Path(self.args.output_dir or ".") / name).write_bytes(source.read_bytes())
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


def _verify_same_run(saved: SparsityConfig, current: SparsityConfig, directory: str) -> None:
    if saved != current:
        before, now = saved.to_dict(), current.to_dict()
        changed = "; ".join(f"{k}: {before[k]!r} there, {now[k]!r} here" for k in now if before[k] != now[k])
        raise ValueError(
            f"{directory} was written with another sparsity config ({changed}): resume with its {CONFIG_NAME}, or "
            "start a new run from its weights"
        )
