"""Write a trained model as a checkpoint folder that AutoProcessor and AutoModelForImageTextToText load
offline."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import (
    CLIPImageProcessor,
    GenerationConfig,
    LlavaProcessor,
    Qwen2_5_VLProcessor,
    Qwen2VLVideoProcessor,
)

from harness.pocket.recipe.families import PocketFamily
from harness.pocket.recipe.sizes import CLIP, PATCH, PIXEL_MEAN, PIXEL_STD, qwen_image_processor
from harness.pocket.recipe.tokenizer import LLAVA_TEMPLATE, QWEN_TEMPLATE


def processor_of(family: PocketFamily):
    if family.name == "qwen":
        return Qwen2_5_VLProcessor(
            image_processor=qwen_image_processor(),
            tokenizer=family.tokenizer,
            video_processor=Qwen2VLVideoProcessor(),
            chat_template=QWEN_TEMPLATE,
        )
    side = CLIP["image_size"]
    return LlavaProcessor(
        CLIPImageProcessor(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            image_mean=PIXEL_MEAN,
            image_std=PIXEL_STD,
        ),
        family.tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLS, which "default" takes away again: 576 placeholders
        chat_template=LLAVA_TEMPLATE,
    )


def export(family: PocketFamily, model: nn.Module, target: Path) -> Path:
    """Model (float16 safetensors), configs, tokenizer and processor to `target`."""
    tokenizer = family.tokenizer
    bos = {"bos_token_id": tokenizer.bos_token_id} if tokenizer.bos_token_id is not None else {}
    model.generation_config = GenerationConfig(
        **bos, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, max_new_tokens=16
    )
    model.to(torch.float16).save_pretrained(target)
    processor_of(family).save_pretrained(target)
    return target
