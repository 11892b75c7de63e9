"""A tiny LLaMA, a tokenizer whose tokens are bytes, and the embedded tasks, made once for this folder."""

import pytest
import tokenizers
import torch
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def byte_tokenizer():
    """Token 0 is EOS, the others are the 256 bytes; no BOS and no padding token."""
    vocabulary = {"<|endoftext|>": 0}
    vocabulary.update({character: i for i, character in enumerate(sorted(ByteLevel.alphabet()), start=1)})
    tokenizer = tokenizers.Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def make_tiny_llama(seed, max_position_embeddings=640):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=257,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=max_position_embeddings,
                # far from uniform predictions, so that an error of one position shows
                initializer_range=0.4,
                bos_token_id=None,
                eos_token_id=0,
            )
        )


@pytest.fixture(scope="session")
def tiny_llama():
    return make_tiny_llama


@pytest.fixture(scope="session")
def saved_models(tmp_path_factory, byte_tokenizer):
    """Two directories, `first` and `second`, with different weights."""
    root = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate(("first", "second")):
        make_tiny_llama(seed).save_pretrained(root / name)
        byte_tokenizer.save_pretrained(root / name)
    return root / "first", root / "second"
