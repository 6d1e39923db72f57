"""Schedules and pure functions; equality with the released code is tests/methods/test_parity.py."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from harness.parity import compare
from methods.base import PromptView, StageView
from methods.errors import UserError
from methods.pdrop import PDrop
from methods.schedules import mean_over_layers, scaled
from methods.sparsevlm import SparseVLM, cluster_means, raters, recycling, sparsify, tokens_left

GOLDEN = Path(__file__).parent.parent / "golden"


def tokens(pruner, layers):
    """Visual tokens of 576 at the input and after each cut."""
    counts = [n for _, n in pruner.plan(576, layers)]
    return [576, *(tokens_left(counts, 576) if isinstance(pruner, SparseVLM) else counts)]


def mean(pruner, layers):
    return mean_over_layers([layer for layer, _ in pruner.plan(576, layers)], tokens(pruner, layers), layers)


def test_layer_lists_scale():
    assert [scaled((2, 8, 16), n) for n in (32, 12, 40, 28)] == [
        [2, 8, 16],
        [1, 3, 6],
        [2, 10, 20],
        [2, 7, 14],
    ]
    assert [scaled((3, 7, 16), n) for n in (32, 28, 12, 4)] == [[3, 7, 16], [3, 6, 14], [1, 3, 6], [1, 2, 3]]
    assert scaled((30, 31), 8) == [6, 7]
    with pytest.raises(UserError, match="more than 3 layers"):
        scaled((2, 8, 16), 3)


def test_pdrop_schedules_of_32_layers():
    plans = [PDrop(budget=b).plan(576, 32) for b in (192, 128, 64)]
    assert [[layer for layer, _ in plan] for plan in plans] == [[2, 8, 16]] * 3
    assert [[n for _, n in plan] for plan in plans] == [[322, 180, 101], [241, 101, 42], [109, 20, 3]]
    assert [mean(PDrop(budget=b), 32) for b in (192, 128, 64)] == pytest.approx(
        [191.9, 127.4, 62.9], abs=0.05
    )
    for budget in (1, 64, 576):
        assert PDrop(budget=budget, schedule="stock").plan(576, 32) == [(8, 288), (16, 144), (24, 72)]
    assert PDrop(schedule="stock").acts and not PDrop().acts
    assert mean(PDrop(schedule="stock"), 32) == 270
    assert PDrop(budget=64, schedule="kept").plan(576, 32) == [(8, 277), (16, 133), (24, 64)]


@pytest.mark.parametrize("layers, lowest", [(12, 49), (32, 37), (40, 30)])
def test_pdrop_hits_every_mean_there_is(layers, lowest):
    for budget in range(lowest, 577):
        pruner = PDrop(budget=budget)
        assert mean(pruner, layers) == pytest.approx(budget, rel=0.02)
        counts = tokens(pruner, layers)
        assert counts == sorted(counts, reverse=True) and counts[-1] >= 1
    for budget in (1, lowest - 2):
        with pytest.raises(UserError, match=r"no ratio gives a mean of .* schedule=kept"):
            PDrop(budget=budget).validate(576, layers)
        PDrop(budget=budget, schedule="kept").validate(576, layers)


@pytest.mark.parametrize("budget", [1, 2, 64, 575, 576])
def test_pdrop_kept_ends_at_the_budget(budget):
    for visual in (576, 144, 577):
        if budget <= visual:
            assert PDrop(budget=budget, schedule="kept").plan(visual, 12)[-1] == (9, budget)


def test_sparsevlm_table():
    got = [tokens(SparseVLM(budget=b), 32)[1:] for b in (192, 128, 96, 64)]
    assert got == [[309, 204, 113], [312, 117, 39], [249, 55, 27], [82, 32, 18]]
    means = [mean(SparseVLM(budget=b), 32) for b in (192, 128, 96, 64)]
    assert means == pytest.approx([206.50, 145.41, 114.09, 82.25], abs=0.005)
    assert [layer for layer, _ in SparseVLM(budget=64).plan(576, 32)] == [3, 7, 16]
    assert [recycling(n) for n in (0, 1, 15, 276, 510)] == [(0, 0), (1, 1), (5, 1), (83, 9), (154, 16)]
    assert SparseVLM(budget=1 / 9).plan(576, 32) == SparseVLM(budget=64).plan(576, 32)
    # a quarter of the tokens: a quarter of the counts
    assert [n for _, n in SparseVLM(budget=16).plan(144, 32)] == [16, 8, 4]


@pytest.mark.parametrize("layers", [12, 32])
def test_sparsevlm_takes_every_budget(layers):
    for budget in range(1, 577):
        counts = [n for _, n in SparseVLM(budget=budget).plan(576, layers)]
        assert counts == sorted(counts, reverse=True) and counts[-1] >= 1 and counts[0] <= 576
    assert tokens(SparseVLM(budget=576), layers) == [576] * 4
    for budget in (64, 128, 192, 400, 576):
        assert mean(SparseVLM(budget=budget, schedule="average"), layers) == pytest.approx(budget, rel=0.02)
    with pytest.raises(UserError, match=r"mean of 40 visual tokens .* schedule=table"):
        SparseVLM(budget=40, schedule="average").validate(576, layers)


@pytest.mark.parametrize("method", [PDrop, SparseVLM])
@pytest.mark.parametrize("budget", [0, 577, 1.5])
def test_impossible_budgets(method, budget):
    with pytest.raises(UserError, match=method.name):
        method(budget=budget).validate(576, 12)


@pytest.mark.parametrize("schedule", ["average", "table"])
def test_measured_tokens_are_the_planned_ones(schedule):
    """A run says what the schedule says, layer by layer, on a model of 12 layers too."""
    model, samples = compare._load(GOLDEN)
    language = model.model.language_model
    language.layers = language.layers[:12]
    language.config.num_hidden_layers = 12
    batch = compare.left_padded([samples[0], samples[1]], model.config.image_token_id)
    pruner = PDrop(budget=64) if schedule == "average" else SparseVLM(budget=64)
    with torch.inference_mode(), pruner(model) as trace:
        model(**batch)
    planned = tokens(pruner, 12)
    expected = [planned[0]] + [planned[1]] * 2 + [planned[2]] * 3 + [planned[3]] * 6
    assert trace.visual_tokens.tolist() == [expected, expected]
    if schedule == "average":
        assert trace.visual_tokens.float().mean().item() == pytest.approx(64, rel=0.02)


def test_raters_are_the_words_above_average():
    generator = torch.Generator().manual_seed(0)
    visual, text = torch.randn(7, 4, generator=generator), torch.randn(5, 4, generator=generator)
    relevance = [0.0] * 5
    for v in visual:
        weights = [math.exp(v.dot(t).item()) for t in text]
        relevance = [r + w / sum(weights) / 7 for r, w in zip(relevance, weights)]
    expected = [t - 5 for t, r in enumerate(relevance) if r > sum(relevance) / 5]
    assert 0 < len(expected) < 5
    assert raters(PromptView(visual, text)).tolist() == expected
    assert raters(PromptView(visual, text[:1])).tolist() == [-1]  # one word is never above its own average
    assert raters(PromptView(visual, text[:0])).tolist() == [-1]


def density_peaks(points, n):
    """The recycling step by hand, in float64 and loops: clusters as lists of points, by falling peak."""
    m = len(points)
    distance = [[math.dist(a, b) / math.sqrt(len(a)) for b in points] for a in points]
    density = [math.exp(-sum(d * d for d in sorted(row)[:n]) / n) for row in distance]
    farthest = max(map(max, distance))
    peak = [
        density[a] * min([distance[a][b] for b in range(m) if density[b] > density[a]], default=farthest)
        for a in range(m)
    ]
    centres = sorted(range(m), key=lambda a: -peak[a])[:n]
    clusters = [[] for _ in centres]
    for a in range(m):
        nearest = min(range(n), key=lambda c: distance[a][centres[c]])
        clusters[centres.index(a) if a in centres else nearest].append(a)
    return clusters


@pytest.mark.parametrize("m, n", [(1, 1), (12, 1), (25, 3), (61, 7)])
def test_recycled_tokens_are_cluster_means(m, n):
    points = torch.randn(m, 6, generator=torch.Generator().manual_seed(m))
    clusters = density_peaks(points.double().tolist(), n)
    assert sorted(a for c in clusters for a in c) == list(range(m))
    expected = torch.stack([points[c].mean(0) for c in clusters])
    means, centres, _ = cluster_means(points, n)
    torch.testing.assert_close(means, expected, atol=1e-5, rtol=1e-5)
    assert all(int(centre) in cluster for centre, cluster in zip(centres, clusters))


def test_recycled_tokens_are_the_released_ones():
    recorded = load_file(GOLDEN / "sparsevlm/vectors.safetensors")
    pools = [key for key in recorded if key.startswith("nonoise.cluster_in.")]
    assert len(pools) == 12
    for key in pools:
        merged = recorded[key.replace("cluster_in", "merged")]
        torch.testing.assert_close(cluster_means(recorded[key], len(merged))[0], merged, atol=1e-5, rtol=0)


def test_sparsify_keeps_order_and_recycles_the_best_of_the_rest():
    generator = torch.Generator().manual_seed(1)
    attention, hidden = torch.rand(2, 3, 30, generator=generator), torch.randn(35, 4, generator=generator)
    columns = torch.arange(2, 32)
    view = StageView(attention, torch.arange(30), 30, 1, hidden, columns, count=10)
    answer = sparsify(2, view)
    order = attention.mean(0).mean(0).argsort(descending=True)
    kept = sorted(order[:10].tolist())
    assert answer.kept.tolist() == [*kept, -2000]  # 20 dropped: 7 recycled into one
    assert torch.equal(answer.tokens[:10], hidden[columns][kept])
    torch.testing.assert_close(answer.tokens[10], hidden[columns][order[10:17]].mean(0))
    assert answer.places[:10].tolist() == kept and int(answer.places[10]) in order[10:17].tolist()
    assert sparsify(1, replace(view, count=30)).kept.tolist() == list(range(30))
