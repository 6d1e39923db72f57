"""PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction (CVPR
2025, arXiv 2410.17247)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from methods.base import Pruner, Stage
from methods.errors import UserError
from methods.fastv import drop_least_attended
from methods.registry import register
from methods.schedules import TOLERANCE, mean_over_layers, scaled

#: layers (of 32) that have run at each cut: the released scripts', and the authors' for low means (issue 29)
STOCK_CUTS = (8, 16, 24)
EARLY_CUTS = (2, 8, 16)
#: the released scripts' share of the image's tokens that each cut leaves is 1/2, 1/4, 1/8
STOCK_RATIO = 0.5


@register
@dataclass
class PDrop(Pruner):
    """PDrop: cut in three stages; each drops the visual tokens that the prompt's last token would attend to
    least in the next layer. Cut s leaves int(N r^s) of the image's N tokens, at least 1.

    Attributes:
        schedule: `average` cuts after 2, 8, 16 of 32 layers, r solved for a mean over the layers' inputs of b
            (0.56 / 0.42 / 0.19 for 192 / 128 / 64: the last is the authors' worked example, the others follow
            their rule); r is written with two decimals as they do, or as many as bring the mean within 2 % of
            b. `stock` is the released scripts' one setting: after 8, 16, 24 layers 1/2, 1/4, 1/8 are left, a
            mean of 270 of 576 whatever b. `kept` cuts after 8, 16, 24 layers, b tokens are left after the
            last, the others geometric and rounded (277 / 133 / 64). For L layers each cut is at
            round(cut L / 32): after 1, 3, 6 of 12.

    `average` cannot go below the layers ahead of the first cut (a mean of 36 of 576 for 32 layers, 48 for
    12); `kept` takes any budget.

    Released code followed (Cooperx521/PyramidDrop 6444f30): the row is the next layer's own, last token of
    the prompt, mean over heads, softmax over all tokens; survivors keep raster order, and all tokens are
    numbered anew after every cut, so that a decoded token's position is each layer's own cache length.
    Deviations: head mean in float32 (theirs rounds to half precision); one query row and no values; batches
    with padding (theirs fail). Several images of a prompt are ranked together (theirs cuts the first only).
    With M-RoPE (nothing is released) every token keeps its position: numbers anew would destroy the raster.
    """

    name: ClassVar[str] = "pdrop"
    schedule: Literal["average", "stock", "kept"] = "average"

    @property
    def acts(self) -> bool:
        return self.budget is not None or self.schedule == "stock"

    @property
    def may_exceed_budget(self) -> bool:
        return self.schedule == "stock"

    def stages(self, visual_tokens: int, layers: int) -> list[Stage]:
        return [
            Stage(layer, drop_least_attended, attention="own", positions="renumbered", count=n)
            for layer, n in self.plan(visual_tokens, layers)
        ]

    def plan(self, visual_tokens: int, layers: int) -> list[tuple[int, int]]:
        """(layers that have run, tokens of an image left) at each cut."""
        cuts = scaled(EARLY_CUTS if self.schedule == "average" else STOCK_CUTS, layers)
        budget = self.count(visual_tokens)
        if self.schedule == "kept":
            share = budget / visual_tokens
            counts = [round(visual_tokens * share ** (s / len(cuts))) for s in range(1, len(cuts) + 1)]
        elif self.schedule == "stock":
            counts = tokens_left(visual_tokens, STOCK_RATIO, len(cuts))
        else:
            ratio = ratio_for_mean(budget, visual_tokens, cuts, layers)
            counts = tokens_left(visual_tokens, ratio, len(cuts))
        return list(zip(cuts, counts))

    def validate(self, visual_tokens: int, layers: int) -> None:
        super().validate(visual_tokens, layers)
        if not self.acts or self.schedule != "average":
            return
        budget, (cuts, counts) = self.count(visual_tokens), zip(*self.plan(visual_tokens, layers))
        mean = mean_over_layers(cuts, [visual_tokens, *counts], layers)
        if abs(mean - budget) > TOLERANCE * budget:
            raise UserError(
                f"pdrop: no ratio gives a mean of {budget} visual tokens over {layers} layers, of which the "
                f"first {cuts[0]} see all {visual_tokens} (nearest: {mean:.1f}); use a larger budget or "
                "schedule=kept"
            )


def tokens_left(visual_tokens: int, ratio: float, cuts: int) -> list[int]:
    """After each cut: ratio, ratio^2, ... of the image's tokens, truncated as released, at least 1."""
    return [max(1, int(visual_tokens * ratio**s)) for s in range(1, cuts + 1)]


def ratio_for_mean(budget: int, visual_tokens: int, cuts: Sequence[int], layers: int) -> float:
    """The ratio r for which the layers' inputs hold `budget` visual tokens on average, with as many decimals
    (2 to 6) as bring that within 2 %."""
    low, high = 0.0, 1.0
    for _ in range(50):  # bisection; the mean rises with r
        middle = (low + high) / 2
        shares = [middle**s for s in range(len(cuts) + 1)]
        if visual_tokens * mean_over_layers(cuts, shares, layers) < budget:
            low = middle
        else:
            high = middle
    for digits in range(2, 7):
        ratio = round(high, digits)
        counts = [visual_tokens, *tokens_left(visual_tokens, ratio, len(cuts))]
        mean = mean_over_layers(cuts, counts, layers)
        if abs(mean - budget) <= TOLERANCE * budget:
            break
    return ratio
