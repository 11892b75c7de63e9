"""Fine-tuning on instructions: data, sparse models and adapters for trl's SFTTrainer."""

from hf_chts.fine_tuning.conversations import PLAIN_TEMPLATE, load_conversations
from hf_chts.fine_tuning.starting_model import tuned_config

__all__ = ["PLAIN_TEMPLATE", "load_conversations", "tuned_config"]
