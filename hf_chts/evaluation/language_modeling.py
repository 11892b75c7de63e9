"""Loss, perplexity and bits per byte of a language model, as a module of the `evaluate` library.

`evaluate.load` takes the path of this file and needs no network. It imports a copy of the file, which is why nothing of
hf_chts is imported here.
"""

import math

import datasets
import evaluate
import numpy as np
from numpy.typing import ArrayLike

_DESCRIPTION = """
How well a language model predicts a text: mean loss and perplexity per token, which depend on the tokenizer, and bits
per byte, which does not and so compares models with different vocabularies.
"""

_INPUTS = """
Args:
    predictions: negative log-likelihood of each predicted token, in nats.
    references: number of UTF-8 bytes each of these tokens stands for (0 for special tokens).
Returns:
    loss: mean negative log-likelihood, in nats per token.
    perplexity: exp(loss).
    bits_per_byte: sum of the negative log-likelihoods / (ln 2 * sum of the bytes).
"""


def language_modeling_scores(nll: ArrayLike, byte_lengths: ArrayLike) -> dict[str, float]:
    """`loss` (nats per token), `perplexity` and `bits_per_byte` of the predicted tokens of a text.

    Args:
        nll: negative log-likelihood of each token in nats, (tokens,), any float type; summed in float64.
        byte_lengths: UTF-8 bytes each of these tokens stands for, (tokens,), integers.

    Raises:
        ValueError: the two differ in shape, there are no tokens, or the tokens stand for no byte at all.
    """
    nats = np.asarray(nll, dtype=np.float64)
    lengths = np.asarray(byte_lengths, dtype=np.float64)
    if nats.ndim != 1 or nats.shape != lengths.shape:
        raise ValueError(
            "The losses and byte lengths must be one value per token each; "
            f"got shapes {nats.shape} and {lengths.shape}."
        )
    if nats.size == 0 or lengths.sum() <= 0:
        raise ValueError(
            f"There is nothing to score: {nats.size} tokens standing for {lengths.sum():.0f} bytes of text."
        )
    loss = float(nats.mean())
    return {
        "loss": loss,
        # exp() overflows above 709 nats, which is a diverged model and not an error
        "perplexity": math.exp(loss) if not loss > 709 else math.inf,
        "bits_per_byte": float(nats.sum() / (math.log(2) * lengths.sum())),
    }


class LanguageModeling(evaluate.Metric):
    """See `_INPUTS`. `compute` raises ValueError where `language_modeling_scores` does."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: ArrayLike, references: ArrayLike) -> dict[str, float]:
        return language_modeling_scores(predictions, references)
