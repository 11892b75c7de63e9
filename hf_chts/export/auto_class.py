"""Which of transformers' Auto classes loads a model, told by the name of its class."""

from typing import Any

import transformers
from transformers.models.auto import modeling_auto

# Auto class → the classes it loads, by model type
_LOADS: dict[str, dict[str, Any]] = {
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForSeq2SeqLM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForMaskedLM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}


def auto_class(architecture: str | None) -> Any:
    """The Auto class that loads `architecture`, a name as in a config's `architectures`.

    AutoModelForCausalLM where none is known to: classes that were registered with it, or whose code is in the
    directory, have names of their own.
    """
    known = (name for name, classes in _LOADS.items() if architecture in classes.values())
    return getattr(transformers, next(known, "AutoModelForCausalLM"))
