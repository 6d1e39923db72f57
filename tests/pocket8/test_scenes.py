"""Scenes: deterministic, disjoint between splits, drawn where they say."""

import numpy as np
import pytest

from harness.drawings.scenes import (
    BACKGROUNDS,
    IMAGE_SIZE,
    SPLIT_BUCKETS,
    VARIED_SIDES,
    SceneV1,
    render,
    sample_scene,
    varied_canvas,
)


def test_same_arguments_same_scene_and_pixels():
    a, b = (sample_scene("eval", 3, 11) for _ in range(2))
    assert a == b
    assert np.array_equal(np.asarray(render(a)), np.asarray(render(b)))
    assert a != sample_scene("eval", 3, 12)


@pytest.mark.parametrize("split", ["train", "calibration", "eval"])
def test_splits_are_disjoint_by_construction(split):
    buckets = [set(b) for b in SPLIT_BUCKETS.values()]
    assert sum(map(len, buckets)) == len(set.union(*buckets)) == 10
    for index in range(15):
        assert sample_scene(split, 0, index).bucket in SPLIT_BUCKETS[split]


def test_things_lie_inside_and_apart():
    for index in range(20):
        scene = sample_scene("train", 1, index, fewest=10)
        canvas = np.zeros((IMAGE_SIZE, IMAGE_SIZE), int)
        for left, top, width, height in (t.box for t in scene.things):
            assert left >= 0 and top >= 0 and left + width <= IMAGE_SIZE and top + height <= IMAGE_SIZE
            canvas[top : top + height, left : left + width] += 1
        assert canvas.max() == 1


def test_complexity_varies_from_one_to_many():
    sizes = {len(sample_scene("train", 2, i).things) for i in range(80)}
    assert min(sizes) <= 2 and max(sizes) >= 12


def test_a_thing_changes_the_pixels_of_its_box_only():
    scene = sample_scene("train", 5, 1, fewest=5)
    bare = type(scene)((), scene.background, scene.tint, scene.paint_seed)
    changed = (np.asarray(render(scene)) != np.asarray(render(bare))).any(-1)
    inside = np.zeros_like(changed)
    for left, top, width, height in (t.box for t in scene.things):
        assert changed[top : top + height, left : left + width].any()
        inside[top : top + height, left : left + width] = True
    assert not (changed & ~inside).any()


def test_varied_canvases_hold_their_things():
    canvases = [varied_canvas(4, i) for i in range(60)]
    assert canvases == [varied_canvas(4, i) for i in range(60)] and len(set(canvases)) > 55
    sides = {side for canvas in canvases for side in canvas}
    assert VARIED_SIDES[0] <= min(sides) < 240 and 432 < max(sides) <= VARIED_SIDES[1]
    ratios = [width / height for width, height in canvases]
    assert min(ratios) < 0.7 and max(ratios) > 1.4
    for i, canvas in enumerate(canvases[:20]):
        scene = sample_scene("eval", 4, i, fewest=6, canvas=canvas)
        assert scene.bucket in SPLIT_BUCKETS["eval"] and render(scene).size == canvas
        taken = np.zeros(canvas[::-1], int)
        for left, top, width, height in (t.box for t in scene.things):
            assert left >= 0 and top >= 0 and left + width <= canvas[0] and top + height <= canvas[1]
            taken[top : top + height, left : left + width] += 1
        assert taken.max() == 1


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_backgrounds_fill_any_canvas(background):
    square, wide = (
        np.asarray(render(SceneV1((), background, (200, 210, 220), 5, *size)))
        for size in ((336, 336), (447, 225))
    )
    assert wide.shape == (225, 447, 3)
    if background != "flat":
        far = wide[-40:, -40:].reshape(-1, 3)
        assert len(np.unique(wide.reshape(-1, 3), axis=0)) > 5 and abs(far.mean() - square.mean()) < 60
