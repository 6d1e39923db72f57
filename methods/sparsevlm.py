"""SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference (ICML 2025, arXiv
2410.04417)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from methods.base import PromptView, Pruner, Selection, Stage, StageView
from methods.errors import UserError
from methods.registry import register
from methods.schedules import TOLERANCE, mean_over_layers, scaled

#: layers (of 32) that have run at each cut: the authors' 0-based layers 2, 6, 15 are the last uncut ones
CUTS = (3, 7, 16)
#: tokens kept at each cut, beside the recycled ones, by budget of 576 (the authors' table in score.py); the
#: first and last row are ours and close it
TABLE_TOKENS = 576
TABLE = {
    0: (0, 0, 0),
    64: (66, 30, 17),
    96: (238, 48, 26),
    128: (303, 110, 36),
    192: (300, 200, 110),
    TABLE_TOKENS: (TABLE_TOKENS,) * 3,
}


@register
@dataclass
class SparseVLM(Pruner):
    """SparseVLM, v1.5: words that look at the image rate the visual tokens; part of the dropped is recycled.

    Cuts after 3, 7, 16 of 32 layers; for L layers at round(cut L / 32), so after 1, 3, 6 of 12.

    Attributes:
        schedule: `table` the authors' counts for b = 192 / 128 / 96 / 64 (left after each cut, recycled
            tokens included: 309, 204, 113 / 312, 117, 39 / 249, 55, 27 / 82, 32, 18). Their b is a mean over
            the layers' outputs; the mean over the layers' inputs is higher (206.5 / 145.4 / 114.1 / 82.3).
            They give no rule for other budgets: ours is linear between the rows, from 0 to all tokens, at
            least 1; counts scale with N / 576. `average` the row of that kind whose mean over the layers'
            inputs is nearest to b.

    `Trace.kept`: a recycled token is -(1000 s + j), cluster j (from 0) made at cut s (from 1).

    Released code followed (Gumpest/SparseVLMs 26a5f48, USE_VERSION unset, which is v1.5 and has no
    rank-adaptive count): raters from the embeddings before layer 0; survivors in original order, then
    clusters by falling peak, then text; all numbered anew, so that a decoded token's position is each layer's
    own cache length. Deviations: no random noise of 1e-6 in the density (released runs in half precision
    round it away; equal peaks, the rule where there are two clusters, keep torch.topk's order); scores and
    clusters in float32; a count of all tokens cuts nothing (theirs always drops one). If no word rates above
    average all of them rate. Several images of a prompt are rated together and their survivors stand where
    the first one was (theirs cuts the first only). With M-RoPE (nothing is released) every token keeps its
    position, as in the authors' v2.0, and a recycled one has its cluster centre's.
    """

    name: ClassVar[str] = "sparsevlm"
    may_exceed_budget = True
    schedule: Literal["table", "average"] = "table"

    def stages(self, visual_tokens: int, layers: int) -> list[Stage]:
        return [
            Stage(layer, functools.partial(sparsify, number), rows=raters, positions="renumbered", count=keep)
            for number, (layer, keep) in enumerate(self.plan(visual_tokens, layers), start=1)
        ]

    def plan(self, visual_tokens: int, layers: int) -> list[tuple[int, int]]:
        """(layers that have run, tokens of an image kept, recycled ones aside) at each cut."""
        cuts, label = scaled(CUTS, layers), self.count(visual_tokens)
        if self.schedule == "average":
            rows = {n: table_row(n, visual_tokens) for n in range(1, visual_tokens + 1)}
            label = min(rows, key=lambda n: abs(mean_of(rows[n], cuts, visual_tokens, layers) - label))
        return list(zip(cuts, table_row(label, visual_tokens)))

    def validate(self, visual_tokens: int, layers: int) -> None:
        super().validate(visual_tokens, layers)
        if not self.acts or self.schedule != "average":
            return
        budget, (cuts, keeps) = self.count(visual_tokens), zip(*self.plan(visual_tokens, layers))
        mean = mean_of(keeps, cuts, visual_tokens, layers)
        if abs(mean - budget) > TOLERANCE * budget:
            raise UserError(
                f"sparsevlm: a mean of {budget} visual tokens over {layers} layers cannot be had: the first "
                f"{cuts[0]} see all {visual_tokens} (nearest: {mean:.1f}); use a larger budget or "
                "schedule=table"
            )


def table_row(budget: int, visual_tokens: int) -> list[int]:
    """Tokens kept at each cut: the authors' for a budget in the table, linear between its rows."""
    scale = visual_tokens / TABLE_TOKENS
    label = budget * TABLE_TOKENS / visual_tokens
    below = max(row for row in TABLE if row <= label)
    above = min(row for row in TABLE if row >= label)
    part = (label - below) / (above - below) if above > below else 0.0
    return [max(1, round(scale * (a + part * (b - a)))) for a, b in zip(TABLE[below], TABLE[above])]


def recycling(dropped: int) -> tuple[int, int]:
    """How many of so many dropped tokens are recycled, and into how many clusters: 30 %, a tenth of them."""
    if not dropped:
        return 0, 0
    pool = int(0.3 * dropped) + 1
    return pool, int(pool / 10) + 1


def mean_of(keeps: Sequence[int], cuts: Sequence[int], visual_tokens: int, layers: int) -> float:
    """Mean number of visual tokens over the layers' inputs, for the counts kept at each cut."""
    return mean_over_layers(cuts, [visual_tokens, *tokens_left(keeps, visual_tokens)], layers)


def tokens_left(keeps: Sequence[int], visual_tokens: int) -> list[int]:
    """Visual tokens after each cut, recycled ones included."""
    left, present = [], visual_tokens
    for keep in keeps:
        keep = min(keep, present)
        present = keep + recycling(present - keep)[1]
        left.append(present)
    return left


def raters(prompt: PromptView) -> Tensor:
    """The words after the image that visual tokens look at more than average (section 3.2), as offsets from
    the sequence's end, ascending int64 [R]. The last token if no text follows the image."""
    visual, text = prompt.visual.float(), prompt.text_after.float()
    offsets = torch.arange(-max(1, len(text)), 0, device=visual.device)
    if not len(text):
        return offsets
    relevance = (visual @ text.T).softmax(-1).mean(0)
    chosen = offsets[relevance > relevance.mean()]
    return chosen if len(chosen) else offsets


def sparsify(cut: int, sample: StageView) -> Selection:
    """Cut number `cut`: the best rated tokens in their order, then the clusters of the best of the others."""
    scores = sample.attention.mean((0, 1))
    keep = min(sample.count, len(scores))
    pool_size, clusters = recycling(len(scores) - keep)
    order = scores.argsort(descending=True, stable=True)
    chosen, pool = order[:keep].sort().values, order[keep : keep + pool_size]
    if not clusters:
        return Selection(chosen)
    hidden = sample.hidden
    means, centres, cluster = cluster_means(hidden[pool].float(), clusters)
    made = -(1000 * cut + torch.arange(clusters, device=chosen.device))
    tokens = torch.cat([hidden[chosen], means.to(hidden.dtype)])
    merged = torch.full_like(order, -1).index_put((pool,), keep + cluster)
    places = torch.cat([chosen, pool[centres]])
    return Selection(torch.cat([chosen, made]), tokens, places=places, merged=merged)


def cluster_means(tokens: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Recycle m tokens [m, D] as the means of n clusters [n, D], by falling density peak (section 3.3), which
    token is the centre of each, int64 [n], and the cluster of each token, int64 [m].

    DPC-KNN of TCFormer: a token's density falls with its distance to its n nearest (itself one of them); its
    peak is density times distance to the nearest token of higher density. The n highest peaks are centres,
    every other token joins the nearest.
    """
    m, width = tokens.shape
    # exact rather than by matrix product: ties between neighbours must stay ties
    distance = torch.cdist(tokens, tokens, compute_mode="donot_use_mm_for_euclid_dist") / width**0.5
    density = (-distance.topk(n, largest=False).values.square().mean(-1)).exp()
    denser = density[None, :] > density[:, None]
    separation = distance.masked_fill(~denser, torch.inf).amin(1).clamp(max=distance.max())
    centres = (density * separation).topk(n).indices
    cluster = distance[:, centres].argmin(1)
    cluster[centres] = torch.arange(n, device=tokens.device)
    sums = tokens.new_zeros(n, width).index_add_(0, cluster, tokens)
    sizes = tokens.new_zeros(n).index_add_(0, cluster, tokens.new_ones(m))
    return sums / (sizes[:, None] + 1e-6), centres, cluster
