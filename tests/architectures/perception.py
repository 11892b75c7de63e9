"""Vision, vision with text, and speech."""

import transformers as t
from architecture import Architecture
from decoders import GROUPED
from encoders import BART, BART_LAYERS, TEXT
from tasks import (
    CLASSES,
    IMAGE,
    IMAGE_AND_TEXT,
    IMAGES,
    PAIRS,
    SEGMENTS,
    SIDE,
    SPECTROGRAMS,
    SPEECH,
    SPEECH_TO_TEXT,
    VISUAL_QUESTIONS,
)
from tiny import VOCABULARY

VIT = {
    **{"hidden_size": 18, "intermediate_size": 22, "num_hidden_layers": 2, "num_attention_heads": 3},
    **{"image_size": SIDE, "patch_size": 8, "num_labels": CLASSES},
}


def vit_layers(prefix: str, hidden: int = 18, intermediate: int = 22) -> str:
    return f"""
    {prefix}.{{2}}.attention: q_proj k_proj v_proj o_proj {hidden}x{hidden}
    {prefix}.{{2}}.mlp: fc1 {intermediate}x{hidden}, fc2 {hidden}x{intermediate}
    """


def tower_layers(prefix: str) -> str:
    """Of CLIP and its like."""
    return f"""
    {prefix}.layers.{{2}}.self_attn: q_proj k_proj v_proj out_proj 18x18
    {prefix}.layers.{{2}}.mlp: fc1 22x18, fc2 18x22
    """


VISION = {
    "vit": Architecture(t.ViTForImageClassification, VIT, IMAGES, vit_layers("vit.layers")),
    "deit": Architecture(t.DeiTForImageClassification, VIT, IMAGES, vit_layers("deit.layers")),
    "beit": Architecture(t.BeitForImageClassification, VIT, IMAGES, vit_layers("beit.layers")),
    "dinov2": Architecture(
        t.Dinov2ForImageClassification, VIT | {"mlp_ratio": 2}, IMAGES, vit_layers("dinov2.encoder.layer", 18, 36)
    ),
    "swin": Architecture(
        t.SwinForImageClassification,
        {
            **{"image_size": SIDE, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4]},
            **{"window_size": 2, "mlp_ratio": 2, "num_labels": CLASSES},
        },
        IMAGES,
        """
        swin.encoder.layers.0.blocks.0.attention: q_proj k_proj v_proj o_proj 16x16
        swin.encoder.layers.0.blocks.0.mlp: fc1 32x16, fc2 16x32
        swin.encoder.layers.0.downsample: reduction 32x64
        swin.encoder.layers.1.blocks.0.attention: q_proj k_proj v_proj o_proj 32x32
        swin.encoder.layers.1.blocks.0.mlp: fc1 64x32, fc2 32x64
        """,
        note="`reduction` merges four patches into one",
    ),
    "convnext": Architecture(
        t.ConvNextForImageClassification,
        {
            **{"hidden_sizes": [16, 20], "depths": [1, 1], "num_stages": 2, "patch_size": 2, "image_size": SIDE},
            "num_labels": CLASSES,
        },
        IMAGES,
        """
        convnext.encoder.stages.0.layers.0: pwconv1 64x16, pwconv2 16x64
        convnext.encoder.stages.1.layers.0: pwconv1 80x20, pwconv2 20x80
        """,
    ),
    "resnet": Architecture(
        t.ResNetForImageClassification,
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": CLASSES},
        IMAGES,
        refused="has no linear layers inside a list of blocks",
        note="its blocks hold convolutions, and no linear layers",
    ),
    "segformer": Architecture(
        t.SegformerForSemanticSegmentation,
        {
            **{"num_encoder_blocks": 1, "depths": [2], "sr_ratios": [2], "hidden_sizes": [18], "patch_sizes": [3]},
            **{"strides": [2], "num_attention_heads": [3], "mlp_ratios": [2], "decoder_hidden_size": 16},
            "num_labels": CLASSES,
        },
        SEGMENTS,
        vit_layers("segformer.stages.0.blocks", 18, 36) + "decode_head.linear_projections.0: proj 16x18",
    ),
    "clip": Architecture(
        t.CLIPModel,
        {"text_config": TEXT, "vision_config": VIT, "projection_dim": 9},
        PAIRS,
        tower_layers("text_model.encoder"),
        note="the vision tower stays dense",
    ),
    "clip, both towers": Architecture(
        t.CLIPModel,
        {"text_config": TEXT, "vision_config": VIT, "projection_dim": 9},
        PAIRS,
        tower_layers("text_model.encoder") + tower_layers("vision_model.encoder"),
        target_modules=["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
        note="both towers, by `target_modules`",
    ),
    "vilt": Architecture(
        t.ViltForQuestionAnswering,
        TEXT | VIT,
        VISUAL_QUESTIONS,
        """
        vilt.encoder.layer.{2}.attention.attention: query key value 18x18
        vilt.encoder.layer.{2}.attention.output: dense 18x18
        vilt.encoder.layer.{2}.intermediate: dense 22x18
        vilt.encoder.layer.{2}.output: dense 18x22
        """,
    ),
    "llava": Architecture(
        t.LlavaForConditionalGeneration,
        {
            "text_config": GROUPED | {"model_type": "llama"},
            "vision_config": VIT | {"model_type": "clip_vision_model"},
            "image_token_index": IMAGE,
        },
        IMAGE_AND_TEXT,
        """
        model.language_model.layers.{2}.self_attn: q_proj 32x20, k_proj v_proj 16x20, o_proj 20x32
        model.language_model.layers.{2}.mlp: gate_proj up_proj 28x20, down_proj 20x28
        """,
        note="a CLIP tower, which stays dense, before a LLaMA",
    ),
    "siglip": Architecture(
        t.SiglipModel,
        {"text_config": TEXT, "vision_config": VIT},
        PAIRS,
        tower_layers("text_model.encoder"),
        note="the vision tower stays dense",
    ),
}

WAV2VEC2 = {
    **{"hidden_size": 16, "intermediate_size": 21, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"vocab_size": VOCABULARY, "pad_token_id": 0, "conv_dim": [8, 8], "conv_kernel": [10, 3], "conv_stride": [5, 2]},
    **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_length": 2, "layerdrop": 0.3},
}


def wav2vec2_layers(prefix: str) -> str:
    return f"""
    {prefix}.encoder.layers.{{2}}.attention: q_proj k_proj v_proj out_proj 16x16
    {prefix}.encoder.layers.{{2}}.feed_forward: intermediate_dense 21x16, output_dense 16x21
    """


LAYERDROP = "whole blocks are left out of a step at random"
WAVLM_NOTE = "its attention hands the weights of its layers to a function of torch; blocks are left out at random"
WAVLM_GATES = "wavlm.encoder.layers.{2}.attention: gru_rel_pos_linear 8x8"

SPEECH_MODELS = {
    "whisper": Architecture(
        t.WhisperForConditionalGeneration,
        BART
        | {
            **{"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16},
            **{"begin_suppress_tokens": None, "forced_eos_token_id": None},
        },
        SPEECH_TO_TEXT,
        BART_LAYERS,
        tied=True,
    ),
    "wav2vec2": Architecture(
        t.Wav2Vec2ForCTC, WAV2VEC2, SPEECH, wav2vec2_layers("wav2vec2"), idle=".layers.", note=LAYERDROP
    ),
    "hubert": Architecture(
        t.HubertForCTC, WAV2VEC2, SPEECH, wav2vec2_layers("hubert"), idle=".layers.", note=LAYERDROP
    ),
    "wavlm": Architecture(
        t.WavLMForCTC, WAV2VEC2, SPEECH, wav2vec2_layers("wavlm") + WAVLM_GATES, idle=".layers.", note=WAVLM_NOTE
    ),
    "audio_spectrogram_transformer": Architecture(
        t.ASTForAudioClassification,
        VIT | {"max_length": SIDE, "num_mel_bins": SIDE},
        SPECTROGRAMS,
        vit_layers("audio_spectrogram_transformer.layers"),
    ),
}
