"""Pruners made up for the tests: each uses one thing that the interface can express."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from methods.base import Pruner, Selection, Signal, Stage


def top(scores, n):
    return scores.topk(n).indices.sort().values


@dataclass
class Adaptive(Pruner):
    """Before the LLM: patches of more than the mean norm, so another number for each image."""

    name: ClassVar[str] = "adaptive"
    may_exceed_budget = True

    def select(self, image):
        norm = image.features.norm(dim=-1)
        return Selection((norm > norm.mean()).nonzero()[:, 0])


@dataclass
class AdaptiveInPlace(Adaptive):
    """The same, with original positions."""

    positions: ClassVar[str] = "original"


@dataclass
class Backwards(Pruner):
    """Before the LLM: the last patches in descending order, then a token of its own (the keys' mean,
    projected)."""

    name: ClassVar[str] = "backwards"
    signals: ClassVar[tuple] = (Signal("keys", -1), Signal("values", -2))

    def select(self, image):
        n = self.count(len(image.features)) - 1
        kept = torch.arange(len(image.features) - 1, len(image.features) - 1 - n, -1)
        own = image.project(image[Signal("keys", -1)].mean(0) + image[Signal("values", -2)][0])
        tokens = torch.cat([image.project(image.features[kept]), own[None]])
        return Selection(torch.cat([kept, torch.tensor([-7])]), tokens, projected=True)


@dataclass
class Reader(Pruner):
    """Before the LLM: as many patches as suits the prompt, nearest to the text's mean (in the LLM's
    space)."""

    name: ClassVar[str] = "reader"
    may_exceed_budget = True
    reads_text: ClassVar[bool] = True

    def select(self, image):
        scores = image.project(image.features) @ image.text.mean(0)
        return Selection(top(scores, self.count(len(scores)) + len(image.text) % 3))


@dataclass
class Pyramid(Pruner):
    """Inside: three cuts by the layers' own rows, everything renumbered (as PDrop does)."""

    name: ClassVar[str] = "pyramid"
    may_exceed_budget = True

    def stages(self, visual_tokens, layers):
        def keep(n):
            return lambda s: Selection(top(s.attention.mean(0)[0], min(n, len(s.kept))))

        return [Stage(r, keep(n), "own", positions="renumbered") for r, n in ((1, 40), (2, 17), (4, 5))]


@dataclass
class Unequal(Pruner):
    """Inside: two cuts by the previous layer's row, as many as are above the mean: another number for each
    sample."""

    name: ClassVar[str] = "unequal"
    may_exceed_budget = True

    def stages(self, visual_tokens, layers):
        def select(s):
            scores = s.attention.mean(0)[0]
            return Selection((scores > scores.mean()).nonzero()[:, 0])

        return [Stage(2, select), Stage(3, select)]


@dataclass
class Recycler(Pruner):
    """Inside: rated by some text tokens, the dropped ones averaged into new tokens behind the kept (as
    SparseVLM)."""

    name: ClassVar[str] = "recycler"
    may_exceed_budget = True

    def stages(self, visual_tokens, layers):
        def raters(prompt):
            scores = (prompt.visual @ prompt.text_after.T).softmax(-1).mean(0)
            return (scores > scores.mean()).nonzero()[:, 0] - len(scores)

        def select(born):
            def cut(s):
                scores = s.attention.mean((0, 1))
                kept = top(scores, len(s.kept) // 2)
                rest = torch.ones(len(s.kept), dtype=torch.bool)
                rest[kept] = False
                made = torch.stack([part.mean(0) for part in s.hidden[rest].chunk(2)])
                names = torch.tensor([-born - 1, -born - 2])
                return Selection(torch.cat([kept, names]), torch.cat([s.hidden[kept], made]))

            return cut

        return [Stage(r, select(10 * r), rows=raters, positions="renumbered") for r in (2, 4)]


@dataclass
class Both(Pruner):
    """Before and inside the LLM."""

    name: ClassVar[str] = "both"
    may_exceed_budget = True

    def select(self, image):
        return Selection(torch.arange(0, len(image.features), 2))

    def stages(self, visual_tokens, layers):
        return [Stage(3, lambda s: Selection(top(s.attention.mean(0)[0], 6)), "own", positions="renumbered")]
