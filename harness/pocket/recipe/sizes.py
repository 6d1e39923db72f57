"""Sizes of both pocket backbones: one place, read by the trainer and by the checkpoint writer.

The language model has 24 thin layers, so that a method that cuts inside of it pays about what it pays in a
real one: FastV with K = 2 and 64 tokens behind has 107 of 576 on average over 24 layers, 96 over the 32 of
LLaVA-1.5-7B, and had 149 over the 12 of the first pocket-llava.
"""

from __future__ import annotations

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, Qwen2_5_VLConfig, Qwen2VLImageProcessor
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

PATCH, MERGE = 14, 2
#: Pixels of a side of Qwen's visual tokens.
UNIT = PATCH * MERGE
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
LANGUAGE = dict(
    hidden_size=128,
    intermediate_size=336,
    num_hidden_layers=24,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=2048,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
)
CLIP = dict(
    hidden_size=192,
    intermediate_size=768,
    num_hidden_layers=6,
    num_attention_heads=6,
    image_size=336,
    patch_size=PATCH,
    projection_dim=192,
    hidden_act="gelu",
)
#: The layer of the CLIP tower that LLaVA reads.
FEATURE_LAYER = -2
#: Visual tokens of an image of pocket-qwen: smaller images are enlarged, larger ones shrunk.
FEWEST_TOKENS, MOST_TOKENS = 64, 256
QWEN_VISION = dict(
    depth=6,
    hidden_size=192,
    intermediate_size=352,
    num_heads=6,
    patch_size=PATCH,
    spatial_merge_size=MERGE,
    temporal_patch_size=2,
    window_size=4 * UNIT,
    fullatt_block_indexes=[2, 5],
    out_hidden_size=LANGUAGE["hidden_size"],
    hidden_act="silu",
)
#: How many of the 16 frequencies turn with time, row and column, the highest first. Qwen2.5-VL-7B has them at
#: 2 : 3 : 3 of frequencies that reach much lower than an image has columns.
MROPE_SECTION = [2, 5, 9]


def clip_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(**CLIP)


def llava_config(vocab_size: int, ids: dict[str, int]) -> LlavaConfig:
    """ids: of the special tokens: image, bos, eos, pad."""
    text = LlamaConfig(
        **LANGUAGE,
        vocab_size=vocab_size,
        bos_token_id=ids["bos"],
        eos_token_id=ids["eos"],
        pad_token_id=ids["pad"],
    )
    return LlavaConfig(
        vision_config=clip_config(),
        text_config=text,
        image_token_index=ids["image"],
        vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        image_seq_length=(CLIP["image_size"] // PATCH) ** 2,
        tie_word_embeddings=False,
    )


def qwen_vision_config() -> Qwen2_5_VLVisionConfig:
    return Qwen2_5_VLVisionConfig(**QWEN_VISION)


def qwen_config(vocab_size: int, ids: dict[str, int]) -> Qwen2_5_VLConfig:
    """ids: of the special tokens by their names in the configuration, as `tokenizer.qwen_ids` has them."""
    text = dict(
        **LANGUAGE,
        vocab_size=vocab_size,
        rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=MROPE_SECTION),
        use_sliding_window=False,
        bos_token_id=None,
        eos_token_id=ids["eos_token_id"],
        pad_token_id=ids["pad_token_id"],
    )
    others = {name: i for name, i in ids.items() if name not in ("eos_token_id", "pad_token_id")}
    return Qwen2_5_VLConfig(vision_config=QWEN_VISION, text_config=text, tie_word_embeddings=False, **others)


def qwen_image_processor(fewest_tokens: int = FEWEST_TOKENS) -> Qwen2VLImageProcessor:
    return Qwen2VLImageProcessor(
        size={"shortest_edge": fewest_tokens * UNIT**2, "longest_edge": MOST_TOKENS * UNIT**2},
        image_mean=PIXEL_MEAN,
        image_std=PIXEL_STD,
        patch_size=PATCH,
        temporal_patch_size=QWEN_VISION["temporal_patch_size"],
        merge_size=MERGE,
    )
