"""HoloV: Don't Just Chase "Highlighted Tokens" in MLLMs: Revisiting Visual Holistic Context Retention
(NeurIPS 2025, arXiv 2510.02912)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from methods.base import RECEIVED, ImageView, Pruner, Selection, Signal, cls_attention
from methods.errors import UserError
from methods.registry import register

#: the features' own layer: second to last (index 22 of CLIP-L's 24), of which the attention is read
LAYER = -2
#: the tower's own order of tokens, which the Qwen2.5-VL release takes for the raster's
TOWER_ORDER = Signal("order", -1)
#: crops x budget, of 576 visual tokens (released: 16 crops for 64)
CROPS_TIMES_BUDGET = 1024
EPSILON = 1e-6
#: attention sums to 1 over the image; this makes a crop's mean about 1
SCALE = 1000


@register
@dataclass
class HoloV(Pruner):
    """HoloV: share the budget out among crops of the image, then keep what CLS attends to most in each.

    Attributes:
        crops: number of crops, runs of the raster order, 1 to N; None: 1024 / b of 576 (5 / 8 / 16 for 192 /
            128 / 64; only 16 for 64 is in the authors' LLaVA code, the rule is in their Qwen code).
        alpha: weight of the variance of similarity in a crop's score, 0 or more; it cancels out (see
            `crop_scores`), 0 saves computing it and projecting the dropped patches.
        form: without CLS token, `repaired` or `released` (below); with one they do not differ.

    `Trace.kept`: crop by crop, by descending attention inside a crop, then -1 for each zero vector.

    Released code followed (obananas/HoloV 1d2e65e): attention alone picks the patches of a crop; a crop whose
    share exceeds it is kept whole, in raster order, and what is left of its share is lost: zero vectors fill
    up to b. They enter the language model as tokens and are attended to. Positions are renumbered in the
    order kept. Deviations: attention and similarity in float32; equal scores in raster order; crops are at
    most as many as patches, and a crop of a single patch is scored like the others (theirs a thousand times
    lower; budgets of 1 to 3 of 576 only).

    Without CLS token (Qwen2.5-VL) as in the authors' code for it: the attention is what merged tokens get in
    the tower's last layer, and every token keeps its position; a zero vector has the last one's. The form
    `repaired` puts that attention into raster order and offers the image's tokens; `released` does neither,
    as their code: scores stay in the tower's window order, and the slice of N tokens that is scored and
    pruned starts one early, at `<|vision_start|>`, so that this token may be dropped and the image's last one
    always stays (b + 1 tokens). `Trace.kept` then counts `<|vision_start|>` as token 0.
    """

    name: ClassVar[str] = "holov"
    signals: ClassVar[tuple[Signal, ...]] = cls_attention(LAYER)
    signals_without_cls: ClassVar[tuple[Signal, ...]] = (RECEIVED, TOWER_ORDER)
    crops: int | None = None
    alpha: float = 0.09
    form: Literal["repaired", "released"] = "repaired"

    @property
    def may_exceed_budget(self) -> bool:
        return self.form == "released"

    def text_before(self, has_cls: bool) -> int:
        return 1 if self.form == "released" and not has_cls else 0

    def number_of_crops(self, visual_tokens: int) -> int:
        """Raises UserError if `crops` is not 1 to the number of visual tokens."""
        if self.crops is None:
            rule = CROPS_TIMES_BUDGET * visual_tokens // (576 * self.count(visual_tokens))
            return min(max(1, rule), visual_tokens)
        if not 1 <= self.crops <= visual_tokens:
            raise UserError(f"holov: crops={self.crops} must lie between 1 and {visual_tokens}")
        return self.crops

    def validate(self, visual_tokens: int, layers: int) -> None:
        super().validate(visual_tokens, layers)
        if not 0 <= self.alpha < math.inf:
            raise UserError(f"holov: alpha={self.alpha} must be 0 or more")
        if self.acts:
            self.number_of_crops(visual_tokens)

    def select(self, image: ImageView) -> Selection:
        if image.has_cls:
            return self._share_out(image.cls_attention(LAYER)[:, 1:].mean(0), image.features, image.project)
        attention, tokens = image[RECEIVED], image.features
        if self.form == "repaired":
            return self._share_out(attention, tokens, image.project)
        answer = self._share_out(attention[image[TOWER_ORDER]], tokens[:-1], image.project)
        last = answer.kept.new_tensor([len(attention)])
        kept, places = (torch.cat([x, last]) for x in (answer.kept, answer.places))
        return Selection(kept, torch.cat([answer.tokens, tokens[-1:]]), projected=True, places=places)

    def _share_out(self, attention: Tensor, features: Tensor, project) -> Selection:
        """attention: float32 [N] on the patches of `features` [N, d]. project: [.., d] -> [.., D]."""
        places = crop(len(attention), self.number_of_crops(len(attention))).to(attention.device)
        projected = project(features) if self.alpha else None
        scores = crop_scores(attention, places, projected, self.alpha)
        budget = self.count(len(attention))
        kept = most_attended(attention, places, quotas(scores, budget))
        tokens = project(features[kept]) if projected is None else projected[kept]
        lost = budget - len(kept)
        tokens = torch.cat([tokens, tokens.new_zeros(lost, tokens.shape[1])])
        kept, own = (torch.cat([kept, kept.new_full((lost,), fill)]) for fill in (-1, len(attention) - 1))
        return Selection(kept, tokens, projected=True, places=own)


def crop(total: int, crops: int) -> Tensor:
    """Cut 0..total-1 into runs, the first total % crops of them one longer: int64 [P, longest], -1 behind a
    shorter one's end. On the host."""
    size, longer = divmod(total, crops)
    start = torch.arange(crops) * size + torch.arange(crops).clamp(max=longer)
    end = torch.cat([start[1:], torch.tensor([total])])
    places = start[:, None] + torch.arange(size + (longer > 0))
    return places.where(places < end[:, None], -1)


def crop_scores(attention: Tensor, places: Tensor, tokens: Tensor | None, alpha: float) -> Tensor:
    """How much a crop matters: mean over its patches of attention plus alpha x scaled variance, float32 [P].

    A patch's variance is that of its cosines with the others of its crop. It is scaled by the crop's mean
    attention over the crop's mean variance, so that the mean is (1 + alpha) x mean attention: the crops'
    shares do not depend on the variance, up to EPSILON.
    attention: float32 [N]. places: [P, m], see `crop`. tokens: [N, D] as the language model would get them,
    None if alpha is 0.
    """
    real = places >= 0
    n = real.sum(1)
    salience = SCALE * attention[places] * real
    if not alpha:
        return salience.sum(1) / n
    unit = tokens.float() / (tokens.float().norm(dim=-1, keepdim=True) + EPSILON)
    unit = unit[places] * real[..., None]
    cosines = unit @ unit.mT
    cosines.diagonal(dim1=1, dim2=2).zero_()
    others = (n - 1).clamp(min=1)[:, None]
    deviation = (cosines - cosines.sum(2, keepdim=True) / others[..., None]) * real[:, None]
    variance = deviation.square().sum(2) / others * real
    scale = (salience.sum(1) / n) / (variance.sum(1) / n + EPSILON)
    return (salience + alpha * scale[:, None] * variance).sum(1) / n


def quotas(scores: Tensor, budget: int) -> Tensor:
    """Shares of the budget in proportion to the crops' scores, rounded down; what is left goes one each to
    the crops with the highest scores. int64 [P]."""
    weights = scores / (scores.sum() + EPSILON)
    share = (weights * budget).floor().long()
    rank = weights.sort(descending=True, stable=True).indices.argsort()
    return share + (rank < budget - share.sum())


def most_attended(attention: Tensor, places: Tensor, quota: Tensor) -> Tensor:
    """The `quota` most attended patches of each crop, crop by crop, by descending attention; of a crop with
    no more patches than that all, in raster order. int64 [n], n <= the quotas' sum."""
    real = places >= 0
    order = attention[places].where(real, -1).sort(dim=1, descending=True, stable=True).indices
    whole = (quota >= real.sum(1))[:, None]
    places = places.gather(1, order).where(~whole, places)
    rank = torch.arange(places.shape[1], device=places.device)
    return places[(rank < quota[:, None]) & (places >= 0)]
