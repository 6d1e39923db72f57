"""Sizes of pocket-llava: one place, read by the trainers and by the checkpoint writer."""

from __future__ import annotations

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

VISION = dict(
    hidden_size=192,
    intermediate_size=768,
    num_hidden_layers=6,
    num_attention_heads=6,
    image_size=336,
    patch_size=14,
    projection_dim=192,
    hidden_act="gelu",
)
LANGUAGE = dict(
    hidden_size=160,
    intermediate_size=432,
    num_hidden_layers=12,
    num_attention_heads=5,
    num_key_value_heads=5,
    max_position_embeddings=2048,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
)
FEATURE_LAYER = -2


def vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(**VISION)


def llava_config(vocab_size: int, image_token_id: int, bos: int, eos: int, pad: int) -> LlavaConfig:
    text = LlamaConfig(
        **LANGUAGE, vocab_size=vocab_size, bos_token_id=bos, eos_token_id=eos, pad_token_id=pad
    )
    return LlavaConfig(
        vision_config=vision_config(),
        text_config=text,
        image_token_index=image_token_id,
        vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        image_seq_length=(VISION["image_size"] // VISION["patch_size"]) ** 2,
        tie_word_embeddings=False,
    )
