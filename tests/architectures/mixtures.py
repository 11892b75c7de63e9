"""Mixtures of experts: those in one parameter, which the default refuses, and those of linear layers."""

import transformers as t
from architecture import Architecture
from decoders import EVEN, GROUPED, SPECIAL
from tasks import CAUSAL, SEQ2SEQ
from tiny import VOCABULARY

ONE_PARAMETER = "the matrices of all experts lie in one parameter, which no layer holds"
# the CPU kernel for experts takes rows of a multiple of 16 bytes
EXPERTS = GROUPED | {"num_experts_per_tok": 1}
EVEN_EXPERTS = EVEN | {"num_experts_per_tok": 1}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EVEN_ATTENTION = "model.layers.{2}.self_attn: q_proj o_proj 32x32, k_proj v_proj 16x32"


def one_parameter(experts: str, parameter: str) -> str:
    return rf"{experts} is a \w+, whose parameter {parameter} .* holds several matrices"


MIXTURES = {
    "mixtral": Architecture(
        t.MixtralForCausalLM,
        EXPERTS | {"num_local_experts": 3},
        CAUSAL,
        "model.layers.{2}.self_attn: q_proj 32x20, k_proj v_proj 16x20, o_proj 20x32",
        target_modules=ATTENTION,
        refused=one_parameter("model.layers.0.mlp.experts", "gate_up_proj"),
        note=ONE_PARAMETER,
    ),
    "qwen3_moe": Architecture(
        t.Qwen3MoeForCausalLM,
        EXPERTS | {"num_experts": 3, "moe_intermediate_size": 8},
        CAUSAL,
        "model.layers.{2}.self_attn: q_proj 32x20, o_proj 20x32",
        target_modules=["q_proj", "o_proj"],
        refused=one_parameter("model.layers.0.mlp.experts", "gate_up_proj"),
        note=ONE_PARAMETER,
    ),
    "olmoe": Architecture(
        t.OlmoeForCausalLM,
        EVEN_EXPERTS | {"num_experts": 3},
        CAUSAL,
        EVEN_ATTENTION,
        target_modules=ATTENTION,
        refused=one_parameter("model.layers.0.mlp.experts", "gate_up_proj"),
        note=ONE_PARAMETER,
    ),
    "granitemoe": Architecture(
        t.GraniteMoeForCausalLM,
        EVEN_EXPERTS | {"num_local_experts": 3},
        CAUSAL,
        EVEN_ATTENTION,
        target_modules=ATTENTION,
        refused=one_parameter("model.layers.0.block_sparse_moe.experts", "gate_up_proj"),
        note=ONE_PARAMETER,
    ),
    "gpt_oss": Architecture(
        t.GptOssForCausalLM,
        EVEN_EXPERTS | {"num_local_experts": 3, "head_dim": 8, "sliding_window": 8},
        CAUSAL,
        EVEN_ATTENTION,
        target_modules=ATTENTION,
        refused=one_parameter("model.layers.0.mlp.experts", "gate_up_proj"),
        note=ONE_PARAMETER,
    ),
    "llama4": Architecture(
        t.Llama4ForCausalLM,
        EXPERTS | {"num_local_experts": 3, "intermediate_size_mlp": 28, "interleave_moe_layer_step": 1},
        CAUSAL,
        """
        model.layers.{2}.self_attn: q_proj 32x20, k_proj v_proj 16x20, o_proj 20x32
        model.layers.{2}.feed_forward.shared_expert: gate_proj up_proj 28x20, down_proj 20x28
        """,
        target_modules=[*ATTENTION, r".*\.shared_expert\..*_proj"],
        refused=one_parameter("model.layers.0.feed_forward.experts", "gate_up_proj"),
        note=ONE_PARAMETER,
    ),
    # three heads: queries of 8 + 4, keys of 8 beside values of 6, and 4 that turn with the position for all heads
    "deepseek_v3": Architecture(
        t.DeepseekV3ForCausalLM,
        EVEN_EXPERTS
        | {
            **{"num_attention_heads": 3, "num_key_value_heads": 3, "q_lora_rank": 16, "kv_lora_rank": 18},
            **{"qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6, "n_routed_experts": 4, "n_group": 2},
            **{"topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1},
        },
        CAUSAL,
        """
        model.layers.{2}.self_attn: q_a_proj 16x32, q_b_proj 36x16, o_proj 32x18
        model.layers.{2}.self_attn: kv_a_proj_with_mqa 22x32, kv_b_proj 42x18
        model.layers.1.mlp.shared_experts: gate_proj up_proj 16x32, down_proj 32x16
        """,
        target_modules=["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", r".*\.shared_experts\..*"],
        refused=one_parameter("model.layers.1.mlp.experts", "gate_up_proj"),
        note=ONE_PARAMETER,
    ),
    "jamba": Architecture(
        t.JambaForCausalLM,
        EVEN_EXPERTS
        | {
            **{"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
            **{"num_experts": 2, "mamba_d_state": 4, "mamba_dt_rank": 16, "use_mamba_kernels": False},
        },
        CAUSAL,
        """
        model.layers.0.mamba: in_proj 128x32, out_proj 32x64
        model.layers.0.feed_forward: gate_proj up_proj 28x32, down_proj 32x28
        model.layers.1.self_attn: q_proj o_proj 32x32, k_proj v_proj 16x32
        """,
        target_modules=[*ATTENTION, "in_proj", "out_proj", "gate_proj", "up_proj", "down_proj"],
        refused=one_parameter("model.layers.1.feed_forward.experts", "gate_up_proj"),
        note=ONE_PARAMETER,
    ),
    "dbrx": Architecture(
        t.DbrxForCausalLM,
        {
            **{"d_model": 32, "n_heads": 4, "n_layers": 1, "max_seq_len": 32, "vocab_size": VOCABULARY},
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
            "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 3, "moe_top_k": 1},
        },
        CAUSAL,
        refused=one_parameter("transformer.blocks.0.ffn.experts.mlp", "w1"),
        note="the matrices of all experts lie one below the other in one parameter, which no layer holds",
    ),
    "switch_transformers": Architecture(
        t.SwitchTransformersForConditionalGeneration,
        SPECIAL
        | {
            **{"vocab_size": VOCABULARY, "d_model": 18, "d_kv": 8, "d_ff": 22, "num_layers": 1, "num_heads": 3},
            **{"num_decoder_layers": 1, "num_experts": 2, "num_sparse_encoder_layers": 1},
            **{"num_sparse_decoder_layers": 1, "decoder_start_token_id": 0},
        },
        SEQ2SEQ,
        """
        encoder.block.0.layer.0.SelfAttention: q k v 24x18, o 18x24
        encoder.block.0.layer.1.mlp.experts.expert_{2}: wi 22x18, wo 18x22
        decoder.block.0.layer.0.SelfAttention: q k v 24x18, o 18x24
        decoder.block.0.layer.1.EncDecAttention: q k v 24x18, o 18x24
        decoder.block.0.layer.2.mlp.experts.expert_{2}: wi 22x18, wo 18x22
        """,
        tied=True,
        idle=".experts.",
        note="each expert is a layer of its own; the router stays dense",
    ),
    "nllb_moe": Architecture(
        t.NllbMoeForConditionalGeneration,
        SPECIAL
        | {
            **{"vocab_size": VOCABULARY, "d_model": 18, "encoder_layers": 1, "decoder_layers": 1},
            **{"encoder_attention_heads": 3, "decoder_attention_heads": 3, "encoder_ffn_dim": 22},
            **{"decoder_ffn_dim": 25, "max_position_embeddings": 32, "num_experts": 2, "encoder_sparse_step": 1},
            **{"decoder_sparse_step": 0, "decoder_start_token_id": 0, "encoder_layerdrop": 0.0},
        },
        SEQ2SEQ,
        """
        model.encoder.layers.0.self_attn: q_proj k_proj v_proj out_proj 18x18
        model.encoder.layers.0.ffn.experts.expert_{2}: fc1 22x18, fc2 18x22
        model.decoder.layers.0.self_attn: q_proj k_proj v_proj out_proj 18x18
        model.decoder.layers.0.cross_attention: q_proj k_proj v_proj out_proj 18x18
        model.decoder.layers.0.ffn: fc1 25x18, fc2 18x25
        """,
        tied=True,
        idle=".experts.",
        note="each expert is a layer of its own; the router stays dense",
    ),
}
