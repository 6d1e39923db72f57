"""Procedurally drawn scenes: what is in them (`SceneV1`), and the pixels (`render`).

A scene is a canvas of 336 x 336 pixels (or of any other size: `varied_canvas`) with 1 to 14 *things* on a
background from flat to cluttered. A thing is an object (shape, colour, texture, size) or a written label (a
word or a digit, colour, size). Boxes do not overlap and their corners lie on a 7-pixel lattice (half a CLIP
patch), which keeps the drawings learnable for a network of a few million parameters. Because the scene is
known, so is its true complexity: `len(scene.things)`.

Splits are disjoint by construction: a scene belongs to the split that the digest of its description falls
into, and each split's sampler rejects scenes of the other splits.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # a command's help is there at once: what draws is imported where it draws
    from PIL import Image, ImageFont

IMAGE_SIZE = 336
LATTICE = 7
MAX_THINGS = 14
#: Width and height in pixels: the canvas of LLaVA's sets, and the shortest and longest side where it varies.
SQUARE = (IMAGE_SIZE, IMAGE_SIZE)
VARIED_SIDES = (224, 448)

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart")
COLOURS = {
    "red": (215, 30, 35),
    "green": (25, 150, 60),
    "blue": (35, 75, 220),
    "yellow": (240, 200, 0),
    "orange": (245, 125, 15),
    "purple": (140, 45, 180),
    "black": (20, 20, 20),
    "cyan": (0, 180, 200),
}
TEXTURES = ("plain", "striped", "dotted")
SIZES = ("small", "medium", "large")
OBJECT_UNITS = {"small": 4, "medium": 6, "large": 9}
FONT_PIXELS = {"small": 18, "medium": 25, "large": 34}

ANIMALS = ("cat", "dog", "fish", "bird", "cow", "bee")
FOODS = ("egg", "rice", "cake", "milk", "corn", "tea")
TOOLS = ("key", "pen", "cup", "saw", "fork", "lamp")
PLACES = ("park", "zoo", "farm", "shop", "road", "lake")
WORDS = ANIMALS + FOODS + TOOLS + PLACES
DIGITS = tuple("0123456789")
BACKGROUNDS = ("flat", "gradient", "noise", "strokes", "blobs")

# Buckets of the description's digest (0..9) that belong to each split.
SPLIT_BUCKETS = {"train": range(0, 8), "calibration": range(8, 9), "eval": range(9, 10)}
_SPLIT_STREAM = {"train": 0, "calibration": 1, "eval": 2}
_CANVAS_STREAM = 3


@dataclass(frozen=True)
class ThingV1:
    """One object or written label; the box is in pixels (left, top, width, height)."""

    kind: str  # "object", "word" or "digit"
    name: str  # the shape, the word or the digit
    colour: str
    size: str
    texture: str
    box: tuple[int, int, int, int]

    @property
    def is_text(self) -> bool:
        return self.kind != "object"

    @property
    def centre(self) -> tuple[float, float]:
        left, top, width, height = self.box
        return left + width / 2, top + height / 2


@dataclass(frozen=True)
class SceneV1:
    things: tuple[ThingV1, ...]
    background: str
    tint: tuple[int, int, int]
    paint_seed: int
    width: int = IMAGE_SIZE
    height: int = IMAGE_SIZE

    @property
    def objects(self) -> tuple[ThingV1, ...]:
        return tuple(t for t in self.things if not t.is_text)

    @property
    def texts(self) -> tuple[ThingV1, ...]:
        return tuple(t for t in self.things if t.is_text)

    @property
    def bucket(self) -> int:
        """0..9, from the digest of the things and the kind of background: decides the split."""
        # the split was drawn when the class was called Thing
        description = repr((self.things, self.background)).replace("ThingV1(", "Thing(").encode()
        return hashlib.sha256(description).digest()[0] % 10


@cache
def _font(pixels: int) -> ImageFont.FreeTypeFont:
    # matplotlib ships this font file, so every installation draws the same glyphs.
    import matplotlib
    from PIL import ImageFont

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf"
    return ImageFont.truetype(str(path), pixels)


@cache
def _text_units(text: str, size: str) -> tuple[int, int]:
    """Width and height, in lattice units, of the box that holds `text`."""
    left, top, right, bottom = _font(FONT_PIXELS[size]).getbbox(text.upper())
    return math.ceil((right - left + 4) / LATTICE), math.ceil((bottom - top + 4) / LATTICE)


def _place(rng: np.random.Generator, taken: np.ndarray, width: int, height: int) -> tuple[int, int] | None:
    """A free lattice corner for a box with a margin of one unit, or None after a few tries."""
    for _ in range(12):
        x = int(rng.integers(1, taken.shape[1] - width))
        y = int(rng.integers(1, taken.shape[0] - height))
        if not taken[y - 1 : y + height + 1, x - 1 : x + width + 1].any():
            taken[y : y + height, x : x + width] = True
            return x, y
    return None


def _sample(rng: np.random.Generator, fewest: int, most: int, canvas: tuple[int, int]) -> SceneV1:
    wanted = int(rng.integers(fewest, most + 1))
    share_of_text = float(rng.choice([0.2, 0.35, 0.6]))
    kinds = [
        "object" if rng.random() > share_of_text else ("word" if rng.random() < 0.7 else "digit")
        for _ in range(wanted)
    ]
    taken = np.zeros((canvas[1] // LATTICE, canvas[0] // LATTICE), bool)
    things: list[ThingV1] = []
    for kind in kinds:
        size = SIZES[int(rng.choice(3, p=(0.4, 0.35, 0.25)))]
        colour = list(COLOURS)[int(rng.integers(len(COLOURS)))]
        if kind == "object":
            name = SHAPES[int(rng.integers(len(SHAPES)))]
            texture = TEXTURES[int(rng.choice(3, p=(0.5, 0.25, 0.25)))]
            width = height = OBJECT_UNITS[size]
        else:
            names = WORDS if kind == "word" else DIGITS
            name, texture = names[int(rng.integers(len(names)))], "plain"
            width, height = _text_units(name, size)
        corner = _place(rng, taken, width, height)
        if corner is not None:
            box = (corner[0] * LATTICE, corner[1] * LATTICE, width * LATTICE, height * LATTICE)
            things.append(ThingV1(kind, name, colour, size, texture, box))
    tint = tuple(int(v) for v in rng.integers(190, 246, 3))
    background = BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]
    return SceneV1(tuple(things), background, tint, int(rng.integers(2**31)), *canvas)


def varied_canvas(seed: int, index: int, sides: tuple[int, int] = VARIED_SIDES) -> tuple[int, int]:
    """Width and height in pixels, each drawn from `sides` (both ends included): aspect ratios up to 2."""
    rng = np.random.default_rng([_CANVAS_STREAM, seed, index])
    width, height = (int(side) for side in rng.integers(sides[0], sides[1] + 1, 2))
    return width, height


def sample_scene(
    split: str,
    seed: int,
    index: int,
    fewest: int = 1,
    most: int = MAX_THINGS,
    canvas: tuple[int, int] = SQUARE,
) -> SceneV1:
    """Scene number `index` of a split: the same arguments give the same scene.

    canvas: width and height in pixels. At most `most` things; fewer than `fewest` where they find no room.

    Raises:
        KeyError: unknown split.
    """
    rng = np.random.default_rng([_SPLIT_STREAM[split], seed, index])
    while True:
        scene = _sample(rng, fewest, most, canvas)
        if scene.things and scene.bucket in SPLIT_BUCKETS[split]:
            return scene


def _polygon(name: str, size: int) -> list[tuple[float, float]]:
    c, r = size / 2, size / 2 - 1
    if name == "triangle":
        return [(c, 1), (size - 1, size - 2), (1, size - 2)]
    if name == "diamond":
        return [(c, 0), (size - size * 0.18, c), (c, size - 1), (size * 0.18, c)]
    if name == "star":
        radii = [r if i % 2 == 0 else 0.42 * r for i in range(10)]
        return [
            (c + q * math.sin(math.pi * i / 5), c - q * math.cos(math.pi * i / 5))
            for i, q in enumerate(radii)
        ]
    if name == "cross":
        a, b = size * 0.34, size * 0.66
        return [
            (a, 1),
            (b, 1),
            (b, a),
            (size - 1, a),
            (size - 1, b),
            (b, b),
            (b, size - 1),
            (a, size - 1),
            (a, b),
            (1, b),
            (1, a),
            (a, a),
        ]
    turns = [2 * math.pi * i / 40 for i in range(40)]  # heart
    xs = [16 * math.sin(t) ** 3 for t in turns]
    ys = [13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) for t in turns]
    return [(c + x / 16.5 * r, c - (y + 2.5) / 15 * r) for x, y in zip(xs, ys)]


@cache
def _mask(name: str, size: int) -> Image.Image:
    """Anti-aliased silhouette of a shape (mode L, size x size)."""
    from PIL import Image, ImageDraw

    big = size * 3
    mask = Image.new("L", (big, big))
    draw = ImageDraw.Draw(mask)
    if name == "circle":
        draw.ellipse((2, 2, big - 3, big - 3), fill=255)
    elif name == "ring":
        draw.ellipse((2, 2, big - 3, big - 3), fill=255)
        hole = big * 0.27
        draw.ellipse((hole, hole, big - hole, big - hole), fill=0)
    elif name == "square":
        draw.rectangle((4, 4, big - 5, big - 5), fill=255)
    else:
        draw.polygon(_polygon(name, big), fill=255)
    return mask.resize((size, size), Image.Resampling.BOX)


@cache
def _texture(colour: str, texture: str, size: int) -> Image.Image:
    from PIL import Image, ImageDraw

    base = COLOURS[colour]
    light = tuple(int(0.35 * v + 0.65 * 250) for v in base)
    tile = Image.new("RGB", (size, size), base)
    draw = ImageDraw.Draw(tile)
    if texture == "striped":
        for y in range(3, size, 8):
            draw.rectangle((0, y, size, y + 2), fill=light)
    elif texture == "dotted":
        for y in range(3, size, 8):
            for x in range(3, size, 8):
                draw.ellipse((x, y, x + 3, y + 3), fill=light)
    return tile


def _background(scene: SceneV1) -> Image.Image:
    from PIL import Image, ImageDraw

    rng = np.random.default_rng(scene.paint_seed)
    width, height = scene.width, scene.height
    tint = np.array(scene.tint, np.float32)
    if scene.background == "gradient":
        other = rng.integers(170, 250, 3).astype(np.float32)
        down = rng.random() < 0.5
        ramp = np.linspace(0, 1, height if down else width, dtype=np.float32)[:, None]
        colours = tint * (1 - ramp) + other * ramp
        pixels = np.broadcast_to(colours[:, None] if down else colours, (height, width, 3))
        return Image.fromarray(pixels.astype(np.uint8))
    if scene.background == "noise":
        coarse = rng.normal(0, 14, (-(-height // 4), -(-width // 4), 3)).repeat(4, 0).repeat(4, 1)
        return Image.fromarray(np.clip(tint + coarse[:height, :width], 0, 255).astype(np.uint8))
    image = Image.new("RGB", (width, height), scene.tint)
    draw = ImageDraw.Draw(image)

    def somewhere(lowest: int) -> tuple[int, int]:
        # Drawn on a square, then stretched: the same random numbers whatever the canvas.
        x, y = (int(v) for v in rng.integers(lowest, IMAGE_SIZE, 2))
        return x * width // IMAGE_SIZE, y * height // IMAGE_SIZE

    if scene.background == "strokes":
        for _ in range(int(rng.integers(15, 60))):
            x, y = somewhere(0)
            dx, dy = rng.integers(-60, 61, 2)
            draw.line(
                (x, y, x + dx, y + dy),
                fill=tuple(int(v) for v in rng.integers(140, 225, 3)),
                width=int(rng.integers(1, 3)),
            )
    elif scene.background == "blobs":
        for _ in range(int(rng.integers(8, 30))):
            x, y = somewhere(-20)
            w, h = rng.integers(10, 70, 2)
            draw.ellipse((x, y, x + w, y + h), fill=tuple(int(v) for v in rng.integers(165, 240, 3)))
    return image


def render(scene: SceneV1) -> Image.Image:
    """The scene as an RGB image of its canvas's size."""
    from PIL import ImageDraw

    image = _background(scene)
    draw = ImageDraw.Draw(image)
    for thing in scene.things:
        left, top, width, _ = thing.box
        if thing.is_text:
            font = _font(FONT_PIXELS[thing.size])
            x0, y0, _, _ = font.getbbox(thing.name.upper())
            draw.text(
                (left + 2 - x0, top + 2 - y0), thing.name.upper(), font=font, fill=COLOURS[thing.colour]
            )
        else:
            image.paste(_texture(thing.colour, thing.texture, width), (left, top), _mask(thing.name, width))
    return image
