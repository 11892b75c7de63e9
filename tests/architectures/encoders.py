"""Encoders with heads of several kinds, and encoder-decoders."""

import transformers as t
from architecture import Architecture
from decoders import SPECIAL
from tasks import MASKED, QUESTIONS, REPLACED, SEQ2SEQ, SEQUENCES, TOKENS
from tiny import VOCABULARY

TEXT = {
    **{"vocab_size": VOCABULARY, "hidden_size": 18, "intermediate_size": 22, "num_hidden_layers": 2},
    **{"num_attention_heads": 3, "max_position_embeddings": 32, "pad_token_id": 2},
}
RELATIVE = TEXT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0}


def bert_layers(prefix: str) -> str:
    return f"""
    {prefix}.encoder.layer.{{2}}.attention.self: query key value 18x18
    {prefix}.encoder.layer.{{2}}.attention.output: dense 18x18
    {prefix}.encoder.layer.{{2}}.intermediate: dense 22x18
    {prefix}.encoder.layer.{{2}}.output: dense 18x22
    """


ENCODERS = {
    "bert, masked": Architecture(t.BertForMaskedLM, TEXT, MASKED, bert_layers("bert"), tied=True),
    "bert, questions": Architecture(t.BertForQuestionAnswering, TEXT, QUESTIONS, bert_layers("bert")),
    "roberta, sequences": Architecture(
        t.RobertaForSequenceClassification, TEXT | {"num_labels": 3}, SEQUENCES, bert_layers("roberta")
    ),
    "electra, replaced tokens": Architecture(
        t.ElectraForPreTraining, TEXT | {"embedding_size": 9}, REPLACED, bert_layers("electra")
    ),
    "deberta, tokens": Architecture(
        t.DebertaForTokenClassification,
        RELATIVE | {"num_labels": 3},
        TOKENS,
        """
        deberta.encoder.layer.{2}.attention.self: in_proj 54x18, pos_proj pos_q_proj 18x18
        deberta.encoder.layer.{2}.attention.output: dense 18x18
        deberta.encoder.layer.{2}.intermediate: dense 22x18
        deberta.encoder.layer.{2}.output: dense 18x22
        """,
    ),
    "deberta_v2, tokens": Architecture(
        t.DebertaV2ForTokenClassification,
        RELATIVE | {"num_labels": 3},
        TOKENS,
        """
        deberta.encoder.layer.{2}.attention.self: query_proj key_proj value_proj pos_key_proj pos_query_proj 18x18
        deberta.encoder.layer.{2}.attention.output: dense 18x18
        deberta.encoder.layer.{2}.intermediate: dense 22x18
        deberta.encoder.layer.{2}.output: dense 18x22
        """,
    ),
    "modernbert, masked": Architecture(
        t.ModernBertForMaskedLM,
        TEXT
        | SPECIAL
        | {"hidden_size": 20, "num_attention_heads": 2, "cls_token_id": 0, "sep_token_id": 1, "local_attention": 8},
        MASKED,
        """
        model.layers.{2}.attn: Wqkv 60x20, Wo 20x20
        model.layers.{2}.mlp: Wi 44x20, Wo 20x22
        """,
        tied=True,
    ),
    "distilbert, questions": Architecture(
        t.DistilBertForQuestionAnswering,
        {**TEXT, "dim": 18, "hidden_dim": 22, "n_layers": 2, "n_heads": 3},
        QUESTIONS,
        """
        distilbert.transformer.layer.{2}.attention: q_lin k_lin v_lin out_lin 18x18
        distilbert.transformer.layer.{2}.ffn: lin1 22x18, lin2 18x22
        """,
    ),
    "albert, masked": Architecture(
        t.AlbertForMaskedLM,
        TEXT | {"embedding_size": 9},
        MASKED,
        """
        albert.encoder.albert_layer_groups.0.albert_layers.0.attention: query key value dense 18x18
        albert.encoder.albert_layer_groups.0.albert_layers.0: ffn 22x18, ffn_output 18x22
        """,
        tied=True,
        note="one block that runs several times",
    ),
    "longformer, masked": Architecture(
        t.LongformerForMaskedLM,
        TEXT | {"attention_window": 4},
        MASKED,
        bert_layers("longformer")
        + "longformer.encoder.layer.{2}.attention.self: query_global key_global value_global 18x18",
        tied=True,
        idle="_global",
        note="the layers of global attention are sparse too, and learn nothing where no token is global",
    ),
    "mobilebert, tokens": Architecture(
        t.MobileBertForTokenClassification,
        TEXT
        | {
            **{"hidden_size": 32, "embedding_size": 18, "intra_bottleneck_size": 20, "num_attention_heads": 4},
            **{"num_feedforward_networks": 2, "num_labels": 3},
        },
        TOKENS,
        """
        mobilebert.encoder.layer.{2}.bottleneck.input: dense 20x32
        mobilebert.encoder.layer.{2}.bottleneck.attention: dense 20x32
        mobilebert.encoder.layer.{2}.attention.self: query key 20x20, value 20x32
        mobilebert.encoder.layer.{2}.attention.output: dense 20x20
        mobilebert.encoder.layer.{2}.ffn.0.intermediate: dense 22x20
        mobilebert.encoder.layer.{2}.ffn.0.output: dense 20x22
        mobilebert.encoder.layer.{2}.intermediate: dense 22x20
        mobilebert.encoder.layer.{2}.output: dense 20x22
        mobilebert.encoder.layer.{2}.output.bottleneck: dense 32x20
        """,
    ),
    "ibert, masked": Architecture(
        t.IBertForMaskedLM,
        TEXT,
        MASKED,
        refused="has no linear layers inside a list of blocks",
        note="its blocks hold quantized layers of its own",
    ),
    "squeezebert, masked": Architecture(
        t.SqueezeBertForMaskedLM,
        TEXT | {"hidden_size": 24, "embedding_size": 24, "intermediate_size": 32, "num_attention_heads": 4},
        MASKED,
        refused="has no linear layers inside a list of blocks",
        note="its blocks hold convolutions, and no linear layers",
    ),
    "convbert, masked": Architecture(
        t.ConvBertForMaskedLM,
        TEXT | {"embedding_size": 18, "num_groups": 2, "head_ratio": 1},
        MASKED,
        refused=r"intermediate.dense is a GroupedLinearLayer, whose parameter weight .* holds several matrices",
        note="the matrices of all groups lie in one parameter of three dimensions, which no linear layer holds",
    ),
    "funnel, masked": Architecture(
        t.FunnelForMaskedLM,
        {"vocab_size": VOCABULARY, "d_model": 18, "n_head": 3, "d_head": 6, "d_inner": 22, "block_sizes": [1, 1]},
        MASKED,
        refused=r"attention is a FunnelRelMultiheadAttention, whose parameter r_kernel .* holds several matrices",
        note="the matrices of all heads lie in one parameter of three dimensions, which no layer holds",
    ),
    "xlnet, sequences": Architecture(
        t.XLNetForSequenceClassification,
        {"vocab_size": VOCABULARY, "d_model": 18, "n_layer": 2, "n_head": 3, "d_inner": 22, "num_labels": 3},
        SEQUENCES,
        """
        transformer.layer.{2}.ff: layer_1 22x18, layer_2 18x22
        """,
        target_modules=["layer_1", "layer_2"],
        refused=r"transformer.layer.0.rel_attn is a XLNetRelativeAttention, whose parameter q .* holds several",
        note="the matrices of all heads lie in one parameter of three dimensions, which no layer holds",
    ),
}

BART = SPECIAL | {
    **{"vocab_size": VOCABULARY, "d_model": 18, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 21},
    **{"decoder_ffn_dim": 25, "encoder_attention_heads": 3, "decoder_attention_heads": 3},
    **{"max_position_embeddings": 32, "pad_token_id": 0, "decoder_start_token_id": 0, "forced_eos_token_id": 1},
}
BART_LAYERS = """
    model.encoder.layers.0.self_attn: q_proj k_proj v_proj out_proj 18x18
    model.encoder.layers.0: fc1 21x18, fc2 18x21
    model.decoder.layers.{2}.self_attn: q_proj k_proj v_proj out_proj 18x18
    model.decoder.layers.{2}.encoder_attn: q_proj k_proj v_proj out_proj 18x18
    model.decoder.layers.{2}: fc1 25x18, fc2 18x25
"""

ENCODER_DECODERS = {
    "t5": Architecture(
        t.T5ForConditionalGeneration,
        {
            **{"vocab_size": VOCABULARY, "d_model": 18, "d_kv": 8, "d_ff": 22, "num_layers": 2, "num_heads": 3},
            **{"num_decoder_layers": 1, "decoder_start_token_id": 0},
        },
        SEQ2SEQ,
        """
        encoder.block.{2}.layer.0.SelfAttention: q k v 24x18, o 18x24
        encoder.block.{2}.layer.1.DenseReluDense: wi 22x18, wo 18x22
        decoder.block.0.layer.0.SelfAttention: q k v 24x18, o 18x24
        decoder.block.0.layer.1.EncDecAttention: q k v 24x18, o 18x24
        decoder.block.0.layer.2.DenseReluDense: wi 22x18, wo 18x22
        """,
        tied=True,
    ),
    "bart": Architecture(t.BartForConditionalGeneration, BART, SEQ2SEQ, BART_LAYERS, tied=True),
    "marian": Architecture(t.MarianMTModel, BART, SEQ2SEQ, BART_LAYERS, tied=True),
    "pegasus": Architecture(t.PegasusForConditionalGeneration, BART, SEQ2SEQ, BART_LAYERS, tied=True),
    "mbart, questions": Architecture(t.MBartForQuestionAnswering, BART, QUESTIONS, BART_LAYERS, tied=True),
}
