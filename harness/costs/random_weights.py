"""A backbone of true shape with random weights, made on the device itself: latency, memory and energy do not
depend on the values, so no checkpoint has to be downloaded. Its answers mean nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from backbones.backbone import Backbone
from backbones.families import FAMILIES
from harness.costs import plan
from harness.costs.shapes import Shape
from harness.run.config import digest
from methods.errors import UserError

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

    @property
    def num_visual_tokens(self) -> int:
        return self.shape.visual_tokens

    def synthetic(self, text_tokens: int, batch: int = 1) -> dict[str, Tensor]:
        """Inputs of `batch` prompts of equal length: noise for an image, and random words around it."""
        shape, config, device = self.shape, self.model.config, self.model.device
        generator = torch.Generator().manual_seed(0)
        # the last text token comes after the image, as in `harness flops`
        before = min(shape.text_before_image, text_tokens - 1)
        n = before + self.num_visual_tokens
        special = [v for k, v in vars(config).items() if k.endswith("_token_id") and isinstance(v, int)]
        words = min(*special, config.image_token_id, config.get_text_config().vocab_size)
        ids = torch.randint(words, (batch, text_tokens + self.num_visual_tokens), generator=generator)
        ids[:, before:n] = config.image_token_id
        found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        found |= _images(shape, batch, generator)
        if shape.family == "qwen2_5_vl":
            found["mm_token_type_ids"] = (ids == config.image_token_id).int()
        found["pixel_values"] = found["pixel_values"].to(self.model.dtype)
        return {name: x.to(device) for name, x in found.items()}

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


def _images(shape: Shape, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    """What the family's image processor would make of `batch` images, of noise."""
    vision, (height, width) = shape.config.vision_config, shape.image_pixels
    if shape.family != "qwen2_5_vl":
        channels = getattr(vision, "num_channels", 3)
        return {"pixel_values": torch.randn(batch, channels, height, width, generator=generator)}
    rows, columns = height // vision.patch_size, width // vision.patch_size
    pixels_of_a_patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return {
        "pixel_values": torch.randn(batch * rows * columns, pixels_of_a_patch, generator=generator),
        "image_grid_thw": torch.tensor([[1, rows, columns]] * batch),
    }


#: head size and further widths of a model that costs next to nothing
_NARROW_HEAD, _NARROW = 8, {"intermediate_size": 32, "num_attention_heads": 2, "hidden_size": 2 * 8}
#: by family: what else is narrow in the vision and text configurations, and the tokens with a meaning
_NARROWER = {
    "llava": ({**_NARROW, "projection_dim": 2 * 8}, {}, {"image_token_index": 511}),
    "qwen2_5_vl": (
        {"intermediate_size": 32, "num_heads": 2, "hidden_size": 2 * 8, "out_hidden_size": 2 * 8},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
        {
            "image_token_id": 511,
            "video_token_id": 510,
            "vision_start_token_id": 509,
            "vision_end_token_id": 508,
        },
    ),
}


def narrow(shape: Shape) -> Shape:
    """The shape with its depth and its image, but tiny widths: it runs in a moment anywhere, and launches as
    many kernels. Raises UserError for a family of which no such form is known."""
    if shape.family not in _NARROWER:
        raise UserError(f"{shape.title}: no narrow form of family {shape.family!r} is known")
    vision, further, tokens = _NARROWER[shape.family]
    text, tower = shape.body["text_config"], shape.body["vision_config"]
    grouped = text["num_key_value_heads"] < text["num_attention_heads"]
    heads = {"num_key_value_heads": 1 if grouped else 2, "head_dim": _NARROW_HEAD}
    no_tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    body = {
        **shape.body,
        **no_tokens,
        "text_config": {**text, **_NARROW, **heads, **further, **no_tokens, "vocab_size": 512},
        "vision_config": {**tower, **vision},
    }
    body.pop("image_token_id", None)  # the same under its newer name
    return replace(shape, name=f"{shape.name}, narrow", body=body | tokens)
