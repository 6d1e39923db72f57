"""A model family of somebody else's, in one file: LLaVA with a SigLIP tower, which has no CLS token.

docs/backbones.md walks through it. `register()` makes it known to transformers and to this project.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

from backbones import families
from backbones.families import clip_taps
from backbones.families.family import (
    NARROW_WIDTH,
    NO_TOKENS,
    Adapter,
    Family,
    Images,
    Part,
    TinyParts,
    TracedLayer,
    narrow_text,
    with_sdpa,
)
from backbones.families.tiny import llava as tiny_llava
from methods.base import Signal


class SiglipLlavaConfig(LlavaConfig):
    model_type = "siglip_llava"


class SiglipLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    config: SiglipLlavaConfig
    config_class = SiglipLlavaConfig


# ---- what this project has to know


class SiglipLlava(Family):
    model_type = "siglip_llava"
    title = "SigLIP-LLaVA"
    has_cls = False
    signals = frozenset({"hidden", "queries", "keys", "values"})

    def adapter(self, model):
        return SiglipAdapter(self, model)

    def tiny(self):
        return TinyParts(tiny_llava.make_tokenizer, make_model, make_processor)

    def tower_macs(self, vision, height, width):
        d, m, p = vision.hidden_size, vision.intermediate_size, vision.patch_size
        n = (height // p) * (width // p)
        layer = n * (4 * d * d + 2 * d * m) + 2 * n * n * d
        return n * vision.num_channels * p * p * d + vision.num_hidden_layers * layer

    def projector_macs(self, config, tokens):
        d, text = config.vision_config.hidden_size, config.text_config.hidden_size
        return tokens * (d * text + text * text)

    def tower_parts(self, model, height, width):
        vision = model.config.vision_config
        p, d = vision.patch_size, vision.hidden_size
        n = (height // p) * (width // p)
        layer = with_sdpa(type(model.model.vision_tower.encoder.layers[0]), vision)
        hidden = torch.empty(1, n, d, device="meta")
        parts = [Part(TracedLayer(layer), (hidden,), vision.num_hidden_layers)]
        return parts, n * vision.num_channels * p * p * d

    def noise(self, vision, pixels, batch, generator):
        return {"pixel_values": torch.randn(batch, vision.num_channels, *pixels, generator=generator)}

    def narrow(self, body):
        widths = {"intermediate_size": 32, "num_attention_heads": 2, "hidden_size": NARROW_WIDTH}
        tower, text = {**body["vision_config"], **widths}, narrow_text(body["text_config"])
        return {**body, **NO_TOKENS, "vision_config": tower, "text_config": text, "image_token_index": 511}


class SiglipAdapter(Adapter):
    def __init__(self, family, model):
        super().__init__(family, model)
        vision = model.config.vision_config
        self.patch = vision.patch_size
        self.grid = (vision.image_size // self.patch,) * 2
        self.feature = Signal("hidden", model.config.vision_feature_layer)

    def images(self, arguments):
        pixels = arguments["pixel_values"]
        return Images(pixels, pixels.unbind(), [self.grid] * len(pixels))

    def see(self, images, which, grids, signals):
        pixels, size = images.tensor[list(which)], [self.patch * n for n in grids[0]]
        if list(pixels.shape[-2:]) != size:
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True)
        tower = self.inner.vision_tower
        with clip_taps.tapped(tower.encoder.layers, {self.feature, *signals}) as found:
            tower(pixels, interpolate_pos_encoding=grids[0] != self.grid)
        return [{signal: x[i] for signal, x in found.items()} for i in range(len(pixels))]


# ---- a tiny random model, for tests and `python -m backbones.random_checkpoint siglip-llava DIR`


def make_model(tokenizer):
    torch.manual_seed(0)
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=96,
        patch_size=16, vision_use_head=False,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=80, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    config = SiglipLlavaConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=36, vision_feature_layer=-2, vision_feature_select_strategy="full",
    )  # fmt: skip
    return SiglipLlavaForConditionalGeneration(config).eval()


def make_processor(tokenizer):
    return LlavaProcessor(
        image_processor=SiglipImageProcessor(size={"height": 96, "width": 96}), tokenizer=tokenizer,
        patch_size=16, vision_feature_select_strategy="full", num_additional_image_tokens=0,
        chat_template=tiny_llava.TEMPLATE,
    )  # fmt: skip


def register() -> Family:
    AutoConfig.register("siglip_llava", SiglipLlavaConfig, exist_ok=True)
    AutoModelForImageTextToText.register(
        SiglipLlavaConfig, SiglipLlavaForConditionalGeneration, exist_ok=True
    )
    return families.register(SiglipLlava())
