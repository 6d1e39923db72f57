"""PruMerge, PruMerge+ and HoloV: against loops that do what the released code does, token by token; counts at
every budget; and the released recordings through the public path."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from harness.parity import compare
from methods import holov, prumerge
from methods.base import ImageView, Signal
from methods.errors import UserError
from methods.holov import HoloV
from methods.prumerge import PruMerge, PruMergePlus

GOLDEN = Path(__file__).parent.parent / "golden"


def image(total=64, width=16, sharpness=1.0, seed=0):
    """A random image seen by a random tower of 2 heads; the projector doubles."""
    generator = torch.Generator().manual_seed(seed)
    hidden, query, keys = torch.randn(3, 1 + total, width, generator=generator)
    keys = keys * sharpness
    signals = {}
    for layer in (prumerge.LAYER, holov.LAYER):
        signals |= {Signal("cls_query", layer): query[:1] + layer, Signal("keys", layer): keys}
    return ImageView(hidden, (1, total), 2, hidden, lambda x: 2 * x, signals)


# ---- PruMerge


def merged_by_loop(features, keys, scores, chosen):
    """Sections 4 and 7 to 9 of the released code: candidates by slot, 32 nearest, plain sums."""
    unchosen = [j for j in range(len(scores)) if j not in chosen]
    rest = unchosen[len(chosen) - len(set(chosen)) :]
    rows = []
    for slot, i in enumerate(chosen):
        candidates = chosen[:slot] + chosen[slot + 1 :] + rest
        near = sorted(candidates, key=lambda j: -float(F.cosine_similarity(keys[i], keys[j], 0)))[:32]
        rows.append(features[i] + sum(float(scores[j]) * features[j] for j in near))
    return torch.stack([*rows, sum(float(scores[j]) * features[j] for j in rest)])


def scores_by_map(view):
    """The whole softmax map of one head, row 0, as released."""
    keys = view[Signal("keys", -1)]
    queries = torch.cat([view[Signal("cls_query", -1)], torch.ones_like(keys[1:])])
    return torch.softmax(queries @ keys.T * keys.shape[1] ** -0.5, -1)[0, 1:]


@pytest.mark.parametrize("budget", [2, 20, 40, 63])
def test_prumerge_is_the_loop(budget):
    view = image()
    scores, keys = scores_by_map(view), view[Signal("keys", -1)][1:]
    torch.testing.assert_close(
        prumerge.cls_scores(view[Signal("cls_query", -1)], view[Signal("keys", -1)]), scores
    )
    chosen = scores.topk(budget - 1).indices.tolist()
    answer = PruMerge(budget=budget).select(view)
    assert answer.kept.tolist() == [*chosen, -1]
    torch.testing.assert_close(answer.tokens, merged_by_loop(view.features, keys, scores, chosen))


def test_prumerge_plus_released_is_the_loop():
    view = image()
    scores, keys = scores_by_map(view), view[Signal("keys", -1)][1:]
    chosen = scores.topk(8).indices.tolist() + list(range(4, 63, 8))  # 16 / 2 N is 1 in 8, offset 4
    assert len(set(chosen)) < 16  # or the test would not see the repeats
    answer = PruMergePlus(budget=16, schedule="released").select(view)
    assert answer.kept.tolist() == [*chosen, -1]
    torch.testing.assert_close(answer.tokens, merged_by_loop(view.features, keys, scores, chosen))


def test_prumerge_outliers_are_numpys():
    for seed in range(5):
        scores = torch.rand(576, generator=torch.Generator().manual_seed(seed)) ** 6
        q1, q3 = np.percentile(scores.numpy(), [25, 75])
        assert prumerge.outliers(scores) == int((scores.numpy() > q3 + 1.5 * (q3 - q1)).sum()) > 0
    assert prumerge.outliers(torch.full((576,), 0.1)) == 0


@pytest.mark.parametrize("sharpness", [0.0, 0.5, 3.0])
def test_prumerge_adaptive(sharpness):
    view = image(sharpness=sharpness)
    scores = prumerge.cls_scores(view[Signal("cls_query", -1)], view[Signal("keys", -1)])
    n = prumerge.outliers(scores)
    assert (n == 0) == (sharpness == 0)
    best = prumerge.ranked(scores)[:n].tolist()
    assert PruMerge(schedule="adaptive").select(view).kept.tolist() == [*best, -1]
    n = max(n, 1)  # released: divides by zero
    best = prumerge.ranked(scores)[:n].tolist()
    spread = [j for j in range(0, 63, int(int(1 / (n / 64)) / 3)) if j not in best]
    assert PruMergePlus(schedule="adaptive").select(view).kept.tolist() == [*best, *spread, -1]


def test_prumerge_plus_adaptive_may_keep_everything(monkeypatch):
    """So many outliers that the step is 1, the last patch (never a spread one) among them: all patches, and
    no extra token made of nothing."""
    scores = torch.linspace(0, 0.02, 64)
    monkeypatch.setattr(prumerge, "outliers", lambda scores: 24)
    monkeypatch.setattr(prumerge, "cls_scores", lambda query, keys: scores)
    answer = PruMergePlus(schedule="adaptive").select(image())
    assert len(answer.tokens) == 64 and sorted(answer.kept.tolist()) == list(range(64))


def test_prumerge_gives_exactly_b_tokens():
    for budget in range(1, 65):
        for cls in (PruMerge, PruMergePlus):
            pruner = cls(budget=budget)
            pruner.validate(64, 32)
            answer = pruner.select(image())
            kept = answer.kept.tolist()
            assert len(set(kept)) == len(kept) == len(answer.tokens) == budget and kept[-1] == -1
    assert answer.tokens.isfinite().all()


def test_prumerge_plus_exact_spreads_half():
    scores = torch.rand(576, generator=torch.Generator().manual_seed(0))
    for budget, step in ((192, 6), (128, 9), (64, 18)):
        spread = set(range(step // 2, 575, step))  # the released code's for this budget
        best = []
        for j in scores.sort(descending=True).indices.tolist():
            if len(spread | set(best)) == budget - 1:
                break
            best.append(j)
        assert len(best) > budget // 2  # some of the best are spread ones as well
        kept = PruMergePlus(budget=budget).choose(scores).tolist()
        assert kept == best + sorted(spread - set(best))


def test_prumerge_plus_released_budgets():
    runs = [*range(2, 40, 2), 42, 44, 46, 48, 50, 52, 54, 60, 64, 72, 76, 82, 88, 96, 104, 114, 128, 144, 164]
    runs += [192, 230, 288, 384, 574]  # measured with the released code
    works = []
    for budget in range(1, 577):
        try:
            PruMergePlus(budget=budget, schedule="released").validate(576, 32)
            works.append(budget)
        except UserError as error:
            assert re.search(rf"cannot keep {budget} of 576", str(error)) and "\n" not in str(error)
    assert works == runs


# ---- HoloV


def kept_by_loop(attention, tokens, budget, crops, alpha=0.09, eps=1e-6):
    """The released function for one image, crop by crop (single-patch crops excepted)."""
    size, longer = divmod(len(attention), crops)
    runs, start = [], 0
    for p in range(crops):
        runs.append(list(range(start, start + size + (p < longer))))
        start = runs[-1][-1] + 1
    z = []
    for run in runs:
        f = tokens[run] / (tokens[run].norm(dim=-1, keepdim=True) + eps)
        s, n = (f @ f.T) * (1 - torch.eye(len(run))), len(run)
        variance = ((s - s.sum(1, keepdim=True) / (n - 1)) ** 2).sum(1) / (n - 1)
        salience = 1000 * attention[run]
        z.append((salience + alpha * salience.mean() / (variance.mean() + eps) * variance).mean())
    weights = torch.stack(z) / (sum(z) + eps)
    quota = (weights * budget).floor().long()
    quota[weights.topk(min(budget - int(quota.sum()), crops)).indices] += 1
    kept = []
    for run, q in zip(runs, quota.tolist()):
        own = attention[run].topk(min(q, len(run))).indices.tolist()
        kept += run if q >= len(run) else [run[j] for j in own]
    return torch.stack(z), quota, kept


@pytest.mark.parametrize("sharpness", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("budget, crops", [(5, None), (13, None), (20, 7), (40, 5), (40, 16), (64, None)])
def test_holov_is_the_loop(budget, crops, sharpness):
    view, pruner = image(sharpness=sharpness), HoloV(budget=budget, crops=crops)
    attention = view.cls_attention(holov.LAYER)[:, 1:].mean(0)
    scores, quota, kept = kept_by_loop(attention, view.features, budget, pruner.number_of_crops(64))
    answer = pruner.select(view)
    assert answer.kept.tolist() == kept + [-1] * (budget - len(kept)) and answer.projected
    places = holov.crop(64, pruner.number_of_crops(64))
    ours = holov.crop_scores(attention, places, view.features, 0.09)
    torch.testing.assert_close(ours, scores)
    assert torch.equal(holov.quotas(ours, budget), quota) and quota.sum() == budget
    assert torch.equal(answer.tokens[: len(kept)], 2 * view.features[kept])
    assert not answer.tokens[len(kept) :].any()


def test_holov_keeps_zero_vectors():
    """Attention in one place: the crop's share exceeds it, and what is lost becomes zero vectors."""
    answer = HoloV(budget=40, crops=16).select(image(sharpness=3.0))
    assert 0 < (answer.kept == -1).sum() == (answer.tokens.abs().sum(1) == 0).sum()


def test_holov_variance_cancels_out():
    """alpha = 0, which neither compares nor projects dropped patches, keeps the same."""
    for seed in range(20):
        view = image(sharpness=2.0, seed=seed)
        with_it, without = (HoloV(budget=24, alpha=alpha).select(view) for alpha in (0.09, 0))
        assert torch.equal(with_it.kept, without.kept) and torch.equal(with_it.tokens, without.tokens)


def test_holov_crops():
    assert [HoloV(budget=b).number_of_crops(576) for b in (192, 128, 64, 58)] == [5, 8, 16, 17]
    assert [HoloV(budget=b).number_of_crops(576) for b in (1, 576)] == [576, 1]
    sizes = [(row >= 0).sum().item() for row in holov.crop(576, 5)]
    assert sizes == [116, 115, 115, 115, 115]
    assert holov.crop(7, 3).tolist() == [[0, 1, 2], [3, 4, -1], [5, 6, -1]]
    for bad in (HoloV(budget=64, crops=0), HoloV(budget=64, crops=577), HoloV(budget=64, alpha=-1.0)):
        with pytest.raises(UserError, match="holov"):
            bad.validate(576, 32)


def test_holov_gives_exactly_b_tokens():
    for budget in range(1, 65):
        pruner = HoloV(budget=budget)
        pruner.validate(64, 32)
        answer = pruner.select(image())
        patches = answer.kept[answer.kept >= 0].tolist()
        assert len(answer.kept) == len(answer.tokens) == budget and len(set(patches)) == len(patches) > 0
        assert answer.tokens.isfinite().all()
    assert patches == list(range(64))


# ---- the recordings


@pytest.fixture(scope="module")
def recorded():
    return compare._load(GOLDEN)


LABELS = [("prumerge", f"prumerge.{b}") for b in (191, 127, 63, "adaptive")]
LABELS += [("prumerge", f"prumerge_plus.{b}") for b in (192, 64, "adaptive")]
LABELS += [("holov", label) for label in ("192", "128", "64", "p16.192")]


@pytest.mark.parametrize("method, label", LABELS)
def test_recordings(recorded, method, label):
    vectors = load_file(GOLDEN / method / "vectors.safetensors")
    vectors = {k: v for k, v in vectors.items() if re.fullmatch(rf"\w+\.{re.escape(label)}\.\d", k)}
    counts = [len(vectors[f"features.{label}.{i}"]) for i in range(4)]
    assert (len(set(counts)) > 1) == (label.endswith("adaptive"))  # unequal in one batch
    rows = list(compare.check(*recorded, method, vectors))
    assert [(r.label, r.sample, r.agrees) for r in rows] == [(label, i, True) for i in range(4)]
    for row in rows:
        assert row.alone.difference is not None and row.batched.features is not None


@pytest.mark.parametrize("row", [0, -1])
def test_another_feature_is_seen(recorded, row):
    model, inputs = recorded
    vectors = load_file(GOLDEN / "prumerge/vectors.safetensors")
    vectors = {k: v for k, v in vectors.items() if k.endswith("prumerge.63.3")}
    vectors["features.prumerge.63.3"][row] += 1e-2
    (found,) = compare.check(model, inputs, "prumerge", vectors)
    assert found.alone.kept and found.alone.tokens and not found.agrees
    vectors["features.prumerge.63.3"] = vectors["features.prumerge.63.3"][:-1]
    (found,) = compare.check(model, inputs, "prumerge", vectors)
    assert not found.agrees
