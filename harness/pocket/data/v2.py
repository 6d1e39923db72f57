"""Which questions the sets of version 2 hold: images of three regimes, each asked by several benchmarks.

Image i has regime i mod 3. It is asked up to eight questions, by the benchmarks in turn, and no two of them
share a thing of their evidence: a scene with two things is asked two at most. Every benchmark has a third of
its questions in each regime.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from harness.drawings.v2.interview import Interview
from harness.drawings.v2.scenes import REGIMES, SQUARE, Scene, sample_scene, varied_canvas
from harness.drawings.wording import Row
from harness.pocket.data import documents

SEED = 20261126
PER_IMAGE = 8
PREFIX, VARIED = "v2", "varied"
Groups = dict[str, list[tuple[str, Scene, list[Row]]]]


def image_name(split: str, index: int, varied: bool = False) -> str:
    """Name of an image, as its file has it (`scene_of` is the way back)."""
    return f"{PREFIX}-" + f"{VARIED}-" * varied + f"{split}-{index:05d}"


def scene_of(name: str) -> Scene:
    """What is drawn on the image of that name. Raises ValueError for another name."""
    rest = name.removesuffix(".png").removeprefix(f"{PREFIX}-")
    split, index = rest.removeprefix(f"{VARIED}-").split("-")
    return scene(split, int(index), rest.startswith(f"{VARIED}-"))


def scene(split: str, index: int, varied: bool) -> Scene:
    canvas = varied_canvas(SEED, index) if varied else SQUARE
    return sample_scene(split, SEED, index, canvas=canvas)


def groups(split: str, varied: bool = False, counts: dict[str, int] | None = None) -> Groups:
    """For each task, (image name, scene, rows of one question), a third of them in each regime.

    counts: questions per task and regime; None: the benchmarks' own, a quarter of them for
    another split than eval.
    """
    share = 1 if split == "eval" else 4
    counts = counts or {task: number // share for task, number in documents.questions(2).items()}
    made: Groups = {task: [] for task in documents.tasks() if task in counts}
    tallies: dict[str, Counter] = {regime: Counter() for regime in REGIMES}
    left = Counter({(regime, task): counts[task] for regime in REGIMES for task in made})
    index = 0
    while any(left.values()):
        regime = list(REGIMES)[index % len(REGIMES)]
        if any(left[regime, task] for task in made):
            drawn, name = scene(split, index, varied), image_name(split, index, varied)
            interview = Interview(drawn, np.random.default_rng([SEED, index]), tallies[regime])
            for task, rows in _asked(interview, counts, left):
                made[task].append((name, drawn, rows))
        index += 1
    return made


def _asked(interview: Interview, counts: dict[str, int], left: Counter):
    """Yields (task, rows) of up to PER_IMAGE questions, those first of which most are still to be asked."""
    regime, tally, found = interview.scene.regime, interview.tally, 0
    hopeless: set[str] = set()
    while found < PER_IMAGE:
        needy = [t for t in counts if left[regime, t] and t not in hopeless]
        if not needy:
            return
        task = max(needy, key=lambda t: left[regime, t] / counts[t])
        categories = sorted(documents.drawing(task).categories, key=lambda c: tally[task, c])
        for category in categories:
            if rows := documents.ask(interview, task, category):
                tally[task, category] += 1
                left[regime, task] -= 1
                found += 1
                yield task, rows
                break
        else:
            hopeless.add(task)
