"""Scenes: deterministic, disjoint between splits, drawn where they say."""

import numpy as np
import pytest

from harness.pocket8.scenes import IMAGE_SIZE, SPLIT_BUCKETS, render, sample_scene


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
