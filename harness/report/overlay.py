"""`python -m harness overlay`: what each method keeps of an image, drawn over it, with its answer.

A method that takes tokens one after the other (it says so by an attribute `orders`) has them coloured by
their place in that order. What counts is what is left in the last layer, where FastV and its kin have made
their cuts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch

from harness.tasks.answering import generate_arguments
from methods.errors import UserError

#: one image in the figure, inches
SIDE = 2.3
#: an answer is cut here
NEW_TOKENS = 32


@dataclass(frozen=True)
class Picture:
    """An image (PIL, RGB), what is asked about it, and the right answer ("" if unknown)."""

    image: object
    question: str
    answer: str = ""


@dataclass(frozen=True)
class Kept:
    """kept: places of the tokens left, int [K]. order: the step, from 0, at which each of them was chosen
    (they are ascending then), None if the method has no steps. answer: what the model said."""

    kept: np.ndarray
    order: np.ndarray | None
    answer: str


def run(
    backbone_name: str,
    methods: Sequence[str],
    budget: int | float,
    out: Path,
    images: Sequence[Path] = (),
    question: str | None = None,
    device: str = "cpu",
) -> int:
    """Draw one row per image (by default a sparse and a dense scene of Pocket-8), one column per method."""
    import backbones
    from backbones.hub.find import find
    from harness.run import preflight
    from methods import registry

    if images and question is None:
        raise UserError("--images needs --question, what is asked about them")
    preflight.check_place(out.parent)
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; name a file, such as {out / 'overlay.png'}")
    preflight.check_methods(methods, [budget])
    pictures = [_from_file(path, question or "") for path in images]
    find(backbone_name)
    pruners = [registry.build(spec, budget=budget) for spec in methods]
    backbone = backbones.load(backbone_name, device=device)
    pictures = pictures or scenes(question, backbone)
    rows = [[look(backbone, pruner, picture) for pruner in pruners] for picture in pictures]
    draw(pictures, methods, rows, [grid_of(backbone, p) for p in pictures], out)
    for picture, row in zip(pictures, rows):
        said = ", ".join(f"{m} {len(r.kept)} tokens: {r.answer!r}" for m, r in zip(methods, row))
        print(f"{picture.question.splitlines()[0]} ({picture.answer or 'no answer known'}): {said}")
    print(out)
    return 0


def scenes(question: str | None, backbone) -> list[Picture]:
    """Of the held-out scenes of Pocket-8 that the backbone is asked about, the first with at most two things
    and the first with twelve or more. question: None: its first one."""
    from harness.pocket.supplies import PocketSupplies

    source = PocketSupplies().held_out(backbone)

    def first(fits: Callable[[int], bool]) -> Picture:
        example = next(e for e in map(source.__getitem__, count()) if fits(e.things))
        asked, answer = (question, "") if question else example.asked[0]
        return Picture(example.image, asked, answer)

    return [first(lambda n: n <= 2), first(lambda n: n >= 12)]


def look(backbone, pruner, picture: Picture) -> Kept:
    """What is left of the picture in the last layer, and the answer."""
    inputs = backbone.inputs([picture.image], [picture.question])
    with torch.inference_mode(), pruner(backbone.model) as trace:
        ids = backbone.model.generate(**inputs, **generate_arguments({"max_new_tokens": NEW_TOKENS}))
        kept = trace.kept[0][-1].cpu() if trace.kept[0] else torch.arange(int(trace.visual_tokens[0, -1]))
    said = backbone.processor.tokenizer.decode(
        ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    orders = getattr(pruner, "orders", None)
    order = None if orders is None else orders[0].cpu().argsort().numpy()
    made = kept < 0  # CLS, clusters: they have no place in the image
    printable = "".join(c if c.isprintable() else " " for c in said).strip()
    return Kept(kept[~made].numpy(), order, printable)


def grid_of(backbone, picture: Picture) -> tuple[int, int]:
    """Rows and columns of the picture's visual tokens."""
    inputs = backbone.inputs([picture.image], [picture.question])
    return backbone.family.raster(backbone.model.config, inputs)


def draw(
    pictures: Sequence[Picture],
    methods: Sequence[str],
    rows: Sequence[Sequence[Kept]],
    grids: Sequence[tuple[int, int]],
    out: Path,
) -> None:
    """Write the figure. What is dropped is faded; an order is coloured from dark (first) to bright (last)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = len(methods) + 1
    figure, axes = plt.subplots(
        len(pictures), columns, figsize=(SIDE * columns, (SIDE + 0.5) * len(pictures)), squeeze=False
    )
    for picture, row, grid, line in zip(pictures, rows, grids, axes):
        pixels = np.asarray(picture.image.convert("RGB")) / 255
        line[0].imshow(pixels)
        line[0].set_title(_wrapped(picture.question.splitlines()[0]), fontsize=7)
        line[0].set_xlabel(picture.answer, fontsize=7)
        for axis, method, found in zip(line[1:], methods, row):
            axis.imshow(_faded(pixels, found.kept, grid))
            if found.order is not None:
                axis.imshow(_coloured(found, grid), extent=(0, pixels.shape[1], pixels.shape[0], 0))
            axis.set_title(f"{method}: {len(found.kept)} tokens", fontsize=7)
            axis.set_xlabel(found.answer, fontsize=7)
        for axis in line:
            axis.set_xticks([])
            axis.set_yticks([])
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)
    plt.close(figure)


def _faded(pixels: np.ndarray, kept: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The image, nearly white where its tokens were dropped."""
    left = np.zeros(grid, bool)
    left.flat[kept] = True
    rows = np.arange(pixels.shape[0]) * grid[0] // pixels.shape[0]
    columns = np.arange(pixels.shape[1]) * grid[1] // pixels.shape[1]
    return np.where(left[rows][:, columns, None], pixels, 0.85 + 0.15 * pixels)


def _coloured(found: Kept, grid: tuple[int, int]) -> np.ndarray:
    """RGBA, one pixel a token: the order of choice over the tokens kept."""
    import matplotlib

    layer = np.zeros((*grid, 4))
    places = found.order / max(1, len(found.order) - 1)
    layer.reshape(-1, 4)[np.sort(found.kept)] = matplotlib.colormaps["plasma"](places, alpha=0.45)
    return layer


def _wrapped(text: str) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, 38)[:3])


def _from_file(path: Path, question: str) -> Picture:
    from backbones.images import BadImage, upright

    try:
        return Picture(upright(path), question)
    except BadImage as error:
        raise UserError(f"cannot read the image {path}: {error}") from error
