"""FastV: An Image is Worth 1/2 Tokens After Layer 2 (ECCV 2024, arXiv 2403.06764)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from methods.base import Pruner, Selection, Stage, StageView
from methods.errors import UserError
from methods.registry import register


@register
@dataclass
class FastV(Pruner):
    """FastV: after K decoder layers, drop the visual tokens that the prompt's last token attended to least.

    Attributes:
        k: decoder layers that see all visual tokens, 1 to L - 1 (released: 2 in the paper's scripts, 3 in the
            lmms-eval drop-in).
        kept: tokens left after the cut, whatever the budget; None: the budget decides.
        schedule: what the budget b means if `kept` is not given: `kept` b tokens are left after layer k;
            `average` b is the mean over the layers' inputs, so that n = (L b - k N) / (L - k), rounded
            (k = 2, 32 layers: 166 / 98 / 30 for 192 / 128 / 64).

    Released code followed (pkunlp-icler/FastV d165972): last query row only (the paper speaks of the
    attention received from all tokens), mean over heads, raster order and original positions kept, the choice
    made in prefill stays in decode (their "static" cache). Deviations: scores in float32; every sample of a
    batch is ranked by its own row (theirs ranks all by the first); several images of a prompt are ranked
    together.
    """

    name: ClassVar[str] = "fastv"
    k: int = 2
    kept: int | None = None
    schedule: Literal["kept", "average"] = "kept"

    @property
    def acts(self) -> bool:
        return self.budget is not None or self.kept is not None

    @property
    def may_exceed_budget(self) -> bool:
        return self.kept is not None

    def stages(self, visual_tokens: int, layers: int) -> list[Stage]:
        return [Stage(self.k, drop_least_attended, count=self.tokens_after_cut(visual_tokens, layers))]

    def tokens_after_cut(self, visual_tokens: int, layers: int) -> int:
        """Visual tokens of an image left after layer k, at least 1 and at most all."""
        return min(max(self._wanted(visual_tokens, layers), 1), visual_tokens)

    def validate(self, visual_tokens: int, layers: int) -> None:
        if not self.acts:
            return
        if not 1 <= self.k < layers:
            raise UserError(
                f"fastv: k={self.k} must lie between 1 and {layers - 1} for a model of {layers} layers"
            )
        super().validate(visual_tokens, layers)
        n = self._wanted(visual_tokens, layers)
        if self.kept is None and n < 1:
            raise UserError(
                f"fastv: a mean of {self.budget} visual tokens over {layers} layers cannot be had: the "
                f"first {self.k} see all {visual_tokens}; use a larger budget, smaller k or schedule=kept"
            )
        if not 1 <= n <= visual_tokens:
            raise UserError(f"fastv: kept={n} must lie between 1 and {visual_tokens}")

    def _wanted(self, visual_tokens: int, layers: int) -> int:
        if self.kept is not None:
            return self.kept
        n = self.count(visual_tokens)
        if self.schedule == "kept":
            return n
        return round((layers * n - self.k * visual_tokens) / (layers - self.k))


def drop_least_attended(sample: StageView) -> Selection:
    """Keep the stage's `count` of the visual tokens; several images of a prompt are ranked together."""
    return Selection(most_attended(sample.attention, sample.count))


def most_attended(attention: Tensor, n: int) -> Tensor:
    """Indices of the n visual tokens with the highest head-mean attention, ascending.

    attention: [H, 1, V], post-softmax over the whole sequence, not renormalised over the visual tokens.
    """
    return attention.mean(0)[0].topk(n).indices.sort().values
