"""Writes Pocket-8 as parquet files in the schemas of the eight benchmarks.

There are two sets: on squares of 336 pixels, and on canvases of varied size and aspect ratio, for backbones
that take any image size. And there are two versions of each, 1 and 2 (`harness.pocket.data.v2`); a run
takes the one that the shipped backbone of that set was trained for.

python -m harness.pocket.data.build            # into the cache folder that `ensure` uses
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import io
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from harness.drawings.scenes import SQUARE, SceneV1, render, sample_scene, varied_canvas
from harness.drawings.v2 import paint as v2_paint
from harness.drawings.v2 import scenes as v2_scenes
from harness.drawings.wording import Row
from harness.pocket.data import documents
from harness.pocket.data import v2 as v2_build
from harness.tasks.suites import BENCHMARKS

_DRAWING = ".drawing-"
#: Part of the folder's name: a change of scenes, questions or schemas is a new version.
VERSIONS = (1, 2)
#: What is drawn and asked unless another version is named: what the shipped weights were trained for.
SQUARES_VERSION, VARIED_VERSION = 1, 1
#: The benchmarks that both versions ask.
EIGHT = ("gqa", "mmbench_en", "mmbench_cn", "mme", "pope", "scienceqa", "vqav2", "textvqa")
SEED = 20261122
#: In front of the names of images on varied canvases, and at the end of their folder's.
VARIED = "varied"
SPLITS = ("eval", "calibration")


def version_of(varied: bool) -> int:
    """The version of that set that a run takes."""
    return VARIED_VERSION if varied else SQUARES_VERSION


def drawn(scene: SceneV1 | v2_scenes.Scene):
    """A scene of either version as an RGB image."""
    return render(scene) if isinstance(scene, SceneV1) else v2_paint.render(scene)


def _png(scene: SceneV1 | v2_scenes.Scene, name: str) -> dict[str, object]:
    data = io.BytesIO()
    drawn(scene).save(data, "PNG", compress_level=1)
    return {"bytes": data.getvalue(), "path": f"{name}.png"}


def image_name(task: str, split: str, index: int, varied: bool = False) -> str:
    """Name of a task's image, as its file has it (`scene_of` is the way back)."""
    return f"{VARIED}-" * varied + f"{task}-{split}-{index:05d}"


def scene_of(name: str) -> SceneV1 | v2_scenes.Scene:
    """What is drawn on the image of that name (with or without .png). Raises ValueError for another name."""
    if name.startswith(f"{v2_build.PREFIX}-"):
        return v2_build.scene_of(name)
    varied = name.startswith(f"{VARIED}-")
    task, split, index = name.removesuffix(".png").removeprefix(f"{VARIED}-").split("-")
    return _scene(task, split, int(index), varied)


def _scene(task: str, split: str, index: int, varied: bool) -> SceneV1:
    seed = SEED + documents.tasks().index(task)
    canvas = varied_canvas(seed, index) if varied else SQUARE
    return sample_scene(split, seed, index, canvas=canvas)


def _groups(task: str, split: str, wanted: int, varied: bool = False):
    """Yields (image name, scene, rows of one question) until `wanted` questions were made."""
    stream = documents.tasks().index(task)
    made = index = 0
    while made < wanted:
        scene = _scene(task, split, index, varied)
        rng = np.random.default_rng([SEED, stream, index])
        for _ in range(documents.drawing(task).per_image):
            rows = documents.rows(task, scene, rng, made)
            if rows and made < wanted:
                yield image_name(task, split, index, varied), scene, rows
                made += 1
        index += 1


def _write(rows: list[Row], path: Path) -> None:
    from datasets import Dataset, Image

    path.parent.mkdir(parents=True, exist_ok=True)
    table = Dataset.from_list(rows)
    if "image" in rows[0]:
        table = table.cast_column("image", Image())
    table.to_parquet(str(path))


def _all_groups(split: str, varied: bool, version: int):
    """Yields (task, its groups) of a split."""
    if version == 2:
        yield from v2_build.groups(split, varied).items()
        return
    for task, count in documents.questions(1).items():
        yield task, _groups(task, split, count if split == "eval" else count // 4, varied)


def build(root: Path, progress: bool = True, varied: bool = False, version: int | None = None) -> Path:
    """Draw and write every task and split below `root`, `<task>/<split>.parquet` (GQA: `_instructions`,
    `_images`), on squares or on canvases of varied size. version: None: `version_of` the set.
    """
    import datasets

    version = version or version_of(varied)

    datasets.disable_progress_bars()  # one bar over the files is enough
    total = len(SPLITS) * len(documents.questions(version))
    bar = tqdm(total=total, desc="drawing Pocket-8", unit="file", disable=not progress)
    for split in SPLITS:
        for task, groups in _all_groups(split, varied, version):
            drawing, files = documents.drawing(task), BENCHMARKS[task].files
            rows, images = [], {}
            for question, (name, scene, group) in enumerate(groups):
                if name not in images:
                    images[name] = _png(scene, name)
                for position, row in enumerate(group):
                    row = drawing.identify(row, name, question, position) | row | drawing.extra(scene)
                    rows.append(row if "images" in files else row | {"image": images[name]})
            if drawing.order is not None:
                rows.sort(key=drawing.order)
            _write(rows, root / files["rows"].format(split=split))
            if "images" in files:
                table = [dict(id=name, image=image) for name, image in images.items()]
                _write(table, root / files["images"].format(split=split))
            bar.update()
    bar.close()
    return root


def default_root(varied: bool = False, version: int | None = None) -> Path:
    """`$POCKET8_HOME`, or a folder in the user's cache; named after the version, and after
    benchmarks beyond the eight."""
    home = os.environ.get("POCKET8_HOME")
    base = Path(home) if home else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pocket8"
    others = "".join(f"+{task}" for task in documents.tasks() if task not in EIGHT)
    return base / (f"v{version or version_of(varied)}" + f"-{VARIED}" * varied + others)


def ensure(root: Path | None = None, varied: bool = False, version: int | None = None) -> Path:
    """The folder with the data sets; draws them on first use (half a minute), in one atomic step.

    varied: on canvases of varied size instead of squares; both sets live side by side.
    version: None: `version_of` the set.
    """
    root = root or default_root(varied, version)
    _remove_unfinished(root.parent)
    if not root.exists():
        root.parent.mkdir(parents=True, exist_ok=True)
        with _drawing(root.parent) as temporary:
            try:
                build(temporary, varied=varied, version=version)
                os.replace(temporary, root)
            except OSError:
                if not root.exists():  # else another process was faster
                    raise
    return root


@contextlib.contextmanager
def _drawing(parent: Path) -> Iterator[Path]:
    """A folder to draw into, locked as long as this process lives, removed at the end."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_DRAWING, dir=parent))
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)
        if folder.exists():
            break
        os.close(handle)  # taken for a dead process's before it was locked
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _remove_unfinished(parent: Path) -> None:
    """Remove what processes that were killed had begun to draw in `parent`: nobody holds the lock on it."""
    for folder in parent.glob(f"{_DRAWING}*"):
        if not re.fullmatch(r"[a-z0-9_]{8}", folder.name.removeprefix(_DRAWING)):
            continue
        with contextlib.suppress(OSError):
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(handle)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw Pocket-8, the eight small data sets.")
    parser.add_argument("--root", type=Path, default=None)
    parser.add_argument("--varied", action="store_true", help="canvases of varied size instead of squares")
    parser.add_argument("--version", type=int, choices=VERSIONS, help="default: its backbone's")
    arguments = parser.parse_args()
    print(ensure(arguments.root, arguments.varied, arguments.version))
