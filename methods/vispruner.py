"""VisPruner: Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs (ICCV
2025, arXiv 2412.01818 v2; v1 was FasterVLM)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.base import RECEIVED, ImageView, Pruner, Selection, Signal, cls_attention
from methods.errors import UserError
from methods.registry import register
from methods.together import by_size

#: the features' own layer: second to last (index 22 of CLIP-L's 24), of which the attention is read
LAYER = -2
#: tokens thrown away in a round
CUT = 8


@register
@dataclass
class VisPruner(Pruner):
    """VisPruner: keep what CLS attends to most (important), and of the others what is left when the most
    similar ones have been thrown away, a few a round (diverse).

    Attributes:
        important_ratio: share of the b tokens that are important, 0 to 1, the number truncated (released
            default: 0.5; their example for 64 tokens is 0.75). At 1 the method is plain top-b by CLS
            attention, which was FasterVLM.

    Released code followed (Theia-4869/VisPruner aefa01a): scores are the mean over the heads of CLS's
    attention in the features' own layer; similarity is the cosine of features before the projector; raster
    order, values unchanged, positions renumbered. Deviations: float32 throughout, and equal values stay in
    order (theirs sort in half precision, unstably); an odd number of tokens splits into halves one apart, and
    a round cuts no more than one half has (theirs fails there).

    The rounds are chaotic: two neighbours swapped in one of them, 1e-7 apart, change the sides of others in
    all later ones. Which diverse tokens stay thus differs from one machine, batch size or dtype to another,
    by construction; accuracies can be compared, kept tokens cannot.

    Qwen2.5-VL (nothing is released for it; ours): scores are the attention that merged tokens get in the
    tower's last layer, features the merged tokens; positions are kept.
    """

    name: ClassVar[str] = "vispruner"
    signals: ClassVar[tuple[Signal, ...]] = cls_attention(LAYER)
    signals_without_cls: ClassVar[tuple[Signal, ...]] = (RECEIVED,)
    important_ratio: float = 0.5

    def validate(self, visual_tokens: int, layers: int) -> None:
        super().validate(visual_tokens, layers)
        if not 0 <= self.important_ratio <= 1:
            raise UserError(f"vispruner: important_ratio={self.important_ratio} must lie between 0 and 1")

    def split(self, visual_tokens: int) -> tuple[int, int]:
        """(important, diverse) of an image's tokens."""
        budget = self.count(visual_tokens)
        important = int(budget * self.important_ratio)
        return important, budget - important

    def select(self, image: ImageView) -> Selection:
        return self.select_all([image])[0]

    def select_all(self, images: Sequence[ImageView]) -> list[Selection]:
        return by_size(images, self._select)

    def _select(self, images: list[ImageView]) -> list[Selection]:
        scores = torch.stack([_scores(image) for image in images])
        features = torch.stack([image.features for image in images])
        important, diverse = choose(scores, features, *self.split(scores.shape[1]))
        return [Selection(kept) for kept in torch.cat([important, diverse], 1).sort(1).values]


def _scores(image: ImageView) -> Tensor:
    return image.cls_attention(LAYER)[:, 1:].mean(0) if image.has_cls else image[RECEIVED]


def choose(scores: Tensor, features: Tensor, important: int, diverse: int) -> tuple[Tensor, Tensor]:
    """Important tokens by descending score, int64 [B, important], and the last pool, [B, diverse].

    scores: float32 [B, N]. features: [B, N, d].
    """
    order = scores.sort(dim=1, descending=True, stable=True).indices
    rest = order[:, important:]
    if not diverse:
        return order[:, :important], rest[:, :0]
    pool = torch.arange(rest.shape[1], device=rest.device).expand(len(rest), -1)
    similar = cosines(features.gather(1, rest[..., None].expand(-1, -1, features.shape[2])))
    while pool.shape[1] > diverse:
        pool = one_round(pool, similar, diverse)
    return order[:, :important], rest.gather(1, pool)


def cosines(features: Tensor) -> Tensor:
    """Of all pairs: [B, R, d] -> float32 [B, R, R]."""
    unit = F.normalize(features.float(), dim=-1)
    return unit @ unit.mT


def one_round(pool: Tensor, similar: Tensor, diverse: int) -> Tensor:
    """The pool without the `CUT` tokens at even places that have the most similar one at an odd place, or as
    many as leave `diverse`: int64 [B, R - 8]. Those left at even places come first, the most similar ahead,
    which decides who stands where in the next round.

    pool: int64 [B, R], places in similar [B, N, N].
    """
    even, odd = pool[:, ::2], pool[:, 1::2]
    cut = min(CUT, pool.shape[1] - diverse, even.shape[1])
    pairs = even[:, :, None] * similar.shape[2] + odd[:, None]
    nearest = similar.flatten(1).gather(1, pairs.flatten(1)).view(pairs.shape).amax(2)
    order = nearest.sort(dim=1, descending=True, stable=True).indices[:, cut:]
    return torch.cat([even.gather(1, order), odd], 1)
