"""Which evaluation may be the best of a run: one of a model as sparse as was asked for.

While sparsity still rises, models have more links than the one that was asked for, and lower losses. Were they to
count, load_best_model_at_end and early stopping would return a denser model.
"""

import logging
import math
from typing import Any

from hf_chts.sparse_model import SparsityHandle
from hf_chts.training.any_trainer import AnyTrainer
from hf_chts.training.callback import TopologyCallback

_log = logging.getLogger(__name__)


class BestAtTargetSparsity(AnyTrainer):
    """The part of SparseTrainer that says when an evaluation counts for the best model."""

    sparse: SparsityHandle
    topology_callback: TopologyCallback | None
    _said_when: bool = False

    def target_reached_at(self) -> int:
        """The step from which on the run has the sparsity that was asked for, by its schedule; 0: all the time."""
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
        if value is not None and math.isinf(value):  # NaN is neither less nor greater than any
            return False
        if value is not None and self.state.global_step < counts_from:
            if self.is_world_process_zero() and not self._said_when:
                self._said_when = True
                _log.warning(
                    "The best model is looked for from step %d on, where the schedule reaches the sparsity of %.4g "
                    "that was asked for; the model now has %.4g. With best_at_any_sparsity it is looked for at once",
                    counts_from, self.sparse.config.sparsity, self.sparse.sparsity(),
                )  # fmt: skip
            return False
        return super()._determine_best_metric(metrics, trial)

    def _forget_early_best(self, counts_from: int) -> None:
        """Forget a best from before, as states have it that were written with best_at_any_sparsity or long ago."""
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
                "schedule reaches the sparsity of %.4g. The model stays that of the last step, %d, with a sparsity of "
                "%.4g",
                self.args.metric_for_best_model, counts_from, self.sparse.config.sparsity,
                self.state.global_step, self.sparse.sparsity(),
            )  # fmt: skip
        return super()._finalize_training(*args, **kwargs)

    def say_best(self) -> None:
        """That the best model has been loaded, masks and all, and how sparse it is."""
        step, asked = self.state.best_global_step, self.sparse.config.sparsity
        early = step is not None and step < self.target_reached_at()
        if self.topology_callback is not None and self.is_world_process_zero():
            _log.log(
                logging.WARNING if early else logging.INFO,
                "The model is that of step %s, the best, with a sparsity of %.4g where %.4g was asked for",
                step, self.sparse.sparsity(), asked,
            )  # fmt: skip
