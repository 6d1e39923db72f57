"""One number counted three times: fvcore, torch.utils.flop_counter and the closed form, on the meta device.

fvcore traces one layer (`harness.costs.macs`), torch counts the calls of the unmodified model's own modules
(the whole tower, with its convolution), and the closed form (`harness.costs.closed_form`) sees the
configuration alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from harness.costs.closed_form import (
    closed_form_layer,
    closed_form_merger,
    closed_form_projector,
    closed_form_tower,
    closed_form_window_tower,
)
from harness.costs.macs import counter_for
from harness.costs.shapes import Shape

#: MAC by (fvcore, torch, closed form)
Counts = tuple[int, int, int]


class ThreeCounters:
    """Of one shape. `disagreements` collects what did not agree to the last MAC, as printable lines."""

    def __init__(self, shape: Shape):
        self.shape, self.model = shape, shape.model()
        self.fvcore = counter_for(self.model)
        self.disagreements: list[str] = []
        self.checked = 0
        self._known: dict[tuple, int] = {}

    def layer(self, n: int) -> int:
        """One decoder layer on n tokens."""
        return self._same(f"decoder layer at {n} tokens", lambda: self.layer_counts(n))

    def tower(self, pixels: tuple[int, int]) -> int:
        """The vision tower on one image of (height, width) pixels, Qwen's without the merger."""
        return self._same(f"vision tower at {pixels[0]} x {pixels[1]}", lambda: self.tower_counts(*pixels))

    def projector(self, n: int) -> int:
        """LLaVA's projector or Qwen's merger on n visual tokens."""
        return self._same(f"projector on {n} tokens", lambda: self.projector_counts(n))

    def _same(self, what: str, count: Callable[[], Counts]) -> int:
        if what not in self._known:
            a, b, c = count()
            self.checked += 1
            if not a == b == c:
                self.disagreements.append(f"{what}: fvcore {a}, torch {b}, closed form {c} MAC")
            self._known[what] = a
        return self._known[what]

    def layer_counts(self, n: int) -> Counts:
        inner = self.model.model.language_model
        hidden = torch.empty(1, n, self.fvcore.text.hidden_size, device="meta")
        cos = torch.empty(1, n, self.fvcore.head_dim, device="meta")
        measured = torch_macs(
            lambda: inner.layers[0](hidden, attention_mask=None, position_embeddings=(cos, cos))
        )
        return self.fvcore.decoder_layer(n), measured, closed_form_layer(self.shape.config.text_config, n)

    def tower_counts(self, height: int, width: int) -> Counts:
        vision, inner = self.shape.config.vision_config, self.model.model
        traced = self.fvcore.tower(height, width)
        if self.shape.family == "llava":
            pixels = torch.empty(1, vision.num_channels, height, width, device="meta")
            other_size = (height, width) != (vision.image_size, vision.image_size)
            measured = torch_macs(lambda: inner.vision_tower(pixels, interpolate_pos_encoding=other_size))
            return traced, measured, closed_form_tower(vision, height, width)
        rows, columns = height // vision.patch_size, width // vision.patch_size
        patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        pixels = torch.empty(rows * columns, patch, device="meta")
        measured = torch_macs(lambda: inner.visual(pixels, **_window_arguments(vision, rows, columns)))
        # the tower's own forward ends with the merger
        merged = rows * columns // vision.spatial_merge_size**2
        return (
            traced,
            measured - self.projector(merged),
            closed_form_window_tower(vision, height, width),
        )

    def projector_counts(self, n: int) -> Counts:
        vision, config, inner = self.shape.config.vision_config, self.shape.config, self.model.model
        if self.shape.family == "llava":
            features = torch.empty(1, n, vision.hidden_size, device="meta")
            measured = torch_macs(lambda: inner.multi_modal_projector(features))
            return self.fvcore.projector(n), measured, closed_form_projector(config, n)
        features = torch.empty(n * vision.spatial_merge_size**2, vision.hidden_size, device="meta")
        measured = torch_macs(lambda: inner.visual.merger(features))
        return self.fvcore.projector(n), measured, closed_form_merger(config, n)


def _window_arguments(vision, rows: int, columns: int) -> dict:
    """What Qwen's tower would compute by reading values of the image's size, which meta tensors have not."""
    from transformers.vision_utils import (
        get_vision_cu_seqlens,
        get_vision_position_ids,
        get_vision_window_index,
    )

    grid = torch.tensor([[1, rows, columns]])
    index, ends = get_vision_window_index(
        grid,
        spatial_merge_size=vision.spatial_merge_size,
        window_size=vision.window_size,
        patch_size=vision.patch_size,
    )
    return {
        "grid_thw": grid,
        "position_ids": get_vision_position_ids(grid, vision.spatial_merge_size).to("meta"),
        "cu_seqlens": get_vision_cu_seqlens(grid),
        "window_index": index.to("meta"),
        "cu_window_seqlens": ends,
    }


def torch_macs(call: Callable[[], object]) -> int:
    """MAC of a call by torch's counter. Raises ArithmeticError for an odd number of FLOPs."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as meter:
        call()
    total, odd = divmod(meter.get_total_flops(), 2)
    if odd:
        raise ArithmeticError("torch counted an odd number of FLOPs")
    return total
