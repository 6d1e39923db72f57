"""A backbone of true shape with random weights, made on the device itself: latency, memory and energy do not
depend on the values, so no checkpoint has to be downloaded. Its answers mean nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from backbones.backbone import Backbone
from backbones.families import FAMILIES
from harness import plan
from harness.config import digest
from harness.errors import UserError
from harness.shapes import Shape

#: parameters that are still measured on a CPU; a 7B prefill would take minutes there
CPU_PARAMETERS = 500_000_000


@dataclass
class RandomBackbone(Backbone):
    """processor and folder are None: there is nothing to read images and prompts with, see `synthetic`."""

    shape: Shape

    def describe(self) -> dict[str, object]:
        return {
            "name": self.name,
            "family": self.family,
            "weights": "random",
            "config": digest(self.shape.body),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "attention": self.model.config.get_text_config()._attn_implementation,
            "visual_tokens": self.num_visual_tokens,
            "layers": self.num_layers,
        }

    def synthetic(self, text_tokens: int, batch: int = 1) -> dict[str, Tensor]:
        """Inputs of `batch` prompts of equal length: noise for an image, and random words around it."""
        shape, config, device = self.shape, self.model.config, self.model.device
        generator = torch.Generator().manual_seed(0)
        # the last text token comes after the image, as in `harness flops`
        before = min(shape.text_before_image, text_tokens - 1)
        n = before + self.num_visual_tokens
        words = min(config.image_token_id, config.get_text_config().vocab_size)
        ids = torch.randint(words, (batch, text_tokens + self.num_visual_tokens), generator=generator)
        ids[:, before:n] = config.image_token_id
        pixels = torch.randn(
            batch, config.vision_config.num_channels, *shape.image_pixels, generator=generator
        )
        return {
            "input_ids": ids.to(device),
            "attention_mask": torch.ones_like(ids).to(device),
            "pixel_values": pixels.to(device, self.model.dtype),
        }

    def give_weights(self, pruner) -> None:
        """Random ones for a method that has some, with as many tokens as its budget says."""
        plan.give_weights(self.model.config, pruner, self.num_visual_tokens)


def build(shape: Shape, device: str, dtype: str) -> RandomBackbone:
    """Raises UserError, naming the fix, if no adapter knows the family or the model is too large."""
    if shape.family not in FAMILIES:
        raise UserError(
            f"{shape.title}: this version has no adapter for family {shape.family!r}, so methods cannot be "
            f"put on it; use a --backbone of family {' or '.join(FAMILIES)}, or --estimate"
        )
    model = shape.model().to(getattr(torch, dtype))  # on meta: nothing is allocated yet
    parameters = sum(p.numel() for p in model.parameters())
    size = sum(p.nbytes for p in model.parameters())
    cpu = torch.device(device).type == "cpu"
    if cpu and parameters > CPU_PARAMETERS:
        raise UserError(
            f"{shape.title} has {parameters / 1e9:.1f} billion parameters, too many for a CPU: use "
            "--backbone pocket-llava, or a CUDA device (--device cuda); --estimate says what to expect there"
        )
    if not cpu and size > (free := torch.cuda.mem_get_info(device)[0]):
        raise UserError(
            f"{shape.title} in {dtype} takes {size / 1e9:.1f} GB, {device} has {free / 1e9:.1f} GB free: "
            "use a larger GPU, or a smaller --backbone"
        )
    torch.manual_seed(0)
    model = model.to_empty(device=device)
    # the family's own initialisation, which also fills what is no parameter (rotary frequencies, positions)
    model.init_weights()
    model.config.image_seq_length = shape.visual_tokens
    return RandomBackbone(shape.name, model, None, None, shape)


#: head size and further widths of a model that costs next to nothing
_NARROW_HEAD, _NARROW = 8, {"intermediate_size": 32, "num_attention_heads": 2, "hidden_size": 2 * 8}


def narrow(shape: Shape) -> Shape:
    """The shape with its depth and its image, but tiny widths: it runs in a moment anywhere, and launches as
    many kernels. Raises UserError for a family of which no such form is known."""
    if shape.family != "llava":
        raise UserError(f"{shape.title}: no narrow form of family {shape.family!r} is known")
    text, tower = shape.body["text_config"], shape.body["vision_config"]
    grouped = text["num_key_value_heads"] < text["num_attention_heads"]
    heads = {"num_key_value_heads": 1 if grouped else 2, "head_dim": _NARROW_HEAD}
    no_tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    body = {
        **shape.body,
        **no_tokens,
        "text_config": {**text, **_NARROW, **heads, **no_tokens, "vocab_size": 512},
        "vision_config": {**tower, **_NARROW, "projection_dim": 2 * _NARROW_HEAD},
        "image_token_index": 511,
    }
    body.pop("image_token_id", None)  # the same under its newer name
    return replace(shape, name=f"{shape.name}, narrow", body=body)
