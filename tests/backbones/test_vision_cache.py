"""One run of the vision tower a distinct image, with the same results."""

from __future__ import annotations

import pytest
import torch
from engine_helpers import generate

from backbones.engine.vision_cache import VisionCache, vision_cache
from methods.downsample import Downsample
from methods.fastv import FastV
from methods.random import Random
from methods.vanilla import Vanilla
from methods.visionzip import VisionZip

PRUNERS = [
    Vanilla(),
    FastV(budget=9),
    Random(budget=9),
    VisionZip(budget=20),
    Downsample(budget=16),
    VisionZip(budget=9),
]


def test_same_results_and_shared_runs(model, batch):
    batch = {k: v.clone() for k, v in batch.items()}
    batch["pixel_values"][2] = batch["pixel_values"][0]
    outside = [generate(model, batch, p) for p in PRUNERS]
    sizes = []
    handle = model.model.vision_tower.register_forward_pre_hook(
        lambda m, a, k: sizes.append(len(a[0] if a else k["pixel_values"])), with_kwargs=True
    )
    with vision_cache(model, 1 << 30) as cache:
        for pruner, theirs in zip(PRUNERS, outside):
            ours = generate(model, batch, pruner)
            assert torch.equal(ours[0], theirs[0])
            torch.testing.assert_close(ours[1], theirs[1], atol=1e-5, rtol=1e-4)
            assert torch.equal(ours[2].visual_tokens, theirs[2].visual_tokens)
    handle.remove()
    # two distinct images: once for the first three, once more when keys are wanted, once for the small raster
    assert sizes == [2, 2, 2] and cache.runs == 6
    with vision_cache(model, 1 << 30) as cache:
        for pruner in (VisionZip(budget=20), Vanilla(), FastV(budget=9)):
            generate(model, batch, pruner)
        assert cache.runs == 2


def test_what_was_wanted_once_is_collected_for_new_images(model, batch):
    with vision_cache(model, 1 << 30) as cache:
        for pixels in (batch["pixel_values"], batch["pixel_values"] + 1):
            for pruner in (Vanilla(), VisionZip(budget=9)):
                generate(model, {**batch, "pixel_values": pixels}, pruner)
    assert cache.runs == 6 + 3


def test_changed_in_place_is_another_image(model, batch):
    pixels = batch["pixel_values"].clone()
    with vision_cache(model, 1 << 30) as cache:
        generate(model, {**batch, "pixel_values": pixels}, Vanilla())
        pixels[1] += 1
        generate(model, {**batch, "pixel_values": pixels}, Vanilla())
    assert cache.runs == 4


def test_oldest_images_go_first():
    cache = VisionCache(max_bytes=3 * 400)
    for i in range(5):
        cache.add(i, {"a": torch.zeros(100)})
        cache.get(0)
    assert [bool(cache.get(i)) for i in range(5)] == [True, False, False, True, True]
    assert cache.bytes == 1200
    cache.add(0, {"b": torch.zeros(100)})
    assert cache.bytes == 1200 and set(cache.get(0)) == {"a", "b"}


def test_one_at_a_time(model):
    with vision_cache(model, 1), pytest.raises(RuntimeError, match="already open"), vision_cache(model, 1):
        pass
    with vision_cache(model, 1):
        pass
