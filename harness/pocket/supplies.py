"""What the trainers of learned methods are given: backbones by name, and questions about drawn scenes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from PIL.Image import Image

import backbones
from backbones.images import upright
from methods.stepprune.training.data import Example


class Pocket8:
    """Scenes of a split ("train"; "calibration" for held-out ones) with questions of all eight tasks in turn.

    questions: asked of each scene. Scene i of a seed is always the same one. varied: on canvases of varied
    size instead of squares.
    """

    def __init__(self, split: str = "train", questions: int = 4, seed: int = 0, varied: bool = False):
        self.split, self.questions, self.seed, self.varied = split, questions, seed, varied

    def __getitem__(self, index: int) -> Example:
        from harness.drawings.scenes import SQUARE, render, sample_scene, varied_canvas
        from harness.pocket.data import documents

        # an own stream: the backbones were trained on seeds below 200, the benchmark's is a date
        seed = 7_000_000 + self.seed
        canvas = varied_canvas(seed, index) if self.varied else SQUARE
        scene = sample_scene(self.split, seed, index, canvas=canvas)
        rng = np.random.default_rng([7, self.seed, index])
        asked: list[tuple[str, str]] = []
        tasks, first, tries = documents.tasks(), index * self.questions, 0
        while len(asked) < self.questions:  # not every task has a question about every scene
            task = tasks[(first + len(asked) + tries) % len(tasks)]
            rows = documents.rows(task, scene, rng)
            if rows:
                row = rows[int(rng.integers(len(rows)))]
                asked.append((documents.prompt(task, row), documents.target(task, row)))
            else:
                tries += 1
        return Example(render(scene), tuple(asked), len(scene.things))


class EvidencePocket8(Pocket8):
    """The same of version 2's scenes, the three regimes in turn: each question with its evidence."""

    def __getitem__(self, index: int) -> Example:
        from harness.drawings.v2.paint import render
        from harness.drawings.v2.scenes import SQUARE, sample_scene, varied_canvas

        seed, found, again = 7_000_000 + self.seed, [], index
        while not found:  # about a lone word nothing can be asked: then another scene of that regime
            canvas = varied_canvas(seed, again) if self.varied else SQUARE
            scene = sample_scene(self.split, seed, again, canvas=canvas)
            found = self._ask(scene, index)
            again += 3_000_000_000
        # of a scene about which so much cannot be asked, the same again
        asked, evidence = zip(*(found[i % len(found)] for i in range(self.questions)))
        return Example(render(scene), asked, len(scene.alone), evidence)

    def _ask(self, scene, index: int) -> list[tuple[tuple[str, str], tuple]]:
        """(text and answer, boxes) of up to `questions` questions."""
        from harness.drawings.v2.interview import Interview
        from harness.pocket.data import documents

        rng = np.random.default_rng([8, self.seed, index])
        interview = Interview(scene, rng, Counter(), disjoint=False)
        found: list[tuple[tuple[str, str], tuple]] = []
        tasks, first = documents.tasks(), index * self.questions
        for i in range(first, first + self.questions + len(tasks)):
            task = tasks[i % len(tasks)]
            if rows := [row for row in documents.ask(interview, task) if row["evidence"]]:
                row = rows[int(rng.integers(len(rows)))]
                pair = documents.prompt(task, row), documents.target(task, row)
                found.append((pair, tuple(map(tuple, row["evidence"]))))
            if len(found) == self.questions:
                break
        return found


#: by the version's name
DRAWN = {"v1": Pocket8, "v2": EvidencePocket8}


class PocketSupplies:
    """`methods.stepprune.training.data.Supplies`: any backbone, and Pocket-8's scenes."""

    def backbone(self, name: str, device: str, dtype: str = "float32"):
        return backbones.load(name, device=device, dtype=dtype)

    def image(self, file: Path) -> Image:
        return upright(file)

    def drawn(self, backbone) -> str:
        from harness.pocket.data.build import version_of

        return f"v{version_of(backbone.family.any_size)}"

    def training(self, backbone, questions: int, seed: int, drawn: str | None = None) -> Pocket8:
        return DRAWN[drawn or self.drawn(backbone)]("train", questions, seed, backbone.family.any_size)

    def held_out(self, backbone, drawn: str | None = None) -> Pocket8:
        """The calibration split, one question of each task."""
        version, varied = drawn or self.drawn(backbone), backbone.family.any_size
        return DRAWN[version]("calibration", questions=8, seed=1, varied=varied)
