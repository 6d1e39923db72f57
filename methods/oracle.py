"""Controls that know the answer key: what a method could reach, and what finding things alone is worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from methods.base import ImageView, Selection
from methods.errors import UserError
from methods.random import Random
from methods.registry import register
from methods.views import Box, cells


class AnswerKey(Random):
    """Keeps b visual tokens: those under boxes of the answer key first, in random order, then others, at
    random."""

    answer_key: ClassVar[bool] = True

    def boxes(self, image: ImageView) -> tuple[Box, ...]:
        raise NotImplementedError

    def select(self, image: ImageView) -> Selection:
        if image.hint is None:
            raise UserError(f"{self.name} needs the answer key, which Pocket-8 has from version 2 on")
        wanted = torch.from_numpy(cells(self.boxes(image), *image.grid).ravel())
        n = self.count(len(wanted))
        return Selection(first_of(wanted, n, self._seed_of(image)).to(image.features.device))

    @property
    def note(self) -> str:
        return "it knows the answer key: a bound, no method"


@register
@dataclass
class Oracle(AnswerKey):
    """Control that knows the answer key: the tokens that hold the question's answer, then random ones."""

    name: ClassVar[str] = "oracle"

    def boxes(self, image: ImageView) -> tuple[Box, ...]:
        return image.hint.evidence


@register
@dataclass
class Things(AnswerKey):
    """Control that knows the answer key: random tokens among those on things, whatever is asked."""

    name: ClassVar[str] = "things"

    def boxes(self, image: ImageView) -> tuple[Box, ...]:
        return image.hint.things


def first_of(wanted: Tensor, n: int, seed: int) -> Tensor:
    """n indices, ascending int64: of the True ones at random, then of the others. With one seed, those of a
    smaller n are among those of a larger one."""
    order = torch.randperm(len(wanted), generator=torch.Generator().manual_seed(seed))
    order = torch.cat([order[wanted[order]], order[~wanted[order]]])
    return order[:n].sort().values
