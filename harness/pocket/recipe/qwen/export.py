"""Assemble pocket-qwen's trained parts into a checkpoint folder that AutoProcessor and
AutoModelForImageTextToText load offline.

python -m harness.pocket.recipe.qwen.export
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import GenerationConfig, Qwen2_5_VLProcessor, Qwen2VLVideoProcessor

from harness.pocket.recipe.export import CHECKPOINT as POCKET_LLAVA
from harness.pocket.recipe.qwen.shapes import image_processor
from harness.pocket.recipe.qwen.tokenizer import CHAT_TEMPLATE, build_tokenizer
from harness.pocket.recipe.qwen.warm_start import build_model

CHECKPOINT = POCKET_LLAVA.parent / "pocket-qwen"


def export(build: Path, target: Path) -> Path:
    """Write model (float16 safetensors), configs, tokenizer and processor to `target`.

    Args:
        build: folder with `vision/tower.safetensors` and `language/{merger,language,head}.safetensors`.
    """
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, build / "vision" / "tower.safetensors")
    parts = {
        "merger": model.model.visual.merger,
        "language": model.model.language_model,
        "head": model.lm_head,
    }
    for name, module in parts.items():
        module.load_state_dict(load_file(build / "language" / f"{name}.safetensors"))
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, max_new_tokens=16
    )
    processor = Qwen2_5_VLProcessor(
        image_processor=image_processor(),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    )
    model.to(torch.float16).save_pretrained(target)
    processor.save_pretrained(target)
    return target


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, default=Path("build/pocket-qwen"))
    parser.add_argument("--target", type=Path, default=CHECKPOINT)
    arguments = parser.parse_args()
    print(export(arguments.build, arguments.target))
