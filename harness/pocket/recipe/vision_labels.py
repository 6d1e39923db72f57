"""What the vision tower is taught in stage 1: labels of patches, and of the whole image for CLS."""

from __future__ import annotations

import numpy as np

from harness.pocket.data.scenes import (
    BACKGROUNDS,
    COLOURS,
    DIGITS,
    IMAGE_SIZE,
    MAX_THINGS,
    SHAPES,
    SIZES,
    TEXTURES,
    WORDS,
    Scene,
)

PATCH = 14
SIDE = IMAGE_SIZE // PATCH
NAMES = SHAPES + WORDS + DIGITS
COLOUR_NAMES = tuple(COLOURS)
IGNORE = -100
#: A patch belongs to a thing when the thing's box covers at least this share of it.
MIN_COVER = 0.15

#: Classes of each per-patch head; the last class of `name` and `colour` is "no thing here".
PATCH_CLASSES = {
    "name": len(NAMES) + 1,
    "colour": len(COLOURS) + 1,
    "texture": len(TEXTURES),
    "size": len(SIZES),
}
#: CLS: presence of each (colour, shape), of each word or digit, the number of things, the background.
PRESENCE = len(COLOURS) * len(SHAPES) + len(WORDS) + len(DIGITS)
IMAGE_CLASSES = {"count": MAX_THINGS + 1, "background": len(BACKGROUNDS)}


def _overlap(start: int, length: int, cells: int, cell: float) -> np.ndarray:
    """Share of each of the intervals [i cell, (i + 1) cell) that [start, start + length) covers."""
    edges = np.arange(cells) * cell
    return np.clip(np.minimum(edges + cell, start + length) - np.maximum(edges, start), 0, cell) / cell


def label_patches(
    scene: Scene,
    grid: tuple[int, int] = (SIDE, SIDE),
    least: float = MIN_COVER,
    own_centre: bool = False,
) -> dict[str, np.ndarray]:
    """Per cell of a grid of rows x columns over the canvas (by default CLIP's 576 patches), row by row: class
    ids int64 for each of PATCH_CLASSES, `owner` (the thing's number, -1: none), and `offset` float32 [N, 2],
    the vector (x, y; in cells) from the cell's centre to the centre of the thing it belongs to (NaN: none).

    least: the share of a cell that a thing must cover. own_centre: the cell with a thing's centre is always
    its own, whatever covers more of it.
    """
    rows, columns = grid
    high, wide = scene.height / rows, scene.width / columns
    cover = np.full((rows, columns), least)
    owner = np.full((rows, columns), -1)
    for i, thing in enumerate(scene.things):
        left, top, width, height = thing.box
        share = _overlap(top, height, rows, high)[:, None] * _overlap(left, width, columns, wide)[None, :]
        if own_centre:
            x, y = thing.centre
            share[int(y / high), int(x / wide)] += 1
        owner[share > cover] = i
        cover = np.maximum(cover, share)
    owner = owner.ravel()
    things = scene.things
    table = {
        "name": [NAMES.index(t.name) for t in things] + [len(NAMES)],
        "colour": [COLOUR_NAMES.index(t.colour) for t in things] + [len(COLOURS)],
        "texture": [IGNORE if t.is_text else TEXTURES.index(t.texture) for t in things] + [IGNORE],
        "size": [SIZES.index(t.size) for t in things] + [IGNORE],
    }
    labels = {key: np.array(values, np.int64)[owner] for key, values in table.items()}
    labels["owner"] = owner
    centres = np.array([t.centre for t in things] + [(np.nan, np.nan)], np.float32)
    row, column = np.divmod(np.arange(rows * columns), columns)
    middles = np.stack([column + 0.5, row + 0.5], 1).astype(np.float32)
    labels["offset"] = (centres / np.array([wide, high], np.float32))[owner] - middles
    return labels


def label_image(scene: Scene) -> dict[str, np.ndarray]:
    """`presence` float32 [PRESENCE] of 0/1, `count` and `background` int64 scalars."""
    presence = np.zeros(PRESENCE, np.float32)
    shapes = len(COLOURS) * len(SHAPES)
    for t in scene.things:
        if t.is_text:
            presence[shapes + NAMES.index(t.name) - len(SHAPES)] = 1
        else:
            presence[COLOUR_NAMES.index(t.colour) * len(SHAPES) + SHAPES.index(t.name)] = 1
    return {
        "presence": presence,
        "count": np.int64(len(scene.things)),
        "background": np.int64(BACKGROUNDS.index(scene.background)),
    }
