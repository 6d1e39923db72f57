"""VisionZip: Longer is Better but Not Necessary in Vision Language Models (CVPR 2025, arXiv 2412.04467)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.base import RECEIVED, RECEIVED_KEYS, ImageView, Pruner, Selection, Signal, cls_attention
from methods.errors import UserError
from methods.registry import register

#: the features' own layer: second to last (index 22 of CLIP-L's 24), of which everything below is read
LAYER = -2
#: the authors' 54 dominant to 10 contextual tokens
CONTEXTUAL_SHARE = 10 / 64
#: contextual tokens of the Qwen2.5-VL release, as a share of the image's tokens
CONTEXTUAL_SHARE_OF_IMAGE = 0.05


@register
@dataclass
class VisionZip(Pruner):
    """VisionZip: keep what CLS attends to most (dominant), merge the rest into a few contextual tokens.

    Attributes:
        contextual: number of contextual tokens; below 1 a share of the image's tokens, truncated, at least 1;
            None: b / 6.4, rounded (30 / 20 / 10 for 192 / 128 / 64, the authors' ratio; only 54 + 10 stands
            in their repository). The others of the b tokens are dominant, CLS one of them.
        dominant: number of dominant tokens as such a share, whatever the budget; None: what is left of it.

    `Trace.kept`: -1 for CLS, then the dominant patches, then the contextual tokens' targets.

    Released code followed (dvlab-research/VisionZip 3151f6d): CLS itself enters the language model,
    contextual tokens are target + mean of the merged (a sum, not the group's average), positions are
    renumbered, merging precedes the projector. Deviations: scores in float32 and from the CLS row alone;
    second-to-last layer of a tower of any depth (theirs is hard-coded for 24). A budget of 1 keeps CLS alone,
    2 or 3 have no contextual token.

    Without CLS token (Qwen2.5-VL) as in the authors' release for it (68993a3): dominant are the merged tokens
    that get most attention in the tower's last layer; keys are that layer's, rotated; merging follows the
    2 x 2 merger; all tokens stand in raster order, a contextual one at its target's place, and keep their
    positions. Their setting is dominant=0.65,contextual=0.05; for a budget, contextual is left at 0.05 (ours:
    nothing is released for low budgets), so that 1/9 is divided 55 : 45.
    """

    name: ClassVar[str] = "visionzip"
    signals: ClassVar[tuple[Signal, ...]] = cls_attention(LAYER)
    signals_without_cls: ClassVar[tuple[Signal, ...]] = (RECEIVED, RECEIVED_KEYS)
    contextual: int | float | None = None
    dominant: float | None = None

    @property
    def acts(self) -> bool:
        return self.budget is not None or self.dominant is not None

    @property
    def may_exceed_budget(self) -> bool:
        return self.dominant is not None

    def split(self, visual_tokens: int, has_cls: bool = True) -> tuple[int, int]:
        """(dominant with CLS, contextual) of an image's tokens. Raises UserError if the settings leave no
        dominant token, or more than there are."""
        budget, contextual = self.count(visual_tokens), self.contextual
        if contextual is None and has_cls and self.dominant is None:
            contextual = round(budget * CONTEXTUAL_SHARE)
        elif contextual is None:
            contextual = min(max(1, int(CONTEXTUAL_SHARE_OF_IMAGE * visual_tokens)), budget - 1)
        elif isinstance(contextual, float):
            contextual = max(1, int(contextual * visual_tokens))
        dominant = budget - contextual
        if self.dominant is not None:
            dominant = max(1, int(self.dominant * visual_tokens))
        if contextual < 0 or not 1 <= dominant <= visual_tokens - contextual:
            raise UserError(
                f"visionzip: {contextual} contextual tokens cannot stand beside {dominant} dominant ones; of "
                f"an image's {visual_tokens} at least one is dominant, and the budget holds both"
            )
        return dominant, contextual

    def validate(self, visual_tokens: int, layers: int) -> None:
        super().validate(visual_tokens, layers)
        self.split(visual_tokens)

    def select(self, image: ImageView) -> Selection:
        if not image.has_cls:
            return self._select_by_attention_received(image)
        dominant, contextual = self.split(image.features.shape[0])
        chosen, rest = dominant_patches(image.cls_attention(LAYER), dominant - 1)
        cls, parts = chosen.new_tensor([-1]), [image.hidden[:1], image.features[chosen]]
        merged = torch.full_like(image.features[:, 0], -1, dtype=torch.long)
        kept = [cls, chosen]
        if contextual:
            keys = image[Signal("keys", LAYER)][1:].unflatten(-1, (image.heads, -1)).mean(1)
            targets, values, joined = merge(image.features[rest], keys[rest], contextual)
            kept.append(rest[targets])
            parts.append(values)
            merged = merged.index_put((rest,), torch.where(joined < 0, -1, joined + dominant))
        return Selection(torch.cat(kept), torch.cat(parts), merged=merged)

    def _select_by_attention_received(self, image: ImageView) -> Selection:
        dominant, contextual = self.split(len(image.features), has_cls=False)
        kept, rest = highest(image[RECEIVED], dominant)
        tokens, merged = image.features[kept], torch.full_like(image[RECEIVED], -1, dtype=torch.long)
        if contextual:
            keys = image[RECEIVED_KEYS].unflatten(-1, (image.heads, -1)).mean(1)
            targets, values, joined = merge(image.features[rest], keys[rest], contextual)
            kept, order = torch.cat([kept, rest[targets]]).sort()
            tokens = torch.cat([tokens, values])[order]
            place = order.argsort()[dominant:]  # of each contextual token
            merged = merged.index_put((rest,), torch.where(joined < 0, -1, place[joined]))
        return Selection(kept, tokens, merged=merged)


def dominant_patches(attention: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n patches with the highest CLS attention summed over heads, and all others, both ascending.

    attention: [H, 1 + N], column 0 is CLS and is left out, not renormalised.
    """
    return highest(attention[:, 1:].sum(0), n)


def highest(scores: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n tokens with the highest scores [N], and all others, both ascending int64."""
    chosen = torch.zeros_like(scores, dtype=torch.int8)
    chosen[scores.topk(n).indices] = 1
    order = (1 - chosen).argsort(stable=True)
    return order[:n], order[n:]


def merge(features: Tensor, keys: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Merge m leftover tokens into n: indices of the n targets, their new values [n, d], and which of the n
    each of the m joined, int64 [m] (-1: a target).

    Targets stand at every floor(m / n)-th place; every other token joins the target with the most similar key
    (cosine). A target's new value is its own plus the mean of those that joined it.
    features: [m, d]. keys: [m, d_head], mean over heads.
    """
    m = len(features)
    step = max(1, m // n)
    targets = torch.arange(0, m, step, device=features.device)[:n]
    others = torch.ones(m, dtype=torch.bool)
    others[::step][:n] = False
    others = others.nonzero()[:, 0].to(features.device)  # the same places for every image: known on the host
    keys = F.normalize(keys.float(), dim=-1)
    nearest = (keys[others] @ keys[targets].T).argmax(1)
    joined = features.new_zeros(len(targets), features.shape[1]).index_add_(0, nearest, features[others])
    count = features.new_zeros(len(targets)).index_add_(0, nearest, features.new_ones(len(others)))
    where = torch.full_like(keys[:, 0], -1, dtype=torch.long).index_put((others,), nearest)
    return targets, features[targets] + joined / count.clamp(min=1)[:, None], where
