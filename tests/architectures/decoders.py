"""Decoders: language models of attention, and of states that are carried from token to token."""

import transformers as t
from architecture import Architecture
from tasks import CAUSAL, SEQUENCES, TOKENS
from tiny import VOCABULARY

SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
# four query heads of 8 on two pairs of key and value heads
GROUPED = SPECIAL | {
    "vocab_size": VOCABULARY,
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
}
UNGROUPED = GROUPED | {"num_key_value_heads": 4}
# where the size of a head is no setting
EVEN = GROUPED | {"hidden_size": 32}
EVEN.pop("head_dim")
GPT2 = SPECIAL | {
    **{"vocab_size": VOCABULARY, "n_embd": 18, "n_inner": 22, "n_layer": 2, "n_head": 3, "n_positions": 32}
}

MLP = "gate_proj up_proj 28x20, down_proj 20x28"
LLAMA_GROUPED = f"""
    model.layers.{{2}}.self_attn: q_proj 32x20, k_proj v_proj 16x20, o_proj 20x32
    model.layers.{{2}}.mlp: {MLP}
"""
LLAMA = f"""
    model.layers.{{2}}.self_attn: q_proj k_proj v_proj 32x20, o_proj 20x32
    model.layers.{{2}}.mlp: {MLP}
"""
LLAMA_EVEN = """
    model.layers.{2}.self_attn: q_proj o_proj 32x32, k_proj v_proj 16x32
    model.layers.{2}.mlp: gate_proj up_proj 28x32, down_proj 32x28
"""
GPT2_LAYERS = """
    transformer.h.{2}.attn: c_attn 54x18, c_proj 18x18
    transformer.h.{2}.mlp: c_fc 22x18, c_proj 18x22
"""

DECODERS = {
    "llama": Architecture(t.LlamaForCausalLM, UNGROUPED, CAUSAL, LLAMA),
    "llama_grouped": Architecture(
        t.LlamaForCausalLM,
        GROUPED | {"tie_word_embeddings": True},
        CAUSAL,
        LLAMA_GROUPED,
        tied=True,
        note="grouped queries, tied embeddings",
    ),
    "llama, sequences": Architecture(t.LlamaForSequenceClassification, UNGROUPED | {"num_labels": 3}, SEQUENCES, LLAMA),
    "mistral": Architecture(t.MistralForCausalLM, GROUPED, CAUSAL, LLAMA_GROUPED),
    "qwen2": Architecture(t.Qwen2ForCausalLM, EVEN, CAUSAL, LLAMA_EVEN),
    "qwen3": Architecture(t.Qwen3ForCausalLM, GROUPED, CAUSAL, LLAMA_GROUPED),
    "gemma2": Architecture(t.Gemma2ForCausalLM, GROUPED | {"sliding_window": 8}, CAUSAL, LLAMA_GROUPED, tied=True),
    "gemma3_text": Architecture(t.Gemma3ForCausalLM, GROUPED | {"sliding_window": 8}, CAUSAL, LLAMA_GROUPED, tied=True),
    "olmo2": Architecture(t.Olmo2ForCausalLM, EVEN, CAUSAL, LLAMA_EVEN),
    "cohere": Architecture(t.CohereForCausalLM, EVEN, CAUSAL, LLAMA_EVEN, tied=True),
    "stablelm": Architecture(t.StableLmForCausalLM, EVEN, CAUSAL, LLAMA_EVEN),
    "smollm3": Architecture(t.SmolLM3ForCausalLM, EVEN, CAUSAL, LLAMA_EVEN, tied=True),
    "granite": Architecture(t.GraniteForCausalLM, EVEN, CAUSAL, LLAMA_EVEN),
    "phi": Architecture(
        t.PhiForCausalLM,
        EVEN,
        CAUSAL,
        """
        model.layers.{2}.self_attn: q_proj dense 32x32, k_proj v_proj 16x32
        model.layers.{2}.mlp: fc1 28x32, fc2 32x28
        """,
    ),
    "phi3": Architecture(
        t.Phi3ForCausalLM,
        GROUPED,
        CAUSAL,
        """
        model.layers.{2}.self_attn: qkv_proj 64x20, o_proj 20x32
        model.layers.{2}.mlp: gate_up_proj 56x20, down_proj 20x28
        """,
    ),
    "gpt_neox": Architecture(
        t.GPTNeoXForCausalLM,
        EVEN,
        CAUSAL,
        """
        gpt_neox.layers.{2}.attention: query_key_value 96x32, dense 32x32
        gpt_neox.layers.{2}.mlp: dense_h_to_4h 28x32, dense_4h_to_h 32x28
        """,
    ),
    "gpt2": Architecture(
        t.GPT2LMHeadModel, GPT2, CAUSAL, GPT2_LAYERS, tied=True, note="`Conv1D` layers, whose weights lie as (in, out)"
    ),
    "gpt2, tokens": Architecture(t.GPT2ForTokenClassification, GPT2 | {"num_labels": 3}, TOKENS, GPT2_LAYERS),
    "opt": Architecture(
        t.OPTForCausalLM,
        GROUPED | {"word_embed_proj_dim": 20, "ffn_dim": 28},
        CAUSAL,
        """
        model.decoder.layers.{2}.self_attn: q_proj k_proj v_proj out_proj 20x20
        model.decoder.layers.{2}: fc1 28x20, fc2 20x28
        """,
        tied=True,
    ),
    "bloom": Architecture(
        t.BloomForCausalLM,
        EVEN | {"n_layer": 2, "n_head": 4},
        CAUSAL,
        """
        transformer.h.{2}.self_attention: query_key_value 96x32, dense 32x32
        transformer.h.{2}.mlp: dense_h_to_4h 128x32, dense_4h_to_h 32x128
        """,
        tied=True,
    ),
    "falcon": Architecture(
        t.FalconForCausalLM,
        EVEN | {"ffn_hidden_size": 28},
        CAUSAL,
        """
        transformer.h.{2}.self_attention: query_key_value 48x32, dense 32x32
        transformer.h.{2}.mlp: dense_h_to_4h 28x32, dense_4h_to_h 32x28
        """,
        tied=True,
        note="a linear layer of its own, tried out before it is taken for one",
    ),
    "gpt_bigcode": Architecture(
        t.GPTBigCodeForCausalLM,
        GPT2 | {"n_embd": 24},
        CAUSAL,
        """
        transformer.h.{2}.attn: c_attn 40x24, c_proj 24x24
        transformer.h.{2}.mlp: c_fc 22x24, c_proj 24x22
        """,
        tied=True,
        note="one key and value for all heads",
    ),
    "ctrl": Architecture(
        t.CTRLLMHeadModel,
        GPT2 | {"dff": 22},
        CAUSAL,
        """
        transformer.h.{2}.multi_head_attention: Wq Wk Wv dense 18x18
        transformer.h.{2}.ffn: 0 22x18, 2 18x22
        """,
        tied=True,
    ),
    "gemma3n": Architecture(
        t.Gemma3nForCausalLM,
        GROUPED
        | {
            **{"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCABULARY, "laurel_rank": 16},
            **{"altup_num_inputs": 4, "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0]},
            **{"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, "hidden_size": 68},
        },
        CAUSAL,
        """
        model.layers.{2}.self_attn: q_proj 32x68, k_proj v_proj 16x68, o_proj 68x32
        model.layers.{2}.mlp: gate_proj up_proj 28x68, down_proj 68x28
        model.layers.{2}.laurel: linear_left 16x68, linear_right 68x16
        model.layers.{2}: per_layer_projection 68x16
        """,
        tied=True,
        idle="per_layer_projection",  # what it takes in is 0 at the first step
        note="routers, gates and the small layers that mix its streams stay dense",
    ),
    "mpt": Architecture(
        t.MptForCausalLM,
        {"vocab_size": VOCABULARY, "d_model": 16, "n_heads": 2, "n_layers": 2, "expansion_ratio": 3},
        CAUSAL,
        """
        transformer.blocks.{2}.attn: Wqkv 48x16, out_proj 16x16
        transformer.blocks.{2}.ffn: up_proj 64x16, down_proj 16x64
        """,
        tied=True,
    ),
}

MAMBA_NOTE = "`x_proj` and `dt_proj`, which set the step of the states, stay dense"
MAMBA = EVEN | {"state_size": 4, "time_step_rank": 16, "intermediate_size": 36}

STATES = {
    "mamba": Architecture(
        t.MambaForCausalLM,
        MAMBA,
        CAUSAL,
        "backbone.layers.{2}.mixer: in_proj 72x32, out_proj 32x36",
        tied=True,
        note=MAMBA_NOTE,
    ),
    "mamba, all layers": Architecture(
        t.MambaForCausalLM,
        MAMBA,
        CAUSAL,
        "backbone.layers.{2}.mixer: in_proj 72x32, x_proj 24x36, dt_proj 36x16, out_proj 32x36",
        tied=True,
        target_modules=["in_proj", "x_proj", "dt_proj", "out_proj"],
        note="all its layers, by `target_modules`; it multiplies with the weight of `dt_proj` itself",
    ),
    "falcon_mamba": Architecture(
        t.FalconMambaForCausalLM,
        MAMBA,
        CAUSAL,
        "backbone.layers.{2}.mixer: in_proj 72x32, out_proj 32x36",
        tied=True,
        note=MAMBA_NOTE,
    ),
    "rwkv": Architecture(
        t.RwkvForCausalLM,
        {
            **{"vocab_size": VOCABULARY, "hidden_size": 20, "attention_hidden_size": 24, "intermediate_size": 28},
            **{"num_hidden_layers": 2, "context_length": 32},
        },
        CAUSAL,
        """
        rwkv.blocks.{2}.attention: key value receptance 24x20, output 20x24
        rwkv.blocks.{2}.feed_forward: key 28x20, receptance 20x20, value 20x28
        """,
    ),
    "qwen3_next": Architecture(
        t.Qwen3NextForCausalLM,
        GROUPED
        | {
            **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8},
            **{"linear_value_head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1, "mlp_only_layers": [0, 1]},
            **{"layer_types": ["linear_attention", "full_attention"]},
        },
        CAUSAL,
        """
        model.layers.0.linear_attn: in_proj_qkvz 96x20, out_proj 20x32
        model.layers.1.self_attn: q_proj 64x20, k_proj v_proj 16x20, o_proj 20x32
        model.layers.{2}.mlp: gate_proj up_proj 28x20, down_proj 20x28
        """,
        note="linear attention, whose `in_proj_ba` sets decay and rate and stays dense; without experts",
    ),
    "recurrent_gemma": Architecture(
        t.RecurrentGemmaForCausalLM,
        GROUPED | {"hidden_size": 32, "lru_width": 32, "num_hidden_layers": 3, "attention_window_size": 8},
        CAUSAL,
        """
        model.layers.{2}.temporal_block: linear_x linear_y linear_out 32x32
        model.layers.2.temporal_block: q_proj o_proj 32x32, k_proj v_proj 16x32
        model.layers.{3}.mlp_block: gate_proj up_proj 14x32, down_proj 32x14
        """,
        tied=True,
        target_modules=[r".*\.linear_[a-z]+", r".*_proj"],
        refused=r"rg_lru is a RecurrentGemmaRglru, whose parameter input_gate_weight .* holds several matrices",
        note="the gates of its recurrence are matrices of all heads in one parameter, which no layer holds",
    ),
    # in_proj: a gate, the states' inputs and 2 groups of 4 + 4, and a step size for each of 8 heads
    "mamba2": Architecture(
        t.Mamba2ForCausalLM,
        EVEN | {"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2, "chunk_size": 8},
        CAUSAL,
        "backbone.layers.{2}.mixer: in_proj 144x32, out_proj 32x64",
    ),
    "bamba": Architecture(
        t.BambaForCausalLM,
        EVEN
        | {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_chunk_size": 8, "attn_layer_indices": [1]},
        CAUSAL,
        """
        model.layers.0.mamba: in_proj 144x32, out_proj 32x64
        model.layers.1.self_attn: q_proj o_proj 32x32, k_proj v_proj 16x32
        model.layers.{2}.feed_forward: gate_proj up_proj 28x32, down_proj 32x28
        """,
        note="states and attention",
    ),
    "lfm2": Architecture(
        t.Lfm2ForCausalLM,
        EVEN | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        CAUSAL,
        """
        model.layers.0.conv: in_proj 96x32, out_proj 32x32
        model.layers.1.self_attn: q_proj out_proj 32x32, k_proj v_proj 16x32
        model.layers.{2}.feed_forward: w1 w3 28x32, w2 32x28
        """,
        tied=True,
        note="convolutions, which stay dense, and attention",
    ),
}
