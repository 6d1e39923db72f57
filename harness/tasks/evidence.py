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


def recall(hint: Hint, answer: Answer, width: int, height: int) -> float | None:
    """Share of the visual tokens under the evidence that were left in the last layer; None where only tokens
    made by the method were. A token merged into another one is not counted as left."""
    wanted = cells(hint.evidence, *grid_of(answer.image_tokens, width, height)).ravel()
    if answer.kept is None:
        return 1.0 if answer.visual_tokens[-1] == answer.image_tokens else None
    kept = [k for k in answer.kept if k >= 0]
    if not kept:
        return None
    left = np.zeros(len(wanted), bool)
    left[kept] = True
    return float((left & wanted).sum() / wanted.sum())


def columns(
    pruner: Pruner,
    rows,
    hints: Sequence[Hint],
    answers: Sequence[Answer],
    sizes: Sequence[tuple[int, int]],
) -> dict:
    """Columns of a record's documents; {} for data without evidence. There is no recall for a method that has
    the tower see a raster of its own: what it keeps are no cells of the image's."""
    if not hints:
        return {}
    own_raster = pruner.acts and type(pruner).image_grid is not Pruner.image_grid
    found = [None if own_raster else recall(h, a, *size) for h, a, size in zip(hints, answers, sizes)]
    return {"recall": found, **{name: list(rows[name]) for name in ("kind", "chance", "regime")}}
