"""Control: visual tokens chosen blindly."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import torch

from methods.base import ImageView, Pruner, Selection
from methods.registry import register


@register
@dataclass
class Random(Pruner):
    """Control: b visual tokens drawn uniformly without replacement, in raster order, before the language
    model.

    Attributes:
        seed: of the draw.

    The draw depends on the image's pixels and the seed alone: the same for every question on an image, at any
    batch size, and for all budgets nested (the tokens at 64 are among those at 128).
    """

    name: ClassVar[str] = "random"
    seed: int = 0

    def select(self, image: ImageView) -> Selection:
        kept = random_subset(
            image.features.shape[0], self.count(image.features.shape[0]), self._seed_of(image)
        )
        return Selection(kept.to(image.features.device))

    def _seed_of(self, image: ImageView) -> int:
        # every 61st value tells images apart well enough for a blind draw, and costs next to nothing to copy
        sample = image.pixels.flatten()[::61].float().cpu().numpy().tobytes()
        digest = hashlib.blake2b(sample, digest_size=7, key=str(self.seed).encode())
        return int.from_bytes(digest.digest(), "big")


def random_subset(total: int, n: int, seed: int) -> torch.Tensor:
    """n of 0..total-1, ascending int64 [n]; a smaller n with the same seed gives a subset of it."""
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return order[:n].sort().values
