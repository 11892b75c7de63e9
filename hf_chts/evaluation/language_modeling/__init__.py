"""The language-modeling metric. `evaluate.load` takes this folder's path and needs no network."""

from hf_chts.evaluation.language_modeling.language_modeling import LanguageModeling, language_modeling_scores

__all__ = ["LanguageModeling", "language_modeling_scores"]
