"""How Pocket-8 draws a benchmark's questions: a benchmark's file in `harness/tasks/benchmarks` has one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from harness.drawings.scenes import SceneV1
from harness.drawings.wording import Row, said, short_prompt

if TYPE_CHECKING:
    from harness.drawings.v2.facts import Fact
    from harness.drawings.v2.interview import Interview


def guess(row: Row, fact: Fact) -> float:
    """Share of right answers of somebody who guesses among the fact's possible answers, or yes and no."""
    answer = row.get("multiple_choice_answer", row.get("answer"))
    return 1 / len(fact.domain) if answer in fact.domain else 0.5


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How a benchmark's questions are drawn and worded. Rows are in the benchmark's schema, without image.

    Attributes:
        questions: in version 1's evaluation split; calibration has a quarter. A question may be several rows.
        per_image: questions about one image of version 1.
        per_regime: questions in each regime of version 2's evaluation split; calibration has a quarter.
        rows: (scene of version 1, generator, number of the question in the set or None in training) -> the
            rows of one question; [] where the scene has nothing to ask.
        asked: (interview about a scene of version 2, task, category or None for any) -> rows, each with the
            fact behind it; [] where nothing is left to ask.
        categories: asked in turn in version 2.
        identify: (row, image name, number of the question, number of the row in it) -> the id columns.
        extra: scene of either version -> columns that the task code does not read but the hub's files have.
        prompt: row -> the user's text as lmms-eval 0.7.3 words it with its default settings; a test holds the
            two equal, and trainers need not import lmms-eval.
        target: row -> the answer that a model is trained to give.
        chance: (row, fact) -> share of right answers of somebody who guesses.
        order: the key that the file's rows are sorted by; None: as drawn.
    """

    questions: int
    per_image: int = 1
    per_regime: int
    rows: Callable[[SceneV1, np.random.Generator, int | None], list[Row]]
    asked: Callable[[Interview, str, str | None], list[tuple[Row, Fact]]]
    categories: tuple[str | None, ...] = (None,)
    identify: Callable[[Row, str, int, int], Row] = lambda row, image, question, position: {}
    extra: Callable[[object], Row] = lambda scene: {}
    prompt: Callable[[Row], str] = short_prompt
    target: Callable[[Row], str] = said
    chance: Callable[[Row, Fact], float] = guess
    order: Callable[[Row], object] | None = None
