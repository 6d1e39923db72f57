"""A backbone of true shape with random weights, made on the device itself: latency, memory and energy do not
depend on the values, so no checkpoint has to be downloaded. Its answers mean nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from backbones.backbone import Backbone, config_digest
from backbones.shapes import Shape
from harness.costs import plan
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
            "family": self.family.model_type,
            "weights": "random",
            "config": config_digest(self.shape.body)[:12],
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
        found |= shape.family.noise(shape.config.vision_config, shape.image_pixels, batch, generator)
        found |= shape.family.prompt_facts(ids == config.image_token_id)
        found["pixel_values"] = found["pixel_values"].to(self.model.dtype)
        return {name: x.to(device) for name, x in found.items()}

    def give_weights(self, pruner) -> None:
        """Random ones for a method that has some, with as many tokens as its budget says."""
        plan.give_weights(self.model.config, pruner, self.num_visual_tokens)


def build(shape: Shape, device: str, dtype: str) -> RandomBackbone:
    """Raises UserError, naming the fix, if the family is not known or the model is too large."""
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


def narrow(shape: Shape) -> Shape:
    """The shape with its depth and its image, but tiny widths: it runs in a moment anywhere, and launches as
    many kernels. Raises UserError for a family of which no such form is known."""
    return replace(shape, name=f"{shape.name}, narrow", body=shape.family.narrow(shape.body))
