"""Control: a smaller image instead of fewer tokens of a large one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from methods.base import ImageView, Pruner, Selection
from methods.registry import register

#: largest ratio of the sides of the small image's patch raster: beyond it, shapes get hard to recognise
MAX_ASPECT = 2


@register
@dataclass
class Downsample(Pruner):
    """Control: the image shrunk until it has b patches (or the nearest number below that makes a raster).

    The vision tower is unchanged; CLIP's position embeddings are interpolated to the smaller raster (its own
    `interpolate_pos_encoding`), Qwen2.5-VL's takes images of any size, and everything, M-RoPE positions too,
    is as if the image had been that small. Saves in the tower too, unlike every pruning method.
    """

    name: ClassVar[str] = "downsample"

    def image_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        return largest_raster(grid, self.count(grid[0] * grid[1]))

    def select(self, image: ImageView) -> Selection:
        return Selection(torch.arange(image.features.shape[0], device=image.features.device))


def largest_raster(grid: tuple[int, int], n: int) -> tuple[int, int]:
    """(rows, columns) within `grid` with the largest product that is at most n; of several, the one nearest
    to the grid's own shape, then the wider one. The ratio of the sides is at most MAX_ASPECT times off that
    shape.

    For 24 x 24: 192 -> 12 x 16, 128 -> 8 x 16, 64 -> 8 x 8; for a number that makes no raster fewer (127 -> 9
    x 14).
    """
    shape = grid[0] / grid[1]
    best = (0, 0.0, 0, (1, 1))
    for rows in range(1, min(grid[0], n) + 1):
        columns = min(grid[1], n // rows, int(MAX_ASPECT * rows / shape) or 1)
        aspect = rows / columns / shape
        stretch = round(max(aspect, 1 / aspect), 9)  # so that a raster and its transpose tie
        if stretch <= MAX_ASPECT:
            best = max(best, (rows * columns, -stretch, columns, (rows, columns)))
    return best[-1]
