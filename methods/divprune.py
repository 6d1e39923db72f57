"""DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models (CVPR 2025, arXiv
2503.02175)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.base import ImageView, Pruner, Selection
from methods.registry import register
from methods.together import by_size


@register
@dataclass
class DivPrune(Pruner):
    """DivPrune: keep b tokens that lie as far apart as a greedy search finds: max-min cosine distance of the
    projected features. Neither text nor attention is read.

    Attributes:
        order: in which the language model reads them: `raster` as in the released code, or `picked`, the
            order of selection, as in the runs behind the paper's table (the authors' issue 8).

    Released code followed (vbdi/divprune 799e2d9): the first token is the one whose nearest other token is
    farthest; then again and again the one whose nearest chosen token is farthest; values unchanged, positions
    renumbered. Deviations: distances in float32 (theirs in the model's dtype, where ties are common); a
    chosen token is no candidate any more (theirs repeats tokens where an image has fewer than b distinct
    ones); each image of a batch or prompt for itself (theirs applies the first row's choice to all); a zero
    vector is at distance 1 from all.

    Qwen2.5-VL (nothing is released for it; ours): the same on merged tokens, which keep their positions.
    """

    name: ClassVar[str] = "divprune"
    order: Literal["raster", "picked"] = "raster"

    def select(self, image: ImageView) -> Selection:
        return self.select_all([image])[0]

    def select_all(self, images: Sequence[ImageView]) -> list[Selection]:
        return by_size(images, self._select)

    def _select(self, images: list[ImageView]) -> list[Selection]:
        tokens = images[0].project(torch.stack([image.features for image in images]))
        kept = farthest(tokens, self.count(tokens.shape[1]))
        if self.order == "raster":
            kept = kept.sort(1).values
        return [Selection(own, x[own], projected=True) for own, x in zip(kept, tokens)]


def farthest(tokens: Tensor, n: int) -> Tensor:
    """n tokens of each image in order of selection, int64 [B, n] (Algorithm 1 of the paper).

    tokens: [B, N, D]. A running minimum takes one row of the distances per step, and gives the same bits as a
    minimum over all chosen rows.
    """
    unit = F.normalize(tokens.float(), dim=-1)
    distance = 1 - unit @ unit.mT
    own = distance.diagonal(dim1=1, dim2=2)
    own.fill_(torch.inf)
    pick = distance.amin(1).argmax(1)
    own.fill_(-torch.inf)  # of a chosen token to itself: never picked again
    rows = torch.arange(len(tokens), device=tokens.device)
    picked, nearest = [pick], distance[rows, pick]
    for _ in range(n - 1):
        pick = nearest.argmax(1)
        picked.append(pick)
        torch.minimum(nearest, distance[rows, pick], out=nearest)
    return torch.stack(picked, 1)
