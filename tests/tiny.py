"""Small models and data that several tests share."""

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

VOCABULARY = 96


def tiny_llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    settings = {
        "hidden_size": 40,
        "intermediate_size": 60,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
    }
    set_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(settings | changes)))


def random_blocks(count: int = 64, length: int = 16) -> Dataset:
    ids = torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(1)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})
