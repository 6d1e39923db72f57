"""What is in a scene of version 2, and where.

A scene has a regime: sparse (1 to 5 things), medium (6 to 14) or dense (20 to 48 small things, which touch
40 to 75 % of a 336-pixel square's 576 patches). A thing is an object (shape, colour, texture), a word or a
digit.
A word or digit may also be written on an object (its host), and then is no thing of its own in these counts.
Objects come in families: exact duplicates of one object, and near-misses that differ in one attribute.

Splits are disjoint by construction, as in version 1: a scene belongs to the split that the digest of its
description falls into, and each split's sampler rejects the scenes of the others.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np

from harness.drawings.scenes import (
    COLOURS,
    DIGITS,
    SHAPES,
    SPLIT_BUCKETS,
    SQUARE,
    TEXTURES,
    WORDS,
    varied_canvas,
)
from methods.views import cells

__all__ = ["COLOURS", "DIGITS", "SHAPES", "SQUARE", "TEXTURES", "WORDS", "cells", "varied_canvas"]

#: Side of a patch of the pocket towers in pixels; corners and sides of things are multiples of half of it.
PATCH, UNIT = 14, 7
#: Fewest and most things of a 336-pixel square, and the sides that objects may have there, in pixels.
REGIMES = {"sparse": (1, 5), "medium": (6, 14), "dense": (20, 48)}
SIDES = {"sparse": (42, 98), "medium": (35, 70), "dense": (28, 42)}
#: Shares of the patches that things touch in a dense scene.
DENSE_COVERAGE = (0.40, 0.75)
BACKGROUNDS = ("clouds", "gradient", "clutter")
_SPLIT_STREAM = {"train": 20, "calibration": 21, "eval": 22}
#: Share of the things that are words or digits, and of the objects with something written on them.
_TEXT_SHARE, _WRITTEN_SHARE = 0.3, 0.45
#: Greatest width of a letter as a share of the font's size (DejaVu Sans Bold).
_LETTER = 0.83


@dataclass(frozen=True)
class Thing:
    """An object, a word or a digit; the box is in pixels (left, top, width, height).

    host: number of the object it is written on; -1: it stands alone. Objects have a texture, texts are plain.
    """

    kind: str  # "object", "word" or "digit"
    name: str
    colour: str
    texture: str
    box: tuple[int, int, int, int]
    host: int = -1

    @property
    def is_text(self) -> bool:
        return self.kind != "object"

    @property
    def centre(self) -> tuple[float, float]:
        left, top, width, height = self.box
        return left + width / 2, top + height / 2


@dataclass(frozen=True)
class Scene:
    """things: hosts before what is written on them. paint: three colours of the background, and its seed."""

    things: tuple[Thing, ...]
    regime: str
    background: str
    palette: tuple[str, str, str]
    paint_seed: int
    width: int
    height: int

    @property
    def objects(self) -> tuple[Thing, ...]:
        return tuple(t for t in self.things if not t.is_text)

    @property
    def alone(self) -> tuple[Thing, ...]:
        """The things that the regime counts: not those written on others."""
        return tuple(t for t in self.things if t.host < 0)

    @property
    def bucket(self) -> int:
        """0..9, from the digest of the things and the background: decides the split."""
        return hashlib.sha256(repr((self.things, self.background)).encode()).digest()[0] % 10


def text_size(text: str, font: int) -> tuple[int, int]:
    """Width and height in pixels of a text's box, its outline included."""
    return round(_LETTER * font * len(text)) + 4, round(0.8 * font) + 5


def shares(scene: Scene, things) -> list[tuple[float, float, float, float]]:
    """The things' boxes as shares of the canvas."""
    w, h = scene.width, scene.height
    return [(t.box[0] / w, t.box[1] / h, t.box[2] / w, t.box[3] / h) for t in things]


def coverage(scene: Scene) -> float:
    """Share of the canvas's patches that things touch."""
    grid = round(scene.height / PATCH), round(scene.width / PATCH)
    return float(cells(shares(scene, scene.things), *grid, least=1e-6).mean())


def _pick(rng: np.random.Generator, items):
    return items[int(rng.integers(len(items)))]


def _attributes(rng: np.random.Generator, wanted: int, families: float) -> list[tuple[str, str, str]]:
    """Shape, colour and texture of so many objects: families of duplicates and near-misses, and others.

    families: share of the groups that are families.
    """
    found: list[tuple[str, str, str]] = []
    while len(found) < wanted:
        base = (_pick(rng, SHAPES), _pick(rng, list(COLOURS)), _pick(rng, TEXTURES))
        size = int(rng.integers(2, 6)) if rng.random() < families else 1
        for i in range(size):
            own = list(base)
            if i and rng.random() < 0.4:
                which = int(rng.integers(3))
                own[which] = _pick(rng, (SHAPES, list(COLOURS), TEXTURES)[which])
            found.append(tuple(own))
    return found[:wanted]


def _free(rng: np.random.Generator, taken: np.ndarray, width: int, height: int) -> tuple[int, int] | None:
    """A random corner, in units, for a box that keeps one unit's distance from others and from the edge; or
    None."""
    full = np.zeros((taken.shape[0] + 1, taken.shape[1] + 1), np.int32)
    full[1:, 1:] = taken.cumsum(0).cumsum(1)
    h, w = height + 2, width + 2
    inside = full[h:, w:] - full[:-h, w:] - full[h:, :-w] + full[:-h, :-w]
    ys, xs = np.nonzero(inside == 0)
    if not len(ys):
        return None
    i = int(rng.integers(len(ys)))
    return int(xs[i]) + 1, int(ys[i]) + 1


def _sample(rng: np.random.Generator, regime: str, canvas: tuple[int, int]) -> Scene:
    scale = canvas[0] * canvas[1] / (SQUARE[0] * SQUARE[1])
    fewest, most = REGIMES[regime]
    wanted = int(rng.integers(fewest, most + 1))
    if regime == "dense":
        fewest, wanted = round(fewest * scale), round(wanted * scale)
    smallest, largest = (side // UNIT for side in SIDES[regime])
    if regime == "dense" and wanted > 34 * scale:
        largest -= 1  # so many find room only if they are small
    if regime == "dense" and wanted < 30 * scale:
        smallest = largest - 1  # so few touch enough patches only if they are large
    texts = int((rng.random(wanted) < _TEXT_SHARE).sum())
    looks = _attributes(rng, wanted - texts, 0.7 if regime == "sparse" else 0.45)
    order = [*looks, *[None] * texts]
    order = [order[int(i)] for i in rng.permutation(wanted)]
    taken = np.zeros((canvas[1] // UNIT, canvas[0] // UNIT), bool)
    things: list[Thing] = []
    for look in order:
        if look is None:
            kind = "word" if rng.random() < 0.7 else "digit"
            name, colour = _pick(rng, WORDS if kind == "word" else DIGITS), _pick(rng, list(COLOURS))
            wide, high = _alone_units(name, regime, rng)
        else:
            kind, (name, colour, texture) = "object", look
            wide = high = int(rng.integers(smallest, largest + 1))
        corner = _free(rng, taken, wide, high)
        if corner is None:
            continue
        x, y = corner
        taken[y : y + high, x : x + wide] = True
        box = (x * UNIT, y * UNIT, wide * UNIT, high * UNIT)
        things.append(Thing(kind, name, colour, "plain" if look is None else texture, box))
        if look is not None and rng.random() < _WRITTEN_SHARE:
            written = _written(rng, things[-1], len(things) - 1)
            if written is not None:
                things.append(written)
    palette = tuple(list(COLOURS)[int(i)] for i in rng.choice(len(COLOURS), 3, replace=False))
    return Scene(tuple(things), regime, _pick(rng, BACKGROUNDS), palette, int(rng.integers(2**31)), *canvas)


def font_of(thing: Thing) -> int:
    """Pixels of the font that fills a text's box."""
    return int(min((thing.box[3] - 5) / 0.8, (thing.box[2] - 4) / (_LETTER * len(thing.name))) + 1e-6)


def _alone_units(name: str, regime: str, rng: np.random.Generator) -> tuple[int, int]:
    """Width and height, in units, of a text that stands alone."""
    if regime == "dense":
        return (4, 4) if len(name) == 1 else (6, 3)
    font = int(rng.integers(15, 30 if regime == "sparse" else 23))
    wide, high = text_size(name, font)
    return -(-wide // UNIT), -(-high // UNIT)


def _written(rng: np.random.Generator, host: Thing, number: int) -> Thing | None:
    """A word or digit on an object; None if the object is too small for one."""
    left, top, side, _ = host.box
    words = [w for w in WORDS if text_size(w, 10)[0] <= 0.85 * side]
    kind = "word" if words and rng.random() < 0.7 else "digit"
    name = _pick(rng, words if kind == "word" else DIGITS)
    font = 10
    while (
        font < 20
        and text_size(name, font + 1)[0] <= 0.8 * side
        and text_size(name, font + 1)[1] <= 0.5 * side
    ):
        font += 1
    wide, high = text_size(name, font)
    if wide > side or high > 0.7 * side:
        return None
    box = (left + (side - wide) // 2, top + (side - high) // 2, wide, high)
    return Thing(kind, name, "white", "plain", box, number)


def sample_scene(
    split: str,
    seed: int,
    index: int,
    regime: str | None = None,
    canvas: tuple[int, int] = SQUARE,
) -> Scene:
    """Scene number `index` of a split: the same arguments give the same scene.

    regime: None: that of the index, each third scene one. canvas: width and height in pixels.

    Raises:
        KeyError: unknown split or regime.
    """
    regime = list(REGIMES)[index % 3] if regime is None else regime
    rng = np.random.default_rng([_SPLIT_STREAM[split], seed, index])
    fewest, _ = REGIMES[regime]
    if regime == "dense":
        fewest = round(fewest * canvas[0] * canvas[1] / (SQUARE[0] * SQUARE[1]))
    while True:
        scene = _sample(rng, regime, canvas)
        if len(scene.alone) < fewest or scene.bucket not in SPLIT_BUCKETS[split]:
            continue
        if regime == "dense" and not DENSE_COVERAGE[0] <= coverage(scene) <= DENSE_COVERAGE[1]:
            continue
        return scene


def without_things(scene: Scene) -> Scene:
    """The bare background."""
    return replace(scene, things=())
