"""DiffPrune as a `Pruner`: a trained scorer ranks all tokens at once, before the language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from methods.base import ImageView, Positions, Pruner, Selection
from methods.diffprune.policy import Scorer, ScorerConfig, above, top
from methods.registry import register
from methods.stepprune import checkpoint as checkpoints
from methods.stepprune.batch import padded


@register
@dataclass
class DiffPrune(Pruner):
    """DiffPrune: a trained encoder and one linear head score all visual tokens; the best b stay.

    Attributes:
        budget: tokens to keep; with `threshold` the mean number. The policy trained nearest to it is used.
        positions: survivors keep the rotary positions of their places, as in training (`original`), or are
            `renumbered`.
        checkpoint: a safetensors file of `harness train diffprune`; None: a policy found for the backbone's
            name.
        threshold: keep the tokens whose score passes a threshold, calibrated on held-out data to the mean
            wanted, so that images keep different numbers (ours).
        text: a policy that reads the prompt too (ours; the paper's reads the image alone).

    `Trace.kept`: ascending, spatial order.
    """

    name: ClassVar[str] = "diffprune"
    positions: Positions = "original"
    checkpoint: str | None = None
    threshold: bool = False
    text: bool = False

    #: policy without training, see `untrained`
    _random: ClassVar[Scorer | None] = None
    #: what the policy at hand was prepared for
    _ready: ClassVar[tuple | None] = None

    def __post_init__(self):
        super().__post_init__()
        if self.checkpoint is not None:  # named by a person: refused before a model is loaded
            checkpoints.read(Path(self.checkpoint), ScorerConfig)

    @property
    def reads_text(self) -> bool:
        return self.text

    @property
    def may_exceed_budget(self) -> bool:
        return self.threshold

    def resources(self, model: torch.nn.Module) -> dict[str, object]:
        if not self.acts:
            return {}
        if self._random is not None:
            return {"weights": "random"}
        found, threshold = self._find(model)
        facts = {"checkpoint": found.path.stem, "weights": found.digest()}
        return facts | ({"score_threshold": threshold} if self.threshold else {})

    def prepare(self, model: torch.nn.Module) -> None:
        if not self.acts:
            return
        like = next(model.parameters())
        found, threshold = (None, 0.0) if self._random is not None else self._find(model)
        wanted = (found and found.path, threshold, like.device, like.dtype)
        if self._ready == wanted:
            return
        self._policy = (found.load()[0] if found else self._random).to(like.device, like.dtype)
        self._threshold = torch.tensor(threshold, device=like.device)  # float32, as the scores
        self._ready = wanted

    def untrained(self, width: int, text_width: int, tokens: int) -> None:
        """Random weights for these widths instead of a checkpoint's, and exactly the budget's tokens whatever
        the image (for costs)."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self._random = self._policy = Scorer(ScorerConfig(width, text_width, self.text)).eval()
        self._ready = None

    def _find(self, model: torch.nn.Module) -> tuple[checkpoints.Checkpoint, float]:
        """Checkpoint, and threshold of scores (0 where none is asked for), for the model and the budget."""
        candidates = checkpoints.suiting(model, self.checkpoint, ScorerConfig, self.text)
        visual_tokens = checkpoints.visual_tokens(model, self.budget, candidates)
        tokens = self.budget if visual_tokens is None else self.count(visual_tokens)
        if self.threshold:
            return checkpoints.best_for(tokens, candidates)
        return checkpoints.nearest(tokens, candidates)[0], 0.0

    def select_all(self, images: Sequence[ImageView]) -> list[Selection]:
        visual, visual_valid = padded([image.features for image in images])
        text, text_valid = padded([image.text for image in images]) if self.text else (None, None)
        scores = self._policy(visual, text, visual_valid, text_valid)
        if self.threshold and self._random is None:
            choices = above(scores, self._threshold)
        else:
            counts = [self.count(len(image.features)) for image in images]
            choices = top(scores, torch.tensor(counts, device=scores.device))
        return [Selection(kept) for kept in choices.kept()]
