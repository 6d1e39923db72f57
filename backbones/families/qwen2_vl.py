"""Qwen2-VL: Qwen2VLForConditionalGeneration. As Qwen2.5-VL, but for its tower: every block sees the whole
image, so there are no windows and no order of its own; LayerNorm; a feed-forward part of two linear maps.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from backbones.families.family import NARROW_WIDTH, KnownCheckpoint, TinyParts
from backbones.families.qwen2_5_vl import QwenAdapter, QwenVL
from backbones.families.tiny import qwen as tiny_qwen


class Qwen2VL(QwenVL):
    model_type = "qwen2_vl"
    title = "Qwen2-VL"
    checkpoints: ClassVar = {
        "qwen2-vl-2b": KnownCheckpoint("Qwen/Qwen2-VL-2B-Instruct", 2.21e9),
        "qwen2-vl-7b": KnownCheckpoint("Qwen/Qwen2-VL-7B-Instruct", 8.29e9),
    }

    def adapter(self, model: nn.Module) -> Qwen2VLAdapter:
        return Qwen2VLAdapter(self, model)

    def tiny(self) -> TinyParts:
        return TinyParts(tiny_qwen.make_tokenizer, make_model, make_processor, tiny_qwen.to_hub_layout)

    # `hidden_size` of this tower's configuration is the language model's width, `embed_dim` its own

    def tower_width(self, vision) -> int:
        return vision.embed_dim

    def feature_width(self, vision) -> int:
        return vision.hidden_size

    def feed_forward(self, vision) -> int:
        return 2 * int(vision.mlp_ratio * vision.embed_dim)

    def narrow_tower(self) -> dict:
        return {"embed_dim": NARROW_WIDTH, "mlp_ratio": 2, "num_heads": 2, "hidden_size": NARROW_WIDTH}


class Qwen2VLAdapter(QwenAdapter):
    """Raises UserError if the model's decoder has sliding-window layers."""

    def tower_order(self, shapes: Tensor) -> Tensor:
        return torch.arange(int(shapes.prod(1).sum()) // self._merge**2)


def make_model(tokenizer, seed: int = 0):
    """A random Qwen2VLForConditionalGeneration with a tower of 3 blocks."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = dict(depth=3, embed_dim=32, hidden_size=64, mlp_ratio=2, num_heads=2)
    config = Qwen2VLConfig(vision_config=vision, **tiny_qwen.language(tokenizer))
    return tiny_qwen.with_random_weights(Qwen2VLForConditionalGeneration(config), seed)


def make_processor(tokenizer):
    """Scales images as the tiny Qwen2.5-VL's does."""
    return tiny_qwen.make_processor(tokenizer, "Qwen2VLProcessor")
