"""DiffPrune's training: the next-token loss through SoftTopK's gates; there is no length term."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.diffprune.policy import Scorer, above, top
from methods.stepprune.gate import LocalDenoiser
from methods.stepprune.policy import Choices
from methods.stepprune.training.objective import (
    Batch,
    FrozenModel,
    GatedObjective,
    Outcome,
    Step,
    recall,
)
from methods.stepprune.training.soft_topk import soft_topk


class OneShotObjective(GatedObjective):
    """The gates of an image sum to K, which is given (`k_from` sample: the paper's); or those of a batch to K
    times its samples (`batch`: ours), so that their scores compare across images, as a threshold wants it."""

    policy: Scorer

    def __init__(
        self,
        policy: Scorer,
        denoiser: LocalDenoiser,
        frozen: FrozenModel,
        tokens: float,
        k_from: Literal["batch", "sample"] = "sample",
        slots: int | None = None,
        supervise: Literal["loss", "evidence"] = "loss",
    ):
        """tokens: K. supervise: see `TrainOptions`."""
        super().__init__(policy, denoiser, frozen, slots)
        self.tokens, self.k_from, self.supervise = tokens, k_from, supervise

    def scores(self, batch: Batch, alpha: float) -> Tensor:
        words, valid_words = self.frozen.words(batch) if self.policy.config.text else (None, None)
        return self.policy(batch.features, words, batch.valid, valid_words, alpha)

    def count(self, batch: Batch) -> Tensor:
        """K of each sample: all of an image that has fewer tokens. int64 [B]."""
        return batch.visual_tokens.clamp(max=round(self.tokens))

    def forward(self, batch: Batch, step: Step) -> Outcome:
        scores = self.scores(batch, step.alpha)
        choices = top(scores.detach(), self.count(batch))
        none = torch.tensor(math.nan, device=scores.device)
        if self.supervise == "evidence":
            loss, lm_loss, right, gates = by_evidence(scores, batch), none, none, none.expand(scores.shape)
        else:
            gates = self.gates(scores, batch, step.sharpness)
            loss, right = self.lm_loss(batch, gates, choices, step.seed)
            lm_loss = loss
        ranked = scores.detach().sort(1, descending=True).values
        return Outcome(
            loss,
            lm_loss.detach(),
            right,
            gates.detach().sum(1).mean(),
            choices.count,
            ranked - ranked.gather(1, choices.count[:, None] - 1),  # at a bias of 0 as many as are chosen
            gates.detach(),
            none,  # there is no pointer
            1,
            recall(choices, batch),
        )

    def gates(self, scores: Tensor, batch: Batch, sharpness: float) -> Tensor:
        """SoftTopK's, [B, N], 0 at padding. scores: [B, N]. sharpness: 1 / (2 tau) of the paper's tau."""
        scores = scores if batch.valid is None else scores.masked_fill(~batch.valid, 0)
        count = batch.visual_tokens.clamp(max=self.tokens)
        if self.k_from == "sample":
            return soft_topk(scores, count, sharpness, batch.valid)
        valid = None if batch.valid is None else batch.valid.flatten()[None]
        total = count.sum(0, keepdim=True)
        return soft_topk(scores.flatten()[None], total, sharpness, valid).view_as(scores)

    @torch.no_grad()
    def chosen(self, batch: Batch, step: Step) -> tuple[Choices, Tensor]:
        scores = self.scores(batch, step.alpha)
        return top(scores, self.count(batch)), self.gates(scores, batch, step.sharpness)

    @torch.no_grad()
    def also(self, batch: Batch) -> dict[str, Choices]:
        return {"hard, by threshold": above(self.scores(batch, 1.0), self.policy.threshold)}


def by_evidence(scores: Tensor, batch: Batch) -> Tensor:
    """Whether a token is evidence, as a score's log-odds: mean binary cross-entropy over an image's
    tokens."""
    valid = torch.ones_like(batch.evidence) if batch.valid is None else batch.valid
    odds = scores.masked_fill(~valid, 0)
    loss = F.binary_cross_entropy_with_logits(odds, batch.evidence.to(odds), reduction="none")
    return ((loss * valid).sum(1) / valid.sum(1)).mean()
