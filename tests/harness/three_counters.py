"""One number counted three times: fvcore, torch.utils.flop_counter and the closed form, on the meta device.

fvcore traces one layer (`harness.costs.macs`), torch counts the calls of the unmodified model's own modules
(the whole tower, with its convolution), and the closed form sees the configuration alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from backbones.shapes import Shape
from harness.costs.closed_form import closed_form_layer
from harness.costs.macs import ModelCounter

#: MAC by (fvcore, torch, closed form)
Counts = tuple[int, int, int]


class ThreeCounters:
    """Of one shape."""

    def __init__(self, shape: Shape):
        self.shape, self.model = shape, shape.model()
        self.fvcore = ModelCounter(self.model)

    def layer_counts(self, n: int) -> Counts:
        """One decoder layer on n tokens."""
        inner = self.model.model.language_model
        hidden = torch.empty(1, n, self.fvcore.text.hidden_size, device="meta")
        cos = torch.empty(1, n, self.fvcore.head_dim, device="meta")
        measured = torch_macs(
            lambda: inner.layers[0](hidden, attention_mask=None, position_embeddings=(cos, cos))
        )
        return self.fvcore.decoder_layer(n), measured, closed_form_layer(self.shape.config.text_config, n)

    def tower_counts(self, height: int, width: int) -> Counts:
        """The vision tower on one image of (height, width) pixels, Qwen's without the merger."""
        vision, inner = self.shape.config.vision_config, self.model.model
        traced = self.fvcore.tower(height, width)
        closed = self.shape.family.tower_macs(vision, height, width)
        if self.shape.family.model_type == "llava":
            pixels = torch.empty(1, vision.num_channels, height, width, device="meta")
            other_size = (height, width) != (vision.image_size, vision.image_size)
            measured = torch_macs(lambda: inner.vision_tower(pixels, interpolate_pos_encoding=other_size))
            return traced, measured, closed
        rows, columns = height // vision.patch_size, width // vision.patch_size
        patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        pixels = torch.empty(rows * columns, patch, device="meta")
        windowed = self.shape.family.model_type == "qwen2_5_vl"
        measured = torch_macs(lambda: inner.visual(pixels, **_arguments(vision, rows, columns, windowed)))
        # the tower's own forward ends with the merger
        merged = rows * columns // vision.spatial_merge_size**2
        return traced, measured - self.projector_counts(merged)[1], closed

    def projector_counts(self, n: int) -> Counts:
        """LLaVA's projector or Qwen's merger on n visual tokens."""
        vision, inner, family = self.shape.config.vision_config, self.model.model, self.shape.family
        if family.model_type == "llava":
            features = torch.empty(1, n, vision.hidden_size, device="meta")
            measured = torch_macs(lambda: inner.multi_modal_projector(features))
        else:
            features = torch.empty(
                n * vision.spatial_merge_size**2, family.tower_width(vision), device="meta"
            )
            measured = torch_macs(lambda: inner.visual.merger(features))
        return self.fvcore.projector(n), measured, family.projector_macs(self.shape.config, n)


def _arguments(vision, rows: int, columns: int, windowed: bool) -> dict:
    """What Qwen's tower would compute by reading values of the image's size, which meta tensors have not."""
    from transformers.vision_utils import (
        get_vision_cu_seqlens,
        get_vision_position_ids,
        get_vision_window_index,
    )

    grid = torch.tensor([[1, rows, columns]])
    found = {
        "grid_thw": grid,
        "position_ids": get_vision_position_ids(grid, vision.spatial_merge_size).to("meta"),
        "cu_seqlens": get_vision_cu_seqlens(grid),
    }
    if windowed:
        index, ends = get_vision_window_index(
            grid,
            spatial_merge_size=vision.spatial_merge_size,
            window_size=vision.window_size,
            patch_size=vision.patch_size,
        )
        found |= {"window_index": index.to("meta"), "cu_window_seqlens": ends}
    return found


def torch_macs(call: Callable[[], object]) -> int:
    """MAC of a call by torch's counter. Raises ArithmeticError for an odd number of FLOPs."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as meter:
        call()
    total, odd = divmod(meter.get_total_flops(), 2)
    if odd:
        raise ArithmeticError("torch counted an odd number of FLOPs")
    return total
