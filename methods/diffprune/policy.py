"""The scorer: StepPrune's input encoder and one linear head, a score a visual token."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from methods.stepprune.policy import Choices, InputEncoder, heads_of, widened


@dataclass(frozen=True)
class ScorerConfig:
    """Shape of a scorer. The paper's is two blocks of width 1,024 with 16 heads, which read no text.

    Attributes:
        width: d, of the vision tower.
        text_width: D, of the language model.
        text: whether the encoder reads the prompt, as StepPrune's does (ours).
        encoder_layers: blocks.
        heads: None: of about 64 channels each, 16 at the paper's width.
    """

    method: ClassVar[str] = "diffprune"

    width: int
    text_width: int
    text: bool = False
    encoder_layers: int = 2
    heads: int | None = None

    @property
    def head_count(self) -> int:
        return self.heads or heads_of(self.width)

    def build(self) -> Scorer:
        return Scorer(self)

    def described(self) -> dict[str, object]:
        return asdict(self)


class Scorer(nn.Module):
    """Scores of the visual tokens of an image, all at once.

    Sizes: B samples, N visual tokens (of the largest sample; the others are padded), T text tokens, d width
    of the vision tower, D width of the language model.
    """

    def __init__(self, config: ScorerConfig):
        super().__init__()
        self.config = config
        self.encoder = InputEncoder(config)
        self.head = nn.Linear(config.width, 1)
        nn.init.normal_(self.head.weight, std=config.width**-0.5)  # scores start with unit variance (ours)
        nn.init.zeros_(self.head.bias)
        # Not trained: calibrated, for budgets that are a mean (ours).
        self.register_buffer("threshold", torch.zeros(()))

    @property
    def bias(self) -> Tensor:
        """What calibration sets: the threshold."""
        return self.threshold

    def forward(
        self,
        visual: Tensor,
        text: Tensor | None,
        visual_valid: Tensor | None = None,
        text_valid: Tensor | None = None,
        alpha: float = 1.0,
    ) -> Tensor:
        """Scores, float32 [B, N], -inf at padding. visual: [B, N, d]; text: [B, T, D], unused without
        `config.text`; *_valid: bool, False at padding; alpha: the text gate."""
        scores = widened(self.head(self.encoder(visual, text, visual_valid, text_valid, alpha))[..., 0])
        return scores if visual_valid is None else scores.masked_fill(~visual_valid, -math.inf)

    def margins(
        self,
        visual: Tensor,
        text: Tensor | None,
        visual_valid: Tensor | None = None,
        text_valid: Tensor | None = None,
    ) -> Tensor:
        """By how much each score passes the threshold, descending, float32 [B, N]: as many tokens are kept at
        a further threshold b as have a margin of at least b. The first is +inf: one is kept in any case."""
        scores = self(visual, text, visual_valid, text_valid) - self.threshold
        margins = scores.sort(1, descending=True).values
        margins[:, 0] = math.inf
        return margins


def top(scores: Tensor, count: Tensor) -> Choices:
    """The `count` [B] highest-scored tokens of each sample, best first; of equal scores the earlier token.

    scores: [B, N], -inf at padding.
    """
    order = scores.sort(dim=1, descending=True, stable=True).indices
    taken = torch.arange(order.shape[1], device=scores.device) < count[:, None]
    return Choices(order.masked_fill(~taken, scores.shape[1]), count)


def above(scores: Tensor, threshold: Tensor) -> Choices:
    """The tokens whose score is at least the threshold, the best one in any case."""
    return top(scores, (scores >= threshold.to(scores)).sum(1).clamp(min=1))
