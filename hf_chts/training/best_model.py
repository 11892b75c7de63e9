"""Only evaluations at the target sparsity count for the best model.

While sparsity still rises, the model has more links and a lower loss, so load_best_model_at_end and early stopping
would otherwise return a denser model than requested.
"""

import logging
import math
from typing import Any

from hf_chts.sparse_model import SparsityHandle
from hf_chts.training.any_trainer import AnyTrainer
from hf_chts.training.callback import TopologyCallback

_log = logging.getLogger(__name__)


class BestAtTargetSparsity(AnyTrainer):
    """The part of SparseTrainer that decides whether an evaluation counts for the best model."""

    sparse: SparsityHandle
    topology_callback: TopologyCallback | None
    _warned: bool = False

    def target_reached_at(self) -> int:
        """The step at which the schedule reaches the target sparsity; 0 if the run has it from the start."""
        plan = self.topology_callback.evolver.plan if self.topology_callback is not None else None
        if plan is None or not plan.decay_end or plan.floor >= plan.config.sparsity - 1e-12:
            return 0
        return plan.decay_end

    def _counts_from(self) -> int:
        return 0 if getattr(self.args, "best_at_any_sparsity", False) else self.target_reached_at()

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        counts_from, name = self._counts_from(), self.args.metric_for_best_model
        if name is None:
            return super()._determine_best_metric(metrics, trial)
        self._forget_early_best(counts_from)
        value = metrics.get(name if name.startswith("eval_") else f"eval_{name}")
        if value is not None and math.isinf(value):  # NaN is never better, as no comparison with it holds
            return False
        if value is not None and self.state.global_step < counts_from:
            if self.is_world_process_zero() and not self._warned:
                self._warned = True
                _log.warning(
                    "Evaluations count for the best model from step %d on, where the schedule reaches the target "
                    "sparsity of %.4g; the model now has %.4g. Set best_at_any_sparsity to count all of them",
                    counts_from, self.sparse.config.sparsity, self.sparse.sparsity(),
                )  # fmt: skip
            return False
        return super()._determine_best_metric(metrics, trial)

    def _forget_early_best(self, counts_from: int) -> None:
        """Forget a best model from before that step, which a resumed checkpoint may name."""
        best = self.state.best_global_step
        if best is not None and best < counts_from:
            self.state.best_metric = self.state.best_global_step = self.state.best_model_checkpoint = None

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        counts_from = self._counts_from()
        if counts_from and self.args.metric_for_best_model is not None:
            self._forget_early_best(counts_from)
        none = counts_from and self.args.load_best_model_at_end and self.state.best_model_checkpoint is None
        if none and self.is_world_process_zero():
            _log.warning(
                "No evaluation counts for the best model: there was none with a finite %s from step %d on, where the "
                "schedule reaches the target sparsity of %.4g. The model is that of the last step, %d, with a sparsity "
                "of %.4g",
                self.args.metric_for_best_model, counts_from, self.sparse.config.sparsity,
                self.state.global_step, self.sparse.sparsity(),
            )  # fmt: skip
        return super()._finalize_training(*args, **kwargs)

    def log_best_model(self) -> None:
        """Log that the best model has been loaded, and how sparse it is."""
        step, target = self.state.best_global_step, self.sparse.config.sparsity
        early = step is not None and step < self.target_reached_at()
        if self.topology_callback is not None and self.is_world_process_zero():
            _log.log(
                logging.WARNING if early else logging.INFO,
                "The best model, of step %s, has been loaded, with a sparsity of %.4g where %.4g was asked for",
                step, self.sparse.sparsity(), target,
            )  # fmt: skip
