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

    The vision tower is unchanged; its position embeddings are interpolated to the smaller raster (CLIP's own
    `interpolate_pos_encoding`). Saves in the tower too, unlike every pruning method.
    """

    name: ClassVar[str] = "downsample"

    def image_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        return largest_raster(grid, self.count(grid[0] * grid[1]))

    def select(self, image: ImageView) -> Selection:
        return Selection(torch.arange(image.features.shape[0], device=image.features.device))


def largest_raster(grid: tuple[int, int], n: int) -> tuple[int, int]:
    """(rows, columns) within `grid` with the largest product that is at most n; of several, the one nearest to
    the grid's own shape. No side is more than MAX_ASPECT times as long as that shape would make it.

    For 24 x 24: 192 -> 12 x 16, 128 -> 8 x 16, 64 -> 8 x 8; for a number that makes no raster fewer (127 -> 9 x 14).
    """
    shape = grid[0] / grid[1]
    best = (0, 0.0, (1, 1))
    for rows in range(1, grid[0] + 1):
        columns = min(grid[1], n // rows)
        if columns == 0:
            break
        aspect = rows / columns / shape
        stretch = max(aspect, 1 / aspect)
        # rounding in n // rows can make a raster narrower than it need be; the search over rows finds the better one
        if stretch <= MAX_ASPECT or rows * columns == 1:
            best = max(best, (rows * columns, -stretch, (rows, columns)))
    return best[2]
