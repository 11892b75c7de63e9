"""Evaluation: metrics for the Trainer, lm-eval suites, and tables of their results."""

from hf_chts.evaluation.averages import suite_averages
from hf_chts.evaluation.comparison import compare_models
from hf_chts.evaluation.embedded_suite import write_embedded_suite
from hf_chts.evaluation.language_modeling import LanguageModeling, language_modeling_scores
from hf_chts.evaluation.model_source import check_model
from hf_chts.evaluation.result_files import write_report, write_results
from hf_chts.evaluation.suites import SUITES
from hf_chts.evaluation.tables import results_table
from hf_chts.evaluation.trainer_metrics import language_modeling_metrics
from hf_chts.evaluation.zero_shot import evaluate_zero_shot

__all__ = [
    "SUITES",
    "LanguageModeling",
    "check_model",
    "compare_models",
    "evaluate_zero_shot",
    "language_modeling_metrics",
    "language_modeling_scores",
    "results_table",
    "suite_averages",
    "write_embedded_suite",
    "write_report",
    "write_results",
]
