"""random, uniform, downsample."""

from __future__ import annotations

import pytest
import torch

from methods.base import ImageView
from methods.downsample import Downsample, largest_raster
from methods.random import Random, random_subset
from methods.uniform import Uniform, even_grid


def view(pixels, n=576):
    return ImageView(torch.zeros(n + 1, 4), (24, 24), 2, pixels, lambda x: x, {})


def test_random_depends_on_image_and_seed_alone():
    a, b = torch.rand(2, 3, 336, 336, generator=torch.Generator().manual_seed(0))
    chosen = Random(budget=64).select(view(a)).kept
    assert chosen.tolist() == sorted(set(chosen.tolist())) and len(chosen) == 64
    torch.manual_seed(99)
    assert torch.equal(Random(budget=64).select(view(a.clone())).kept, chosen)
    assert not torch.equal(Random(budget=64).select(view(b)).kept, chosen)
    assert not torch.equal(Random(budget=64, seed=1).select(view(a)).kept, chosen)
    assert set(chosen.tolist()) < set(Random(budget=128).select(view(a)).kept.tolist())


def test_random_is_uniform():
    counts = torch.zeros(36)
    for seed in range(2000):
        counts[random_subset(36, 9, seed)] += 1
    assert (counts / 2000 - 0.25).abs().max() < 0.05


@pytest.mark.parametrize("n", [1, 2, 7, 63, 64, 65, 128, 192, 300, 553, 575, 576])
def test_uniform_gives_exactly_n(n):
    for grid in ((24, 24), (16, 36)):
        kept = even_grid(grid, n).tolist()
        assert len(kept) == n and kept == sorted(set(kept)) and kept[0] >= 0 and kept[-1] < 576
    assert (
        Uniform(budget=n).select(view(torch.zeros(3, 8, 8))).kept.tolist() == even_grid((24, 24), n).tolist()
    )


def test_uniform_is_even():
    for n in range(1, 577):
        kept = even_grid((24, 24), n)
        for part in (kept // 24 < 12, kept % 24 < 12):
            assert abs(int(part.sum()) * 2 - n) <= 26, (
                "half of the tokens in each half of the image, up to a line"
            )
    assert even_grid((24, 24), 64).tolist() == [24 * r + c for r in range(1, 24, 3) for c in range(1, 24, 3)]


def test_downsample_rasters():
    assert [largest_raster((24, 24), n) for n in (576, 192, 128, 64, 1)] == [
        (24, 24),
        (12, 16),
        (8, 16),
        (8, 8),
        (1, 1),
    ]
    assert largest_raster((24, 24), 3) == (1, 2)
    for n in range(24, 577):
        rows, columns = largest_raster((24, 24), n)
        assert 0.9 * n <= rows * columns <= n and max(rows, columns) <= 2 * min(rows, columns)
    rows, columns = largest_raster((12, 48), 64)
    assert (rows, columns) == (4, 16)


def test_downsample_shrinks_what_the_tower_sees(backbone):
    model = backbone.model
    ids = torch.tensor([[7] + [model.config.image_token_id] * 64 + [8, 9]])
    inputs = {"input_ids": ids, "pixel_values": torch.rand(1, 3, 112, 112)}
    seen = []
    handle = model.model.vision_tower.embeddings.register_forward_pre_hook(
        lambda m, a: seen.append(a[0].shape)
    )
    with torch.no_grad(), Downsample(budget=24)(model) as trace:
        small = model(**inputs).logits
    with torch.no_grad(), Downsample(budget=64)(model):
        full = model(**inputs).logits
    handle.remove()
    assert seen == [(1, 3, 4 * 14, 6 * 14), (1, 3, 112, 112)]
    assert trace.visual_tokens.tolist() == [[24] * 6] and small.shape[1] == 24 + 3
    torch.testing.assert_close(full, model(**inputs).logits)
