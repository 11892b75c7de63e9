"""Which models are causal, and how many positions they have, against what transformers' own forward does."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_chts.export.starting_weights import load_weights
from hf_chts.model_checks import check_causal, check_positions

SIZES = {
    "vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8,
    "max_position_embeddings": 12,
}  # fmt: skip
SIDES = {
    "vocab_size": 40, "d_model": 8, "decoder_layers": 1, "decoder_attention_heads": 1, "decoder_ffn_dim": 8,
    "encoder_layers": 1, "encoder_attention_heads": 1, "encoder_ffn_dim": 8, "max_position_embeddings": 12,
}  # fmt: skip
MODELS = {
    "gpt2": ("gpt2", SIZES),
    "gpt_neo": ("gpt_neo", SIZES | {"num_layers": 1, "attention_types": [[["global"], 1]]}),
    "gpt_neox": ("gpt_neox", SIZES),
    "llama": ("llama", SIZES),
    "opt": ("opt", SIZES | {"ffn_dim": 8, "word_embed_proj_dim": 8}),
    "bart": ("bart", SIDES),
    "pegasus": ("pegasus", SIDES),
    "bert": ("bert", SIZES),
    "bert decoder": ("bert", SIZES | {"is_decoder": True}),
    "roberta decoder": ("roberta", SIZES | {"is_decoder": True}),
    "rembert": ("rembert", SIZES | {"input_embedding_size": 8, "output_embedding_size": 8}),
}


@pytest.fixture(params=MODELS)
def model(request):
    kind, settings = MODELS[request.param]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).eval()


def accepts(check, *args):
    try:
        check(*args)
    except ValueError:
        return False
    return True


@torch.no_grad()
def test_what_sees_the_future_is_refused(model):
    tokens = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
    first, second = model(input_ids=tokens).logits
    assert accepts(check_causal, model, "some") == first[:3].equal(second[:3])


@torch.no_grad()
def test_sequences_that_run_out_of_positions_are_refused(model):
    for length in range(8, 15):
        tokens = torch.full((1, length), 5)
        try:
            model(input_ids=tokens)
            possible = True
        except (IndexError, RuntimeError):
            possible = False
        # OPT's table has two rows that its config does not count
        beyond = model.config.model_type in ("opt", "bart") and length > 12
        assert accepts(check_positions, model, length) == (possible and not beyond), length


def test_an_encoder_is_no_start(tmp_path):
    for name, settings in (("encoder", {}), ("decoder", {"is_decoder": True})):
        config = AutoConfig.for_model("bert", **SIZES, **settings)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match="set is_decoder: true"):
        load_weights(str(tmp_path / "encoder"), sparse=False, sparsity=None)
    load_weights(str(tmp_path / "decoder"), sparse=False, sparsity=None)
