"""LLaVA-1.5: LlavaForConditionalGeneration with CLIP, a two-layer projector and Llama."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.families import clip_taps
from backbones.families.family import (
    NARROW_WIDTH,
    NO_TOKENS,
    Adapter,
    Family,
    Grid,
    Images,
    KnownCheckpoint,
    Part,
    TinyParts,
    TracedLayer,
    narrow_text,
    with_sdpa,
)
from backbones.families.tiny import llava as tiny_llava
from methods.base import Signal
from methods.errors import UserError

#: LLaVA's own code (arXiv 2310.03744; conversation template vicuna_v1) puts this ahead of the first turn
SYSTEM_SENTENCE = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


class Llava(Family):
    model_type = "llava"
    title = "LLaVA-1.5"
    checkpoints: ClassVar = {
        "llava-1.5-7b": KnownCheckpoint("llava-hf/llava-1.5-7b-hf", 7.06e9),
        "llava-1.5-13b": KnownCheckpoint("llava-hf/llava-1.5-13b-hf", 13.35e9),
    }
    not_quantised = ("model.vision_tower", "model.multi_modal_projector", "lm_head")
    paper_columns = "all"  # Table 1, TextVQA both ways
    paper_checkpoint = "llava-1.5-7b"

    def adapter(self, model: nn.Module) -> LlavaAdapter:
        return LlavaAdapter(self, model)

    def tiny(self) -> TinyParts:
        return TinyParts(
            tiny_llava.make_tokenizer, tiny_llava.make_model, tiny_llava.make_processor,
            tiny_llava.to_hub_layout,
        )  # fmt: skip

    # ---- images and prompts

    def prepare(self, name: str, processor, options) -> dict[str, object]:
        super().prepare(name, processor, options)
        return original_inputs(processor) if options.llava_inputs == "original" else {}

    def published_inputs(self) -> dict[str, object]:
        return {"llava_inputs": "original"}

    def deviations(self, described: Mapping[str, object]) -> list[str]:
        found = []
        if described.get("image_padding") != "square":
            found.append("images are cropped, where LLaVA's own code pads them")
        if "system_sentence" not in described:
            found.append("prompt without LLaVA's system sentence")
        return found

    # ---- costs

    def tower_macs(self, vision, height: int, width: int) -> int:
        """Patch convolution, then per layer n(4d² + 2dm) + 2n²d with n = patches + CLS."""
        d, m, p = vision.hidden_size, vision.intermediate_size, vision.patch_size
        patches = (height // p) * (width // p)
        n = patches + 1
        linear = patches * vision.num_channels * p * p * d + vision.num_hidden_layers * n * (
            4 * d * d + 2 * d * m
        )
        return linear + self.tower_attention_macs(vision, height, width)

    def tower_attention_macs(self, vision, height: int, width: int) -> int:
        n = (height // vision.patch_size) * (width // vision.patch_size) + 1
        return vision.num_hidden_layers * 2 * n * n * vision.hidden_size

    def projector_macs(self, config, tokens: int) -> int:
        """Two linear maps: n(dD + D²)."""
        d, text = config.vision_config.hidden_size, config.text_config.hidden_size
        return tokens * (d * text + text * text)

    def tower_parts(self, model: nn.Module, height: int, width: int) -> tuple[list[Part], int]:
        vision = model.config.vision_config
        p, d = vision.patch_size, vision.hidden_size
        patches = (height // p) * (width // p)
        layer = with_sdpa(type(self.tower_of(model.model).encoder.layers[0]), vision)
        hidden = torch.empty(1, patches + 1, d, device="meta")  # + CLS
        parts = [Part(TracedLayer(layer), (hidden,), vision.num_hidden_layers)]
        return parts, patches * vision.num_channels * p * p * d

    def noise(self, vision, pixels: tuple[int, int], batch: int, generator) -> dict[str, Tensor]:
        channels = getattr(vision, "num_channels", 3)
        return {"pixel_values": torch.randn(batch, channels, *pixels, generator=generator)}

    def narrow(self, body: Mapping) -> dict:
        tower = {
            **body["vision_config"],
            "intermediate_size": 32,
            "num_attention_heads": 2,
            "hidden_size": NARROW_WIDTH,
            "projection_dim": NARROW_WIDTH,
        }
        body = {**body, **NO_TOKENS, "vision_config": tower, "text_config": narrow_text(body["text_config"])}
        body.pop("image_token_id", None)  # the same under its newer name
        return body | {"image_token_index": 511}


def original_inputs(processor) -> dict[str, object]:
    """Images and prompts as LLaVA's own code makes them: images padded to squares with the mean colour, where
    the Hugging Face conversion crops; its sentence ahead of the first turn, which the conversion left out."""
    from transformers import LlavaImageProcessor

    own = processor.image_processor
    processor.image_processor = LlavaImageProcessor(
        do_pad=True,
        size=dict(own.size),
        crop_size=dict(own.crop_size),
        resample=own.resample,
        image_mean=own.image_mean,
        image_std=own.image_std,
        rescale_factor=own.rescale_factor,
    )
    literal = json.dumps(SYSTEM_SENTENCE + " ")
    processor.chat_template = "{{ " + literal + " }}" + (processor.chat_template or "")
    return {"system_sentence": SYSTEM_SENTENCE}


class LlavaAdapter(Adapter):
    """Raises UserError if the model's features are not the patches of one CLIP layer."""

    def __init__(self, family: Family, model: nn.Module):
        super().__init__(family, model)
        config = model.config
        if config.vision_config.model_type != "clip_vision_model":
            raise UserError(
                f"vision tower {config.vision_config.model_type} is not supported; LLaVA-1.5 uses CLIP"
            )
        if (
            not isinstance(config.vision_feature_layer, int)
            or config.vision_feature_select_strategy != "default"
        ):
            raise UserError(
                "only LLaVA models with one vision_feature_layer and vision_feature_select_strategy=default "
                f"are supported; not {config.vision_feature_layer}, {config.vision_feature_select_strategy}"
            )
        self._tower = family.tower_of(self.inner)
        self.tower_norm = self._tower.post_layernorm
        self.patch = config.vision_config.patch_size
        side = config.vision_config.image_size // self.patch
        self.grid = (side, side)
        # hidden_states counts the embeddings as 0, so its entry i is the output of encoder layer i - 1
        layer = config.vision_feature_layer
        self.feature = Signal("hidden", layer if layer < 0 else layer - 1)

    def images(self, arguments: Mapping[str, object]) -> Images:
        pixels = arguments["pixel_values"]
        for name, value in arguments.items():
            if (
                value is not None
                and name not in ("pixel_values", "return_dict")
                and value != getattr(self.model.config, name, None)
            ):
                raise RuntimeError(
                    f"get_image_features({name}={value}) is not supported while a pruner is on"
                )
        if pixels.ndim != 4:
            raise RuntimeError(f"pixel_values of shape {tuple(pixels.shape)}: expected [images, 3, h, w]")
        return Images(pixels, pixels.unbind(), [self.grid] * len(pixels))

    def see(
        self, images: Images, which: Sequence[int], grids: Sequence[Grid], signals: Iterable[Signal]
    ) -> list[dict[Signal, Tensor]]:
        pixels = images.tensor if len(which) == len(images) else images.tensor[list(which)]
        size = [self.patch * n for n in grids[0]]  # all images are of one size
        if list(pixels.shape[-2:]) != size:
            pixels = F.interpolate(pixels.float(), size, mode="bicubic", antialias=True).to(pixels.dtype)
        with clip_taps.tapped(self._tower.encoder.layers, {self.feature, *signals}) as found:
            self._tower(pixels, interpolate_pos_encoding=grids[0] != self.grid)
        return [{signal: x[i] for signal, x in found.items()} for i in range(len(pixels))]
