"""Pocket-8's documents: what the benchmarks' files say of how they are drawn, by the benchmark's name."""

from __future__ import annotations

import numpy as np

from harness.drawings.drawing import Drawing
from harness.drawings.scenes import SceneV1
from harness.drawings.v2.interview import Interview
from harness.drawings.wording import Row
from harness.tasks.suites import BENCHMARKS


def tasks() -> tuple[str, ...]:
    """The benchmarks that are drawn, in the order of the table's columns; a new one comes last."""
    return tuple(name for name, benchmark in BENCHMARKS.items() if benchmark.drawing is not None)


def questions(version: int) -> dict[str, int]:
    """How many questions per task an evaluation split has (version 2: in each regime); calibration has a
    quarter."""
    drawings = {task: drawing(task) for task in tasks()}
    return {task: d.questions if version == 1 else d.per_regime for task, d in drawings.items()}


def drawing(task: str) -> Drawing:
    return BENCHMARKS[task].drawing


def rows(task: str, scene: SceneV1, rng: np.random.Generator, number: int | None = None) -> list[Row]:
    """One question about a scene of version 1 as its rows (see `Drawing.rows`)."""
    return drawing(task).rows(scene, rng, number)


def ask(interview: Interview, task: str, category: str | None = None) -> list[Row]:
    """One question about a scene of version 2 as its rows (see `Interview.ask`)."""
    return interview.ask(task, drawing(task), category)


def prompt(task: str, row: Row) -> str:
    """The user's text for a row, as lmms-eval words it."""
    return drawing(task).prompt(row)


def target(task: str, row: Row) -> str:
    """The answer that a model is trained to give."""
    return drawing(task).target(row)
