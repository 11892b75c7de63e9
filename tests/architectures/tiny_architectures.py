"""One tiny random model of each architecture, and which of its layers are to be sparse, written out by hand."""

from collections.abc import Callable
from dataclasses import dataclass, field

from tiny import VOCABULARY
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MarianConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
    T5Config,
    set_seed,
)


@dataclass(frozen=True)
class Architecture:
    """
    Attributes:
        config: makes the model's config.
        blocks: prefix of the blocks' names, with {} for their number → how many there are.
        layers: of each prefix, the names after it → (out, in).
        output, embedding: names of the output layer and the input embeddings.
        loader: the Auto class that loads it without hf_chts.
    """

    config: Callable
    settings: dict
    blocks: dict[str, int]
    layers: dict[str, dict[str, tuple[int, int]]]
    tied: bool = False
    target_modules: list[str] | None = None
    output: str = "lm_head"
    embedding: str = "model.embed_tokens"
    loader: type = AutoModelForCausalLM
    dropout: list[str] = field(default_factory=list)

    def model(self, seed: int = 0, **changes) -> PreTrainedModel:
        set_seed(seed)
        return self.loader.from_config(self.config(vocab_size=VOCABULARY, **(self.settings | changes)))

    def without_dropout(self) -> PreTrainedModel:
        return self.model(**dict.fromkeys(self.dropout, 0.0))

    def expected(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the layers that are sparse, by name."""
        return {
            f"{prefix.format(i)}.{name}": shape
            for prefix, count in self.blocks.items()
            for i in range(count)
            for name, shape in self.layers[prefix].items()
        }

    @property
    def is_encoder_decoder(self) -> bool:
        return self.loader is AutoModelForSeq2SeqLM


BLOCKS = "model.layers.{}"


def gated(hidden: int, intermediate: int, queries: int, values: int) -> dict[str, tuple[int, int]]:
    return {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (values, hidden),
        "self_attn.v_proj": (values, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }


def attention(hidden: int) -> dict[str, tuple[int, int]]:
    return {f"{projection}_proj": (hidden, hidden) for projection in ("q", "k", "v", "out")}


def prefixed(prefix: str, layers: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    return {f"{prefix}.{name}": shape for name, shape in layers.items()}


# three query heads of 6 on one pair of key and value heads
GROUPED = {
    "hidden_size": 15,
    "intermediate_size": 21,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
UNGROUPED = GROUPED | {"num_key_value_heads": 3}
# the CPU kernel for experts takes rows of a multiple of 16 bytes
EXPERTS = GROUPED | {"num_experts_per_tok": 1, "hidden_size": 12, "intermediate_size": 20}
T5_ATTENTION = {"q": (12, 15), "k": (12, 15), "v": (12, 15), "o": (15, 12)}
T5_MLP = {"DenseReluDense.wi": (21, 15), "DenseReluDense.wo": (15, 21)}

ARCHITECTURES = {
    "llama": Architecture(LlamaConfig, UNGROUPED, {BLOCKS: 2}, {BLOCKS: gated(15, 21, 18, 18)}),
    "llama_grouped": Architecture(
        LlamaConfig, GROUPED | {"tie_word_embeddings": True}, {BLOCKS: 2}, {BLOCKS: gated(15, 21, 18, 6)}, tied=True
    ),
    "mistral": Architecture(MistralConfig, GROUPED, {BLOCKS: 2}, {BLOCKS: gated(15, 21, 18, 6)}),
    "qwen3": Architecture(Qwen3Config, GROUPED, {BLOCKS: 2}, {BLOCKS: gated(15, 21, 18, 6)}),
    "gemma3_text": Architecture(
        Gemma3TextConfig, GROUPED | {"sliding_window": 8}, {BLOCKS: 2}, {BLOCKS: gated(15, 21, 18, 6)}, tied=True
    ),
    "phi3": Architecture(
        Phi3Config,
        GROUPED | {"hidden_size": 18},
        {BLOCKS: 2},
        {
            BLOCKS: {
                "self_attn.qkv_proj": (30, 18),
                "self_attn.o_proj": (18, 18),
                "mlp.gate_up_proj": (42, 18),
                "mlp.down_proj": (18, 21),
            }
        },
    ),
    "gpt_neox": Architecture(
        GPTNeoXConfig,
        {
            "hidden_size": 24,
            "intermediate_size": 21,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "max_position_embeddings": 32,
        },
        {"gpt_neox.layers.{}": 2},
        {
            "gpt_neox.layers.{}": {
                "attention.query_key_value": (72, 24),
                "attention.dense": (24, 24),
                "mlp.dense_h_to_4h": (21, 24),
                "mlp.dense_4h_to_h": (24, 21),
            }
        },
        embedding="gpt_neox.embed_in",
    ),
    "gpt2": Architecture(
        GPT2Config,
        {
            "n_embd": 15,
            "n_inner": 21,
            "n_layer": 2,
            "n_head": 3,
            "n_positions": 32,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
        {"transformer.h.{}": 2},
        {
            "transformer.h.{}": {
                "attn.c_attn": (45, 15),
                "attn.c_proj": (15, 15),
                "mlp.c_fc": (21, 15),
                "mlp.c_proj": (15, 21),
            }
        },
        tied=True,
        embedding="transformer.wte",
        dropout=["resid_pdrop", "embd_pdrop", "attn_pdrop"],
    ),
    "opt": Architecture(
        OPTConfig,
        {
            "hidden_size": 15,
            "word_embed_proj_dim": 15,
            "ffn_dim": 21,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "max_position_embeddings": 32,
        },
        {"model.decoder.layers.{}": 2},
        {"model.decoder.layers.{}": prefixed("self_attn", attention(15)) | {"fc1": (21, 15), "fc2": (15, 21)}},
        tied=True,
        embedding="model.decoder.embed_tokens",
        dropout=["dropout", "attention_dropout"],
    ),
    "mixtral": Architecture(
        MixtralConfig,
        EXPERTS | {"num_local_experts": 3},
        {BLOCKS: 2},
        {BLOCKS: {name: shape for name, shape in gated(12, 20, 18, 6).items() if name.startswith("self_attn.")}},
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    ),
    "qwen3_moe": Architecture(
        Qwen3MoeConfig,
        EXPERTS | {"num_experts": 3, "moe_intermediate_size": 8},
        {BLOCKS: 2},
        {BLOCKS: {"self_attn.q_proj": (18, 12), "self_attn.o_proj": (12, 18)}},
        target_modules=["q_proj", "o_proj"],
    ),
    "t5": Architecture(
        T5Config,
        {
            "d_model": 15,
            "d_kv": 4,
            "d_ff": 21,
            "num_layers": 2,
            "num_decoder_layers": 1,
            "num_heads": 3,
            "decoder_start_token_id": 0,
        },
        {"encoder.block.{}.layer": 2, "decoder.block.{}.layer": 1},
        {
            "encoder.block.{}.layer": prefixed("0.SelfAttention", T5_ATTENTION) | prefixed("1", T5_MLP),
            "decoder.block.{}.layer": prefixed("0.SelfAttention", T5_ATTENTION)
            | prefixed("1.EncDecAttention", T5_ATTENTION)
            | prefixed("2", T5_MLP),
        },
        tied=True,
        embedding="shared",
        loader=AutoModelForSeq2SeqLM,
        dropout=["dropout_rate"],
    ),
    "marian": Architecture(
        MarianConfig,
        {
            "d_model": 18,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "encoder_ffn_dim": 21,
            "decoder_ffn_dim": 25,
            "encoder_attention_heads": 3,
            "decoder_attention_heads": 3,
            "max_position_embeddings": 32,
            "pad_token_id": 0,
            "decoder_start_token_id": 0,
            "eos_token_id": 1,
            "forced_eos_token_id": 1,
        },
        {"model.encoder.layers.{}": 1, "model.decoder.layers.{}": 2},
        {
            "model.encoder.layers.{}": prefixed("self_attn", attention(18)) | {"fc1": (21, 18), "fc2": (18, 21)},
            "model.decoder.layers.{}": prefixed("self_attn", attention(18))
            | prefixed("encoder_attn", attention(18))
            | {"fc1": (25, 18), "fc2": (18, 25)},
        },
        tied=True,
        embedding="model.shared",
        loader=AutoModelForSeq2SeqLM,
    ),
}
