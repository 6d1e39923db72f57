"""What the vision towers are taught: labels of every cell of a grid, and of the whole image."""

from __future__ import annotations

import numpy as np

from harness.drawings.v2.scenes import COLOURS, DIGITS, PATCH, REGIMES, SHAPES, TEXTURES, WORDS, Scene

NAMES = SHAPES + WORDS + DIGITS
TEXTS = WORDS + DIGITS
COLOUR_NAMES = tuple(COLOURS)
IGNORE = -100
#: A cell belongs to a thing whose box covers at least this share of it.
LEAST_COVER = 0.15
#: Classes of the read-outs of a cell. The last class of `name` and `colour` is "no thing here", that of
#: `written` "nothing written on this object".
CELL_CLASSES = {
    "name": len(NAMES) + 1,
    "colour": len(COLOURS) + 1,
    "texture": len(TEXTURES),
    "written": len(TEXTS) + 1,
}
#: Of the whole image: presence of each (colour, shape), word and digit; the regime.
PRESENCE = len(COLOURS) * len(SHAPES) + len(TEXTS)
IMAGE_CLASSES = {"regime": len(REGIMES)}


def _overlap(start: int, length: int, cells: int, cell: float) -> np.ndarray:
    """Share of each of the intervals [i cell, (i + 1) cell) that [start, start + length) covers."""
    edges = np.arange(cells) * cell
    return np.clip(np.minimum(edges + cell, start + length) - np.maximum(edges, start), 0, cell) / cell


def label_cells(
    scene: Scene, grid: tuple[int, int], least: float = LEAST_COVER, own_centre: bool = False
) -> dict[str, np.ndarray]:
    """Per cell of a grid of rows x columns over the canvas, row by row: class ids int64 for each of
    CELL_CLASSES, `owner` (number among `scene.alone`, -1: none), and `offset` float32 [N, 2], the vector
    (x, y; in cells) from the cell's centre to the centre of the thing it belongs to (NaN: none).

    What is written on an object is a label of all of the object's cells. own_centre: the cell with a thing's
    centre is always its own, whatever covers more of it.
    """
    rows, columns = grid
    high, wide = scene.height / rows, scene.width / columns
    cover, owner = np.full((rows, columns), least), np.full((rows, columns), -1)
    things = scene.alone
    for i, thing in enumerate(things):
        left, top, width, height = thing.box
        share = _overlap(top, height, rows, high)[:, None] * _overlap(left, width, columns, wide)[None, :]
        if own_centre:
            x, y = thing.centre
            share[int(y / high), int(x / wide)] += 1
        owner[share > cover] = i
        cover = np.maximum(cover, share)
    owner = owner.ravel()
    written = {scene.things[t.host]: t.name for t in scene.things if t.host >= 0}
    table = {
        "name": [NAMES.index(t.name) for t in things] + [len(NAMES)],
        "colour": [COLOUR_NAMES.index(t.colour) for t in things] + [len(COLOURS)],
        "texture": [IGNORE if t.is_text else TEXTURES.index(t.texture) for t in things] + [IGNORE],
        "written": [
            IGNORE if t.is_text else TEXTS.index(written[t]) if t in written else len(TEXTS) for t in things
        ]
        + [IGNORE],
    }
    labels = {key: np.array(values, np.int64)[owner] for key, values in table.items()}
    labels["owner"] = owner
    centres = np.array([t.centre for t in things] + [(np.nan, np.nan)], np.float32)
    row, column = np.divmod(np.arange(rows * columns), columns)
    middles = np.stack([column + 0.5, row + 0.5], 1).astype(np.float32)
    labels["offset"] = (centres / np.array([wide, high], np.float32))[owner] - middles
    return labels


def label_image(scene: Scene) -> dict[str, np.ndarray]:
    """`presence` float32 [PRESENCE] of 0/1, and `regime`, an int64 scalar."""
    presence = np.zeros(PRESENCE, np.float32)
    for t in scene.things:
        if t.is_text:
            presence[len(COLOURS) * len(SHAPES) + TEXTS.index(t.name)] = 1
        else:
            presence[COLOUR_NAMES.index(t.colour) * len(SHAPES) + SHAPES.index(t.name)] = 1
    return {"presence": presence, "regime": np.int64(list(REGIMES).index(scene.regime))}


def patch_grid(scene: Scene) -> tuple[int, int]:
    """Rows and columns of patches of a canvas."""
    return scene.height // PATCH, scene.width // PATCH
