"""Control: a regular grid of visual tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from methods.base import ImageView, Pruner, Selection
from methods.registry import register


@register
@dataclass
class Uniform(Pruner):
    """Control: b visual tokens spread evenly over the image, whatever it shows, before the language model."""

    name: ClassVar[str] = "uniform"

    def select(self, image: ImageView) -> Selection:
        return Selection(even_grid(image.grid, self.count(image.features.shape[0])).to(image.features.device))


def even_grid(grid: tuple[int, int], n: int) -> torch.Tensor:
    """n distinct indices into a raster of `grid` (rows, columns), ascending int64 [n], as evenly as n allows.

    About sqrt(n) rows (as the raster's shape has it), at the middles of equal bands; the n tokens are dealt
    to these rows in numbers that differ by at most one, each at the middles of equal stretches of its row.
    """
    rows, columns = grid
    lines = max(round((n * rows / columns) ** 0.5), -(-n // columns), 1)
    lines = min(lines, rows, n)
    indices = []
    for i in range(lines):
        in_line = n * (i + 1) // lines - n * i // lines
        row = (2 * i + 1) * rows // (2 * lines)
        indices += [row * columns + (2 * j + 1) * columns // (2 * in_line) for j in range(in_line)]
    return torch.tensor(indices)
