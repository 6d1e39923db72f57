"""What the engine has to know of LLaVA-1.5's family: LlavaForConditionalGeneration with CLIP and Llama."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from backbones.families.clip_taps import tapped
from backbones.families.family import Grid, Images
from backbones.layout import Layout, Move
from methods.base import Signal
from methods.errors import UserError


class Llava:
    """Adapter of one loaded model. Raises UserError if its features are not the patches of one CLIP layer."""

    family = "llava"
    has_cls = True
    projects = True
    renumbers = True

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

    # ---- the tower

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
        with tapped(self._tower.encoder.layers, {self.feature, *signals}) as found:
            self._tower(pixels, interpolate_pos_encoding=grids[0] != self.grid)
        return [{signal: x[i] for signal, x in found.items()} for i in range(len(pixels))]

    def project(self, features: Tensor) -> Tensor:
        return self.inner.multi_modal_projector(features)

    # ---- the prompt

    def check_prompt(self, arguments: Mapping[str, object]) -> None:
        pass

    def image_sizes(self, layout: Layout) -> list[list[int]]:
        return [[self.visual_tokens] * (n // self.visual_tokens) for n in layout.visual]

    def check_positions(
        self, layout: Layout, sizes: Sequence[Sequence[int]], positions: Tensor | None
    ) -> None:
        pass

    def following(self, layout: Layout, positions: Tensor | None) -> Tensor:
        return layout.ends

    def moved(self, positions: Tensor | None, before: Layout, after: Layout, move: Move) -> Tensor:
        if positions is None:
            positions = before.positions
        return positions.expand(len(move.place), -1).gather(1, move.place)

    def shrunk(self, positions, layout, grids):
        raise NotImplementedError("1-D positions are numbered anew")
