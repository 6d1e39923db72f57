"""What the engine has to know of Qwen2.5-VL: Qwen2_5_VLForConditionalGeneration, any image size, M-RoPE.

A visual token is what the tower's 2 x 2 merger makes of four patches; the merger is the projector, and runs
on all tokens. Inside the tower they stand in window order, and only its last output is put back into raster
order. Everything that leaves this file is one row a visual token, in raster order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn
from transformers.vision_utils import get_vision_window_index

from backbones.families.family import Grid, Images
from backbones.families.window_tower import resized, tapped
from backbones.layout import Layout, Move, gather
from methods.base import Signal
from methods.errors import UserError


class Qwen2_5_VL:
    """Adapter of one loaded model. Raises UserError if its decoder has sliding-window layers."""

    family = "qwen2_5_vl"
    has_cls = False
    projects = False
    renumbers = False
    visual_tokens = None

    def __init__(self, model: nn.Module):
        config = model.config
        self.model = model
        self.inner = model.model
        self.language_model = self.inner.language_model
        self.layers = self.language_model.layers
        self.text_config = config.get_text_config()
        if set(self.text_config.layer_types) != {"full_attention"}:
            raise UserError("Qwen2.5-VL with sliding-window layers in its decoder is not supported")
        self.image_token_id = config.image_token_id
        self._tower, self._vision = self.inner.visual, config.vision_config
        self._merge = self._vision.spatial_merge_size
        self.heads = self._vision.num_heads
        self.feature = Signal("hidden", len(self._tower.blocks))  # one behind the last block: the merger

    # ---- the tower

    def images(self, arguments: Mapping[str, object]) -> Images:
        for name, value in arguments.items():
            if name not in ("pixel_values", "image_grid_thw", "return_dict") and value:
                raise RuntimeError(
                    f"get_image_features({name}={value}) is not supported while a pruner is on"
                )
        pixels, shapes = arguments["pixel_values"], arguments["image_grid_thw"].tolist()
        if any(frames != 1 for frames, _, _ in shapes):
            raise RuntimeError("images of several frames are not supported while a pruner is on")
        parts = pixels.split([rows * columns for _, rows, columns in shapes])
        return Images(pixels, parts, [(r // self._merge, c // self._merge) for _, r, c in shapes])

    def see(
        self, images: Images, which: Sequence[int], grids: Sequence[Grid], signals: Iterable[Signal]
    ) -> list[dict[Signal, Tensor]]:
        pixels = images.tensor
        if list(grids) != list(images.grids):  # fewer images, or other sizes
            parts = [(images.parts[i], images.grids[i]) for i in which]
            pixels = torch.cat([resized(*part, wanted, self._vision) for part, wanted in zip(parts, grids)])
        shapes = torch.tensor([[1, r * self._merge, c * self._merge] for r, c in grids])
        order = [signal for signal in signals if signal.kind == "order"]
        inner = [signal for signal in signals if signal not in (*order, self.feature)]
        with tapped(self._tower.blocks, inner) as taps:
            pixels = pixels.type(self._tower.dtype)
            merged = self._tower(pixels, grid_thw=shapes.to(pixels.device)).pooler_output
        ends = list(accumulate((rows * columns for rows, columns in grids), initial=0))
        places = self._tower_order(shapes).to(pixels.device)
        found = []
        for start, end in pairwise(ends):
            own = places[start:end] - start
            known = {self.feature: merged[start:end], **dict.fromkeys(order, own)}
            for signal in inner:
                in_tower = taps[signal.layer].read(signal.kind, slice(start, end), self._merge**2)
                known[signal] = in_tower[own.argsort()]
            found.append(known)
        return found

    def _tower_order(self, shapes: Tensor) -> Tensor:
        """Which token, all images' one after the other in raster order, stands at each place of the tower."""
        index, _ = get_vision_window_index(
            shapes,
            spatial_merge_size=self._merge,
            window_size=self._vision.window_size,
            patch_size=self._vision.patch_size,
        )
        return index

    def project(self, features: Tensor) -> Tensor:
        return features

    # ---- the prompt

    def check_prompt(self, arguments: Mapping[str, object]) -> None:
        videos = (arguments.get("mm_encoder_outputs") or {}).get("video")
        if videos is not None or arguments.get("pixel_values_videos") is not None:
            raise RuntimeError("videos are not supported while a pruner is on")

    def image_sizes(self, layout: Layout) -> list[list[int]]:
        """Lengths of the runs of places: the chat template puts other tokens around every image."""
        sizes = []
        for columns in (own.tolist() for own in layout.columns):
            starts = [i for i, column in enumerate(columns) if i == 0 or column != columns[i - 1] + 1]
            sizes.append([end - start for start, end in pairwise([*starts, len(columns)])])
        return sizes

    def check_positions(
        self, layout: Layout, sizes: Sequence[Sequence[int]], positions: Tensor | None
    ) -> None:
        """transformers falls back to 1-D positions, without a word, where it is not told which tokens are an
        image's, or how large it is. M-RoPE gives all tokens of an image one and the same time."""
        row = next((b for b, own in enumerate(sizes) if own), None)
        if row is None:
            return
        if positions is not None and positions.ndim == 3:
            first, last = layout.columns[row][[0, sizes[row][0] - 1]]
            times = positions[-3].expand(len(sizes), -1)[row]
            if first == last or times[first] == times[last]:
                return
        raise RuntimeError(
            "these positions are not M-RoPE's: give mm_token_type_ids and image_grid_thw, as the processor "
            "makes them"
        )

    def following(self, layout: Layout, positions: Tensor | None) -> Tensor:
        if positions is None:
            return layout.ends
        last = positions[..., -1] + 1
        return (last if last.ndim == 1 else last[-3:].amax(0)).expand(len(layout.lengths))

    def moved(self, positions: Tensor | None, before: Layout, after: Layout, move: Move) -> Tensor:
        moved = torch.stack([gather(axis, move.place) for axis in positions])
        if len(moved) == 4:  # the first row numbers the tokens, for masks
            moved[0] = after.positions
        return moved

    def shrunk(
        self, positions: Tensor, layout: Layout, grids: Sequence[Sequence[tuple[Grid, Grid]]]
    ) -> Tensor:
        positions = positions.expand(-1, len(grids), -1).clone()
        for own, columns, images in zip(positions[-3:].unbind(1), layout.columns, grids):
            places = columns.split([rows * wide for (rows, wide), _ in images])
            for (grid, seen), place in zip(images, places):
                raster = torch.cartesian_prod(*(torch.arange(n, device=place.device) for n in (1, *seen))).T
                own[:, place[: raster.shape[1]]] = own[:, place[:1]] + raster
                own[:, int(place[-1]) + 1 :] -= max(grid) - max(seen)
        return positions
