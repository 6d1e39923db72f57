"""The pixels of a scene of version 2.

Things have the colours of the background, and an outline (dark inside, light outside) that tells them from
it. The clutter has outlines as well, so that neither colour nor contrast alone gives a thing away.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from harness.drawings.scenes import COLOURS, _font, _mask
from harness.drawings.v2.scenes import Scene, Thing, font_of

#: Colours of outlines and of what is written on things.
LIGHT, DARK = (245, 245, 240), (15, 15, 15)
#: How much of a palette colour is left in the background, and how far it may swing (0 to 255).
_SATURATION, _GRAIN = 0.62, 7.0
_GREY = 165
#: Octaves of 1/f noise: cells across the canvas.
_OCTAVES = (2, 4, 8, 16, 32)


def _noise(rng: np.random.Generator, width: int, height: int, octaves=_OCTAVES) -> np.ndarray:
    """1/f noise, float32 [height, width], about 0 to 1."""
    total = np.zeros((height, width), np.float32)
    for cells in octaves:
        small = Image.fromarray(rng.random((cells + 1, cells + 1), np.float32) - 0.5, "F")
        total += np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)) / cells**0.8
    low, high = np.percentile(total[::8, ::8], (2, 98))
    return np.clip((total - low) / (high - low + 1e-6), 0, 1)


def _tints(scene: Scene) -> np.ndarray:
    colours = np.array([COLOURS[c] for c in scene.palette], np.float32)
    return _SATURATION * colours + (1 - _SATURATION) * _GREY


def background(scene: Scene) -> Image.Image:
    """The scene without its things."""
    rng = np.random.default_rng(scene.paint_seed)
    width, height = -(-scene.width // 2), -(-scene.height // 2)  # painted in blocks of 2 x 2 pixels
    tints = _tints(scene)
    field = _noise(rng, width, height)
    if scene.background == "gradient":
        angle = rng.random() * 2 * math.pi
        ys, xs = np.mgrid[0:height, 0:width].astype(np.float32)
        ramp = xs / width * math.cos(angle) + ys / height * math.sin(angle)
        ramp = (ramp - ramp.min()) / (ramp.max() - ramp.min())
        field = 0.8 * ramp + 0.2 * field
    place = field * (len(tints) - 1)
    left = np.minimum(place.astype(np.int32), len(tints) - 2)
    share = (place - left)[..., None]
    pixels = tints[left] * (1 - share) + tints[left + 1] * share
    pixels += rng.normal(0, _GRAIN, (height, width, 1)).astype(np.float32)
    blocks = np.clip(pixels, 0, 255).astype(np.uint8).repeat(2, 0).repeat(2, 1)
    image = Image.fromarray(np.ascontiguousarray(blocks[: scene.height, : scene.width]))
    if scene.background == "clutter":
        _clutter(image, rng)
    return image


def _clutter(image: Image.Image, rng: np.random.Generator) -> None:
    """Bars, arcs and crumbs with outlines, in the things' colours; none of them is a shape or a letter."""
    draw = ImageDraw.Draw(image)
    width, height = image.size
    names = list(COLOURS)
    for _ in range(int(25 * width * height / 336**2)):
        x, y = int(rng.integers(width)), int(rng.integers(height))
        colour = COLOURS[names[int(rng.integers(len(names)))]]
        angle, length = rng.random() * 2 * math.pi, int(rng.integers(5, 16))
        kind = int(rng.integers(3))
        if kind == 0:
            end = (x + length * math.cos(angle), y + length * math.sin(angle))
            for fill, thick in ((LIGHT, 6), (DARK, 4), (colour, 2)):
                draw.line((x, y, *end), fill=fill, width=thick)
        elif kind == 1:
            start = math.degrees(angle)
            for fill, thick, grow in ((LIGHT, 5, 1), (DARK, 3, 0), (colour, 1, -1)):
                r = length + grow
                draw.arc((x - r, y - r, x + r, y + r), start, start + 90, fill=fill, width=thick)
        else:
            for fill, r in ((LIGHT, 4), (DARK, 3), (colour, 2)):
                draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)


@cache
def _stamp(name: str, colour: str, texture: str, side: int) -> tuple[Image.Image, Image.Image]:
    """An object's pixels and mask, side x side: its shape inside of a dark and a light line."""
    inner = side - 4
    shape = Image.new("L", (side, side))
    shape.paste(_mask(name, inner), (2, 2))
    dark, light = (shape.filter(ImageFilter.MaxFilter(size)) for size in (3, 5))
    image = Image.new("RGB", (side, side), LIGHT)
    image.paste(Image.new("RGB", (side, side), DARK), (0, 0), dark)
    image.paste(_fill(colour, texture, side), (0, 0), shape)
    return image, light


@cache
def _fill(colour: str, texture: str, side: int) -> Image.Image:
    """The colour with its texture, in steps of 7 pixels: one stripe or dot a unit, whatever the object."""
    base = COLOURS[colour]
    light = tuple(int(0.25 * v + 0.75 * 250) for v in base)
    tile = Image.new("RGB", (side, side), base)
    draw = ImageDraw.Draw(tile)
    if texture == "striped":
        for y in range(3, side, 7):
            draw.rectangle((0, y, side, y + 2), fill=light)
    elif texture == "dotted":
        for y in range(4, side, 7):
            for x in range(4, side, 7):
                draw.rectangle((x, y, x + 2, y + 2), fill=light)
    return tile


def _write(image: Image.Image, thing: Thing) -> None:
    """A text in its box: letters in its colour with an outline, or dark on a light plate on an object."""
    left, top, width, height = thing.box
    draw = ImageDraw.Draw(image)
    font, text = _font(font_of(thing)), thing.name.upper()
    x0, y0, x1, y1 = font.getbbox(text)
    at = (left + (width - (x1 - x0)) / 2 - x0, top + (height - (y1 - y0)) / 2 - y0)
    at = tuple(round(v) for v in at)
    if thing.host >= 0:
        draw.rectangle((left, top, left + width - 1, top + height - 1), fill=LIGHT)
        draw.text(at, text, font=font, fill=DARK)
        return
    colour = COLOURS[thing.colour]
    line = LIGHT if sum(colour) < 480 else DARK
    draw.text(at, text, font=font, fill=colour, stroke_width=2, stroke_fill=line)


def render(scene: Scene) -> Image.Image:
    """The scene as an RGB image of its canvas's size."""
    image = background(scene)
    for thing in scene.things:
        if thing.is_text:
            _write(image, thing)
        else:
            stamp, mask = _stamp(thing.name, thing.colour, thing.texture, thing.box[2])
            image.paste(stamp, thing.box[:2], mask)
    return image
