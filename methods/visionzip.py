"""VisionZip: Longer is Better but Not Necessary in Vision Language Models (CVPR 2025, arXiv 2412.04467)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.errors import UserError
from methods.base import ImageView, Pruner, Selection, Signal, cls_attention
from methods.registry import register

#: the features' own layer: second to last (index 22 of CLIP-L's 24), of which everything below is read
LAYER = -2
#: the authors' 54 dominant to 10 contextual tokens
CONTEXTUAL_SHARE = 10 / 64


@register
@dataclass
class VisionZip(Pruner):
    """VisionZip: keep what CLS attends to most (dominant), merge the rest into a few contextual tokens.

    contextual: number of contextual tokens; left out, b / 6.4, rounded (30 / 20 / 10 for 192 / 128 / 64, the
    authors' ratio; only 54 + 10 stands in their repository). The others of the b tokens are dominant, CLS one
    of them. `Trace.kept`: -1 for CLS, then the dominant patches, then the contextual tokens' targets.

    Released code followed (dvlab-research/VisionZip 3151f6d): CLS itself enters the language model,
    contextual tokens are target + mean of the merged (a sum, not the group's average), positions are
    renumbered, merging precedes the projector. Deviations: scores in float32 and from the CLS row alone;
    second-to-last layer of a tower of any depth (theirs is hard-coded for 24). A budget of 1 keeps CLS alone,
    2 or 3 have no contextual token.
    """

    name: ClassVar[str] = "visionzip"
    signals: ClassVar[tuple[Signal, ...]] = cls_attention(LAYER)
    contextual: int | None = None

    def split(self, visual_tokens: int) -> tuple[int, int]:
        """(dominant with CLS, contextual). Raises UserError if `contextual` leaves no dominant token."""
        budget = self.count(visual_tokens)
        contextual = round(budget * CONTEXTUAL_SHARE) if self.contextual is None else self.contextual
        if not 0 <= contextual < budget:
            raise UserError(
                f"visionzip: contextual={contextual} must lie between 0 and {budget - 1} (budget - 1)"
            )
        return budget - contextual, contextual

    def validate(self, visual_tokens: int, layers: int) -> None:
        super().validate(visual_tokens, layers)
        self.split(visual_tokens)

    def select(self, image: ImageView) -> Selection:
        dominant, contextual = self.split(image.features.shape[0])
        chosen, rest = dominant_patches(image.cls_attention(LAYER), dominant - 1)
        cls, parts = chosen.new_tensor([-1]), [image.hidden[:1], image.features[chosen]]
        kept = [cls, chosen]
        if contextual:
            keys = image[Signal("keys", LAYER)][1:].unflatten(-1, (image.heads, -1)).mean(1)
            targets, merged = merge(image.features[rest], keys[rest], contextual)
            kept.append(rest[targets])
            parts.append(merged)
        return Selection(torch.cat(kept), torch.cat(parts))


def dominant_patches(attention: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n patches with the highest CLS attention summed over heads, and all others, both ascending.

    attention: [H, 1 + N], column 0 is CLS and is left out, not renormalised.
    """
    scores = attention[:, 1:].sum(0)
    chosen = torch.zeros_like(scores, dtype=torch.int8)
    chosen[scores.topk(n).indices] = 1
    order = (1 - chosen).argsort(stable=True)
    return order[:n], order[n:]


def merge(features: Tensor, keys: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Merge m leftover tokens into n: indices of the n targets, and their new values [n, d].

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
    return targets, features[targets] + joined / count.clamp(min=1)[:, None]
