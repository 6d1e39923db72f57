"""DART: Stop Looking for "Important Tokens" in Multimodal Language Models: Duplication Matters More (EMNLP
2025, arXiv 2502.11494)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.base import Pruner, Selection, Stage, StageView
from methods.errors import UserError
from methods.registry import register


@register
@dataclass
class DART(Pruner):
    """DART: after K decoder layers, keep a few pivots, and for each of them the visual tokens least like it.

    Each pivot keeps the same number t of other visual tokens.

    Attributes:
        k: decoder layers that see all visual tokens, 1 to L - 1.
        schedule: what the budget b means: `released` t = b // (image_pivots + text_pivots), as the authors'
            setting of that name, so that the image's pivots come on top: b + 4 tokens for 192, 128, 64; `fit`
            the largest t that stays within b (188 / 124 / 60); `average` the t whose mean over the layers'
            inputs is nearest to b (164 / 100 / 28 of 32 layers).
        image_pivots: how many of the image's tokens are pivots, at least 1.
        text_pivots: how many tokens of the text behind the (last) image are, 0 or more.

    Released code followed (ZichenWen1/DART, as of 31 Aug 2025): pivots have the largest L1 norm of the keys
    (rotated, all heads side by side) that the layer before the cut made; likeness is the cosine of that
    layer's output behind the language model's final norm; the pivots choose one after the other, without
    replacement, **in the order in which CPython iterates a set of their absolute positions**, which decides
    and is kept. Text pivots choose too. Raster order, original positions. Deviations: norms and cosines in
    float32; batches with padding (theirs fail); each image of a prompt for itself (theirs takes the first for
    the image and the others for text); fewer pivots where there are fewer tokens (theirs fails).

    Qwen2.5-VL: as in the authors' release for it, where the share is a fraction and not a number.
    """

    name: ClassVar[str] = "dart"
    k: int = 2
    schedule: Literal["released", "fit", "average"] = "released"
    image_pivots: int = 4
    text_pivots: int = 4

    @property
    def may_exceed_budget(self) -> bool:
        return self.schedule == "released"

    @property
    def note(self) -> str:
        if self.schedule != "released":
            return ""
        return (
            f"DART as released keeps {self.image_pivots} tokens more than the budget (schedule=fit does not)"
        )

    def stages(self, visual_tokens: int, layers: int) -> list[Stage]:
        if not self.acts:
            return []
        t = self.share(visual_tokens, layers)

        def select(sample: StageView) -> Selection:
            return self.choose(sample, [self.share(n, layers) for n in sample.sizes])

        left = min(self.image_pivots + t * self.pivots, visual_tokens)
        return [Stage(self.k, select, attention=None, count=left, keys=True)]

    @property
    def pivots(self) -> int:
        return self.image_pivots + self.text_pivots

    def share(self, visual_tokens: int, layers: int) -> int:
        """How many of an image's tokens each pivot keeps, beside the pivots themselves."""
        return max(0, self._share(visual_tokens, layers))

    def _share(self, visual_tokens: int, layers: int) -> int:
        budget = self.count(visual_tokens)
        if budget == visual_tokens:
            return budget
        if self.schedule == "fit":
            return (budget - self.image_pivots) // self.pivots
        if self.schedule == "average":
            left = (layers * budget - self.k * visual_tokens) / (layers - self.k)
            return round((left - self.image_pivots) / self.pivots) if left >= self.image_pivots else -1
        exact = self.budget * visual_tokens if isinstance(self.budget, float) else budget
        return int(exact / self.pivots)

    def validate(self, visual_tokens: int, layers: int) -> None:
        if not self.acts:
            return
        if not 1 <= self.k < layers:
            raise UserError(
                f"dart: k={self.k} must lie between 1 and {layers - 1} for a model of {layers} layers"
            )
        if self.image_pivots < 1 or self.text_pivots < 0:
            raise UserError(
                f"dart: image_pivots={self.image_pivots} must be 1 or more, "
                f"text_pivots={self.text_pivots} 0 or more"
            )
        super().validate(visual_tokens, layers)
        if self._share(visual_tokens, layers) >= 0:
            return
        if self.schedule == "fit":
            raise UserError(
                f"dart: a budget of {self.budget} does not hold the {self.image_pivots} image pivots; use a "
                "larger one or fewer image_pivots"
            )
        raise UserError(
            f"dart: a mean of {self.budget} visual tokens over {layers} layers cannot be had: the first "
            f"{self.k} see all {visual_tokens}; use a larger budget, smaller k or schedule=fit"
        )

    def choose(self, sample: StageView, shares: list[int]) -> Selection:
        """Each image's survivors, ascending. shares: tokens that each pivot keeps, by image."""
        norms = sample.keys.abs().sum(-1, dtype=torch.float32)
        unit = F.normalize(sample.final_norm(sample.sequence).float(), dim=-1)
        behind = torch.arange(sample.length, device=norms.device) > sample.places[-1]
        in_text = norms.where(behind, -torch.inf).topk(min(self.text_pivots, sample.length)).indices
        kept, start = [], 0
        for n, t in zip(sample.sizes, shares):
            places = sample.places[start : start + n]
            pivots = norms[places].topk(min(self.image_pivots, n)).indices
            order = visits(places[pivots], in_text, sample.places[-1])
            own = least_alike(unit[order], unit[places], pivots, t)
            kept.append(own.sort().values + start)
            start += n
        return Selection(torch.cat(kept))


def visits(in_image: Tensor, in_text: Tensor, last: Tensor) -> Tensor:
    """Absolute positions of the pivots in the order in which they choose, int64 [P].

    in_image, in_text: their positions by falling norm; those in the text must lie behind `last`, the position
    of the last visual token. The order is a set's; one transfer to the host and one back.
    """
    *found, end = torch.cat([in_image, in_text, last[None]]).tolist()
    image, text = found[: len(in_image)], found[len(in_image) :]
    return torch.tensor(list({*image, *(place for place in text if place > end)}), device=in_image.device)


def least_alike(pivots: Tensor, tokens: Tensor, own: Tensor, t: int) -> Tensor:
    """`own`, and for each pivot in turn the t tokens least like it that are not kept yet: int64 [n].

    pivots: [P, D], tokens: [N, D], unit vectors. own: int64, the tokens that are pivots themselves.
    """
    likeness = pivots @ tokens.T
    likeness.index_fill_(1, own, torch.inf)
    kept, left = [own], len(tokens) - len(own)
    for row in likeness:
        picked = row.topk(min(t, left), largest=False).indices
        likeness.index_fill_(1, picked, torch.inf)
        kept.append(picked)
        left -= len(picked)
    return torch.cat(kept)
