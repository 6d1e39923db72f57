"""What the engine has to know of LLaVA-1.5's family: LlavaForConditionalGeneration with CLIP and Llama."""

from __future__ import annotations

from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor, nn

from backbones.vision import tapped
from harness.errors import UserError
from methods.base import Signal


class Llava:
    """Adapter of one loaded model. Raises UserError if its features are not the patches of one CLIP layer."""

    family = "llava"

    def __init__(self, model: nn.Module):
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
        self.model = model
        self.inner = model.model
        self.language_model = self.inner.language_model
        self.layers = self.language_model.layers
        self.text_config = config.get_text_config()
        self.image_token_id = config.image_token_id
        self._tower = self.inner.vision_tower
        side = config.vision_config.image_size // config.vision_config.patch_size
        self.grid = (side, side)
        self.patch = config.vision_config.patch_size
        self.heads = config.vision_config.num_attention_heads
        # hidden_states counts the embeddings as 0, so its entry i is the output of encoder layer i - 1
        layer = config.vision_feature_layer
        self.feature = Signal("hidden", layer if layer < 0 else layer - 1)

    @property
    def visual_tokens(self) -> int:
        """Places that the processor leaves for an image in the prompt."""
        return self.grid[0] * self.grid[1]

    def resize(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        """Pixels [B, 3, h, w] of the same images with that many patches."""
        size = [self.patch * n for n in grid]
        if list(pixels.shape[-2:]) == size:
            return pixels
        return F.interpolate(pixels.float(), size, mode="bicubic", antialias=True).to(pixels.dtype)

    def see(self, pixels: Tensor, signals: Iterable[Signal]) -> dict[Signal, Tensor]:
        """Run the vision tower once on [B, 3, h, w]; each signal [B, 1 + N or 1, d]."""
        full_size = tuple(pixels.shape[-2:]) == tuple(self.patch * n for n in self.grid)
        with tapped(self._tower.encoder.layers, {self.feature, *signals}) as found:
            self._tower(pixels, interpolate_pos_encoding=not full_size)
        return found

    def project(self, features: Tensor) -> Tensor:
        """[.., d] -> [.., D]."""
        return self.inner.multi_modal_projector(features)

    def check_request(self, pixels: Tensor, options: dict[str, object]) -> None:
        """Raises RuntimeError for what `get_image_features` can be asked and the engine does not do."""
        for name, value in options.items():
            if (
                value is not None
                and name != "return_dict"
                and value != getattr(self.model.config, name, None)
            ):
                raise RuntimeError(
                    f"get_image_features({name}={value}) is not supported while a pruner is on"
                )
        if pixels.ndim != 4:
            raise RuntimeError(f"pixel_values of shape {tuple(pixels.shape)}: expected [images, 3, h, w]")
