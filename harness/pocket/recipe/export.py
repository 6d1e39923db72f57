"""Assemble the trained parts into a checkpoint folder that AutoProcessor / AutoModelForImageTextToText load
offline.

python -m harness.pocket.recipe.export
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import CLIPImageProcessor, GenerationConfig, LlavaProcessor

import backbones
from harness.pocket.recipe.shapes import VISION
from harness.pocket.recipe.tokenizer import CHAT_TEMPLATE, build_tokenizer
from harness.pocket.recipe.train_language import build_model
from harness.pocket.recipe.train_vision import PIXEL_MEAN, PIXEL_STD

CHECKPOINT = Path(backbones.__file__).parent / "pocket" / "checkpoints" / "pocket-llava"


def export(build: Path, target: Path) -> Path:
    """Write model (float16 safetensors), configs, tokenizer and processor to `target`.

    Args:
        build: folder with `vision/tower.safetensors` and `language/{projector,language,head}.safetensors`.
    """
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, build / "vision" / "tower.safetensors")
    parts = {
        "projector": model.model.multi_modal_projector,
        "language": model.model.language_model,
        "head": model.lm_head,
    }
    for name, module in parts.items():
        module.load_state_dict(load_file(build / "language" / f"{name}.safetensors"))
    size = VISION["image_size"]
    processor = LlavaProcessor(
        CLIPImageProcessor(
            size={"shortest_edge": size},
            crop_size={"height": size, "width": size},
            image_mean=PIXEL_MEAN,
            image_std=PIXEL_STD,
        ),
        tokenizer,
        patch_size=VISION["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLS, which "default" takes away again: 576 placeholders
        chat_template=CHAT_TEMPLATE,
    )
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=16,
    )
    model.to(torch.float16).save_pretrained(target)
    processor.save_pretrained(target)
    return target


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, default=Path("build/pocket"))
    parser.add_argument("--target", type=Path, default=CHECKPOINT)
    arguments = parser.parse_args()
    print(export(arguments.build, arguments.target))
