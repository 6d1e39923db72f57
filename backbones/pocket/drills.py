"""Drills: the shortest possible questions, a few tokens each, that only teach what belongs to what in a
scene.

A benchmark's question is 15 to 40 tokens long and has one answer to learn from; a drill ("star color" ->
"red") has one answer in three tokens, so the first part of stage 2 sees several times more answers a second.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from harness.pocket8.facts import CATEGORY_OF, CLEAR_GAP
from harness.pocket8.scenes import COLOURS, SHAPES, WORDS, Scene

Drill = tuple[str, str, str]  # kind, question, answer


def drills(scene: Scene, rng: np.random.Generator, most: int = 48) -> list[Drill]:
    """Up to `most` drills about a scene, in random order."""
    found: list[Drill] = []
    names = Counter(t.name for t in scene.things)
    colours = {
        kind: Counter(t.colour for t in scene.things if t.kind == kind)
        for kind in ("object", "word", "digit")
    }
    unique = [t for t in scene.things if names[t.name] == 1]
    hues = Counter(t.colour for t in scene.things)
    for t in unique:
        # One token asks: a single step of attention answers, and the longer drills can build on it.
        found.append(("hop", f" {t.name}", t.colour))
        if hues[t.colour] == 1:
            found.append(("hop", f" {t.colour}", t.name))
        found.append(("colour", f" {t.name} color", t.colour))
        if not t.is_text:
            found.append(("texture", f" {t.name} plain striped dotted", t.texture))
            found.append(("size", f" {t.name} small medium large", t.size))
    for t in scene.things:
        if colours[t.kind][t.colour] == 1:
            asked = "shape" if t.kind == "object" else t.kind
            found.append((asked, f" {t.colour} {asked}", t.name))
            if t.kind == "word":
                found.append(("category", f" {t.colour} word name", CATEGORY_OF[t.name]))
    for first in unique:
        second = unique[int(rng.integers(len(unique)))]
        dx, dy = (a - b for a, b in zip(first.centre, second.centre))
        if abs(dx) >= CLEAR_GAP:
            found.append(("side", f" {first.name} left right {second.name}", "left" if dx < 0 else "right"))
        if abs(dy) >= CLEAR_GAP:
            found.append(
                ("height", f" {first.name} above below {second.name}", "above" if dy < 0 else "below")
            )
    present = {(t.colour, t.name) for t in scene.objects}
    written = {t.name for t in scene.texts}
    for colour, name in sorted(present):
        other = (list(COLOURS)[int(rng.integers(len(COLOURS)))], SHAPES[int(rng.integers(len(SHAPES)))])
        for c, s in ((colour, name), (colour, other[1]), (other[0], name))[: 2 + int(rng.random() < 0.5)]:
            found.append(("exists", f" {c} {s}?", "yes" if (c, s) in present else "no"))
    if written:
        for word in (sorted(written)[0], WORDS[int(rng.integers(len(WORDS)))]):
            found.append(("written", f" {word} written?", "yes" if word in written else "no"))
    shapes = Counter(t.name for t in scene.objects)
    for name in {*list(shapes)[:3], SHAPES[int(rng.integers(len(SHAPES)))]}:
        if shapes[name] <= 5:
            found.append(
                ("count", f" many {'crosses' if name == 'cross' else name + 's'}", str(shapes[name]))
            )
    return [found[int(i)] for i in rng.permutation(len(found))[:most]]
