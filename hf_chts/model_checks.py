"""Whether a model can be trained as a causal language model on sequences of a length."""

from torch import nn
from transformers import PreTrainedModel

# of the last part of a module's name: embeddings of positions (GPT-2's and GPT-Neo's are wpe)
_OF_POSITIONS = ("pos", "wpe")


def check_causal(model: PreTrainedModel, name: str) -> None:
    """Refuse a model whose attention sees the tokens that it is to predict.

    transformers builds BERT and its kin as causal language models too, which they are where the config has is_decoder.

    Args:
        name: what the user calls the model.

    Raises:
        ValueError: it is an encoder.
    """
    if getattr(model.config, "is_decoder", None) is not False:
        return  # only where a model may be either is it said in its config
    # GPT-NeoX is always causal, and Pegasus's decoder has a config of its own
    if not any(getattr(part, mark, False) for part in model.modules() for mark in ("is_causal", "is_decoder")):
        raise ValueError(
            f"model {name} is an encoder ({type(model).__name__} with is_decoder: false in its config), whose "
            "attention sees the tokens that are to be predicted: set is_decoder: true in its config.json, or name a "
            "decoder"
        )


def check_positions(model: PreTrainedModel, tokens: int) -> None:
    """Refuse sequences that are longer than a model's table of positions. Rotary and relative ones have none.

    Args:
        tokens: of a sequence.

    Raises:
        ValueError: there are fewer positions.
    """
    longest = getattr(model.config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and any(mark in name.rpartition(".")[2] for mark in _OF_POSITIONS):
            # RoBERTa counts its positions from behind the padding's id
            unused = 0 if module.padding_idx is None else module.padding_idx + 1
            held = min(longest or module.num_embeddings, module.num_embeddings - unused)
            if tokens > held:
                raise ValueError(
                    f"block_size is {tokens}, and the model has {held} positions ({name}): set block_size to {held} or "
                    "less, or give a new model more of them (max_position_embeddings in its config)"
                )
