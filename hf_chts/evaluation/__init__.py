"""Evaluation: metrics for the Trainer, lm-eval suites, and tables of their results."""

from hf_chts.lazy import lazy_names

__all__, __getattr__ = lazy_names(
    __name__,
    {
        "checks": ["check_model"],
        "comparison": ["compare_models"],
        "embedded_suite": ["write_embedded_suite"],
        "language_modeling": ["LanguageModeling", "language_modeling_scores"],
        "result_files": ["write_report", "write_results"],
        "suites": ["SUITES", "suite_averages"],
        "tables": ["results_table"],
        "trainer_metrics": ["language_modeling_metrics"],
        "zero_shot": ["evaluate_zero_shot"],
    },
)
