"""LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models (ICCV 2025, arXiv
2403.15388)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.base import RECEIVED, RECEIVED_KEYS, ImageView, Pruner, Selection, Signal, cls_attention
from methods.errors import UserError
from methods.registry import register

#: queries and keys of the tower's last layer, although the features are those of the one before it
LAYER = -1
#: neighbours that each selected patch takes in (released, whatever the budget)
NEIGHBOURS = 32


@register
@dataclass
class PruMerge(Pruner):
    """PruMerge: select the patches that CLS attends to most, and let each take in the patches most like it.

    Attributes:
        schedule: `exact` b - 1 selected patches and one extra token, so that b tokens enter the language
            model; `adaptive` the released rule, whatever the budget: the patches whose score is an outlier of
            the image (above Q3 + 1.5 IQR), and the extra token.

    `Trace.kept`: the selected patches by descending score, then -1 for the extra token.

    Released code followed (42Shawn/LLaVA-PruMerge 097c041): the score is one attention row over all d
    channels at once (not the mean of the heads); neighbours are selected or dropped patches alike, overlap,
    and are added with their scores as weights (no average); descending scores are the order and the
    (renumbered) positions in the language model; merging precedes the projector. Deviations: scores,
    quartiles and similarities in float32 and from the CLS row alone; each image has its own quartiles (theirs
    pool a batch); last layer of a tower of any depth (theirs is hard-coded for 24). The authors name no
    setting for a fixed budget. A budget of 1, or an image without outliers, leaves the extra token alone.

    Without CLS token (Qwen2.5-VL; nothing is released, this is ours): the score is the attention a merged
    token gets in the tower's last layer, which sums to 1 like CLS attention does; keys are that layer's,
    rotated; merging follows the 2 x 2 merger. Every token keeps its position, hence raster order; the extra
    token stands at the place of the token with most weight in it. A budget of all tokens merges nothing.
    """

    name: ClassVar[str] = "prumerge"
    signals: ClassVar[tuple[Signal, ...]] = cls_attention(LAYER)
    signals_without_cls: ClassVar[tuple[Signal, ...]] = (RECEIVED, RECEIVED_KEYS)
    schedule: Literal["exact", "adaptive"] = "exact"

    @property
    def acts(self) -> bool:
        return self.budget is not None or self.schedule == "adaptive"

    @property
    def may_exceed_budget(self) -> bool:
        return self.schedule != "exact"

    def select(self, image: ImageView) -> Selection:
        if not image.has_cls:
            return self._select_by_attention_received(image)
        keys = image[Signal("keys", LAYER)]
        scores = cls_scores(image[Signal("cls_query", LAYER)], keys)
        chosen = self.choose(scores)
        rest = complement(chosen, len(scores))
        tokens, merged = merge(image.features, keys[1:], scores, chosen, rest)
        if len(tokens) < len(scores):
            tokens = torch.cat([tokens, extra_token(image.features, scores, rest)])
        extra = chosen.new_full((len(tokens) - len(chosen),), -1)
        return Selection(torch.cat([chosen, extra]), tokens, merged=merged)

    def _select_by_attention_received(self, image: ImageView) -> Selection:
        scores = image[RECEIVED]
        if self.schedule != "adaptive" and self.count(len(scores)) == len(scores):
            return Selection(torch.arange(len(scores), device=scores.device))
        kept = self.choose(scores)
        rest = complement(kept, len(scores))
        tokens, merged = merge(image.features, image[RECEIVED_KEYS], scores, kept, rest)
        places = kept
        if len(tokens) < len(scores):
            tokens = torch.cat([tokens, extra_token(image.features, scores, rest)])
            places = torch.cat([kept, rest[scores[rest].argmax()][None]])
            kept = torch.cat([kept, kept.new_tensor([-1])])
        order = places.argsort(stable=True)
        merged = torch.where(merged < 0, -1, order.argsort()[merged])
        return Selection(kept[order], tokens[order], places=places[order], merged=merged)

    def choose(self, scores: Tensor) -> Tensor:
        """The selected patches, int64 [n], in the language model's order. scores: float32 [N]."""
        n = outliers(scores) if self.schedule == "adaptive" else self.count(len(scores)) - 1
        return ranked(scores)[:n]


@register
@dataclass
class PruMergePlus(PruMerge):
    """PruMerge+: PruMerge and evenly spread patches; by default our variant that gives exactly b tokens.

    Attributes:
        schedule: `exact` b tokens enter the language model: b // 2 patches stand evenly in the raster order,
            the best by score join them until b - 1 are selected, and the extra token. `adaptive` the released
            rule, whatever the budget: the outliers (see PruMerge) and every (N // outliers // 3)-th patch;
            about four times as many. `released` the released rule with reduction_ratio = b / 2N: b // 2 best
            and b // 2 evenly spread, selected twice where both name a patch, so b slots and b + 1 tokens;
            runs for some even b only.

    `Trace.kept`: patches by descending score, then evenly spread ones ascending, then -1 for the extra token.

    Merging, extra token and deviations are PruMerge's. `exact`, the default, is ours and covered by no
    recording (the authors have no fixed budgets, and `released` runs for some only): `released` with the
    places of repeated patches given to the next best; tables say so (`note`). Where `adaptive` fails as
    released, no outlier counts as one, and a step below 1 as 1; where it keeps every patch, there is no extra
    token (as released a zero vector, token 577).
    """

    name: ClassVar[str] = "prumerge_plus"
    schedule: Literal["exact", "released", "adaptive"] = "exact"

    @property
    def note(self) -> str:
        if self.schedule != "exact":
            return ""
        return (
            "this project's own variant with exactly the budget's tokens, which no recording of the authors' "
            "code covers; their forms are schedule=released and schedule=adaptive"
        )

    def validate(self, visual_tokens: int, layers: int) -> None:
        super().validate(visual_tokens, layers)
        b = self.count(visual_tokens)
        if self.acts and self.schedule == "released" and 2 * len(released_spread(visual_tokens, b)) != b:
            raise UserError(
                f"prumerge_plus: schedule=released cannot keep {b} of {visual_tokens} visual tokens, because "
                "its even steps do not come out; choose another even budget, or schedule=exact"
            )

    def choose(self, scores: Tensor) -> Tensor:
        order, total = ranked(scores), len(scores)
        if self.schedule == "adaptive":
            n = max(1, outliers(scores))
            spread = torch.arange(0, total - 1, max(1, total // n // 3))
        elif self.schedule == "released":
            spread = released_spread(total, self.count(total))
            return torch.cat([order[: len(spread)], spread.to(order.device)])
        else:
            b = self.count(total)
            spread = evenly(total, b // 2)
            missing = b - 1 - len(spread)
            new = ~torch.isin(order, spread.to(order.device))
            # the shortest run of best patches with `missing` of them not among the spread ones
            n = int(torch.searchsorted(new.cumsum(0), missing)) + 1 if missing else 0
        spread = spread.to(order.device)
        return torch.cat([order[:n], spread[~torch.isin(spread, order[:n])]])


def cls_scores(query: Tensor, keys: Tensor) -> Tensor:
    """Attention of CLS on the N patches as of one single head, float32 [N]; CLS has its share besides.

    query: [1, d] of CLS. keys: [1 + N, d], CLS first.
    """
    logits = (query.float() @ keys.float().T)[0] * keys.shape[-1] ** -0.5
    return logits.softmax(-1)[1:]


def ranked(scores: Tensor) -> Tensor:
    """All patches by descending score, int64 [N]; equal ones in raster order."""
    return scores.sort(descending=True, stable=True).indices


def outliers(scores: Tensor) -> int:
    """Number of scores above Q3 + 1.5 (Q3 - Q1)."""
    scores = scores.double()
    q1, q3 = scores.quantile(scores.new_tensor([0.25, 0.75]))
    return int((scores > q3 + 1.5 * (q3 - q1)).sum())


def evenly(total: int, n: int) -> Tensor:
    """n of `total` places, each in the middle of an n-th of them; int64 [n] on the host."""
    return (2 * torch.arange(n) + 1) * total // (2 * max(n, 1))


def released_spread(total: int, budget: int) -> Tensor:
    """The released code's evenly spread places for reduction_ratio = budget / (2 total), int64 on the host.

    It goes on only if these are budget / 2.
    """
    step = 2 * total // budget
    return torch.tensor(range(step // 2, total - 1, step), dtype=torch.long)


def complement(chosen: Tensor, total: int) -> Tensor:
    """The total - n patches that are not among the n chosen, ascending.

    A patch that was chosen twice costs the lowest of them its place, as released.
    """
    free = torch.ones(total, dtype=torch.int8, device=chosen.device)
    free[chosen] = 0
    return free.argsort(stable=True)[len(chosen) :]


def merge(
    features: Tensor, keys: Tensor, scores: Tensor, chosen: Tensor, rest: Tensor
) -> tuple[Tensor, Tensor]:
    """New values [n, d] of the n chosen patches: each its own, plus the sum of score times value over its 32
    nearest among all others (cosine of keys). And int64 [N], for each patch of the rest the place of the
    chosen one most like it among those that took it in (by the same weight), n (the extra token) if none did;
    -1 for the chosen.

    features, keys: [N, d]. scores: float32 [N]. chosen [n], rest [N - n]: int64.
    """
    others = torch.cat([chosen, rest])
    keys = F.normalize(keys.float(), dim=-1)[others]
    likeness = keys[: len(chosen)] @ keys.T
    likeness.fill_diagonal_(-torch.inf)  # itself
    nearest = likeness.topk(min(NEIGHBOURS, len(others) - 1)).indices
    weights = torch.zeros_like(likeness).scatter_(1, nearest, scores[others][nearest])
    tokens = features[chosen] + (weights @ features[others].float()).to(features.dtype)
    taken = torch.full_like(likeness, -torch.inf).scatter_(1, nearest, likeness.gather(1, nearest))
    none = likeness.new_full((1, len(others)), -torch.finfo(likeness.dtype).max)
    holder = torch.cat([taken, none]).argmax(0)[len(chosen) :]
    return tokens, torch.full_like(others, -1).index_put((rest,), holder)


def extra_token(features: Tensor, scores: Tensor, rest: Tensor) -> Tensor:
    """All patches that were not chosen in one token [1, d]: the sum of score times value."""
    return (scores[rest] @ features[rest].float())[None].to(features.dtype)
