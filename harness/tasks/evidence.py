"""How much of what holds a question's answer a method kept: evidence recall.

Only for data whose rows say it (Pocket-8 from version 2 on): the columns `evidence` and `things`, boxes as
shares of the image, `kind` and `regime` of the question.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from harness.store.journal import Answer
from methods.base import Pruner
from methods.views import Hint, cells

COLUMNS = ("kind", "chance", "regime", "evidence", "things")


def hints_of(rows) -> list[Hint]:
    """The answer key of each row of a datasets.Dataset; [] if it has none."""
    if not set(COLUMNS) <= set(rows.column_names):
        return []
    boxes = lambda column: [tuple(map(tuple, own)) for own in rows[column]]  # noqa: E731
    return [Hint(*pair) for pair in zip(boxes("evidence"), boxes("things"))]


def grid_of(tokens: int, width: int, height: int) -> tuple[int, int]:
    """Rows and columns of an image's visual tokens: of the rasters with so many, the one shaped most like the
    image."""
    rows = [r for r in range(1, tokens + 1) if tokens % r == 0]
    best = min(rows, key=lambda r: abs(math.log(tokens / r / r * height / width)))
    return best, tokens // best


def recall(hint: Hint, answer: Answer, width: int, height: int, merged: bool = True) -> float | None:
    """Share of the visual tokens under the evidence that reached the last layer; None where that is not
    known: only made tokens were left, and nothing says what they took in.

    Args:
        hint: the answer key.
        answer: with `kept`, and `merged` where the method merges.
        width, height: of the image, pixels.
        merged: a token that was merged into another one counts as well; else only those left as themselves.
    """
    wanted = cells(hint.evidence, *grid_of(answer.image_tokens, width, height)).ravel()
    if answer.kept is None:
        return 1.0 if answer.visual_tokens[-1] == answer.image_tokens else None
    kept = [k for k in answer.kept if k >= 0]
    if not kept and answer.merged is None:
        return None
    left = np.zeros(len(wanted), bool)
    left[kept] = True
    if merged and answer.merged is not None:
        left |= np.array(answer.merged[: len(wanted)]) >= 0
    return float((left & wanted).sum() / wanted.sum())


def own_raster(pruner: Pruner) -> bool:
    """Whether the method has the tower see a raster of its own: what it keeps are no cells of the image's."""
    return pruner.acts and type(pruner).image_grid is not Pruner.image_grid


def columns(
    pruner: Pruner,
    rows,
    hints: Sequence[Hint],
    answers: Sequence[Answer],
    sizes: Sequence[tuple[int, int]],
) -> dict:
    """Columns of a record's documents; {} for data without evidence. recall: of tokens left as themselves or
    merged into one that was left; recall_alone: the former. There is none for a method with a raster of its
    own."""
    if not hints:
        return {}
    asked = [] if own_raster(pruner) else list(zip(hints, answers, sizes))
    both = {
        name: [recall(h, a, *size, merged=merged) for h, a, size in asked] or [None] * len(hints)
        for name, merged in (("recall", True), ("recall_alone", False))
    }
    return both | {name: list(rows[name]) for name in ("kind", "chance", "regime")}
