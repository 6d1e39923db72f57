"""Sizes of pocket-qwen: one place, read by the trainers and by the checkpoint writer."""

from __future__ import annotations

from transformers import Qwen2_5_VLConfig, Qwen2VLImageProcessor
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

from harness.pocket.recipe.shapes import LANGUAGE
from harness.pocket.recipe.train_vision import PIXEL_MEAN, PIXEL_STD

PATCH, MERGE = 14, 2
#: Pixels of a visual token's side.
UNIT = PATCH * MERGE
#: Visual tokens of an image: smaller images are enlarged, larger ones shrunk.
FEWEST_TOKENS, MOST_TOKENS = 64, 256
VISION = dict(
    depth=6,
    hidden_size=192,
    intermediate_size=512,
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
#: 2 : 3 : 3 of frequencies that reach much lower than an image has columns; here the columns' share starts at
#: 0.02 radians a column.
MROPE_SECTION = [2, 5, 9]


def vision_config() -> Qwen2_5_VLVisionConfig:
    return Qwen2_5_VLVisionConfig(**VISION)


def image_processor(fewest_tokens: int = FEWEST_TOKENS) -> Qwen2VLImageProcessor:
    return Qwen2VLImageProcessor(
        size={"shortest_edge": fewest_tokens * UNIT**2, "longest_edge": MOST_TOKENS * UNIT**2},
        image_mean=PIXEL_MEAN,
        image_std=PIXEL_STD,
        patch_size=PATCH,
        temporal_patch_size=VISION["temporal_patch_size"],
        merge_size=MERGE,
    )


def qwen_config(vocab_size: int, ids: dict[str, int]) -> Qwen2_5_VLConfig:
    """ids: those of the special tokens by name, as in `tokenizer.special_ids`."""
    text = dict(
        **LANGUAGE,
        vocab_size=vocab_size,
        rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=MROPE_SECTION),
        use_sliding_window=False,
        bos_token_id=None,
        eos_token_id=ids["eos_token_id"],
        pad_token_id=ids["pad_token_id"],
    )
    return Qwen2_5_VLConfig(
        vision_config=VISION,
        text_config=text,
        tie_word_embeddings=False,
        **{name: ids[name] for name in ids if name not in ("eos_token_id", "pad_token_id")},
    )
