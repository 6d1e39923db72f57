"""VisionZip, PruMerge and HoloV on a tower without CLS token: settings and pure functions, against loops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from methods.base import RECEIVED, RECEIVED_KEYS, ImageView
from methods.errors import UserError
from methods.holov import TOWER_ORDER, HoloV
from methods.prumerge import PruMerge, PruMergePlus
from methods.visionzip import VisionZip


def image(total=60, width=12, seed=0, text_before=0):
    """A random image of 6 rows; 2 heads of 6 channels. Features are in the language model's space."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(text_before + total, width, generator=generator)
    signals = {
        RECEIVED: (2 * torch.randn(total, generator=generator)).softmax(0),
        RECEIVED_KEYS: torch.randn(total, width, generator=generator),
        TOWER_ORDER: torch.randperm(total, generator=generator),
    }
    return ImageView(hidden, (6, total // 6), 2, hidden, lambda x: x, signals, has_cls=False)


# ---- VisionZip


def test_visionzip_split():
    """The released shares, truncated; and for a budget the released 5 % contextual tokens."""
    released = VisionZip(dominant=0.65, contextual=0.05)
    assert released.acts and [released.split(n, False) for n in (140, 64, 85)] == [(91, 7), (41, 3), (55, 4)]
    assert VisionZip(budget=1 / 9).split(144, has_cls=False) == (9, 7)
    assert VisionZip(budget=64, contextual=10).split(576, has_cls=False) == (54, 10)
    assert [VisionZip(budget=b).split(12, has_cls=False) for b in (1, 2, 12)] == [(1, 0), (1, 1), (11, 1)]
    with pytest.raises(UserError, match=r"visionzip: 600 contextual .* 64 dominant|beside -536"):
        VisionZip(budget=64, contextual=600).split(576, has_cls=False)
    for bad in (VisionZip(dominant=0.99), VisionZip(dominant=1.2), VisionZip(budget=9, contextual=1.5)):
        with pytest.raises(UserError, match="contextual tokens cannot stand beside"):
            bad.validate(100, 12)


@pytest.mark.parametrize("budget", [2, 9, 30, 59])
def test_visionzip_is_the_loop(budget):
    view = image()
    scores, features = view[RECEIVED].tolist(), view.features
    dominant, contextual = VisionZip(budget=budget).split(60, has_cls=False)
    chosen = sorted(sorted(range(60), key=lambda j: -scores[j])[:dominant])
    rest = [j for j in range(60) if j not in chosen]
    step = max(1, len(rest) // contextual)
    targets = rest[::step][:contextual]
    keys = view[RECEIVED_KEYS].view(60, 2, 6).mean(1)
    joined = {t: [] for t in targets}
    for j in rest:
        if j not in targets:
            joined[max(targets, key=lambda t: float(F.cosine_similarity(keys[j], keys[t], 0)))].append(j)
    answer = VisionZip(budget=budget).select(view)
    assert answer.kept.tolist() == sorted([*chosen, *targets]) and len(answer.kept) == budget
    for j, token in zip(answer.kept.tolist(), answer.tokens):
        merged = features[joined[j]].mean(0) if joined.get(j) else 0
        torch.testing.assert_close(token, features[j] + merged)


# ---- PruMerge


@pytest.mark.parametrize("cls", [PruMerge, PruMergePlus])
@pytest.mark.parametrize("budget", [1, 7, 30, 59])
def test_prumerge_is_the_loop(cls, budget):
    view = image()
    scores, keys, features = view[RECEIVED], view[RECEIVED_KEYS], view.features
    chosen = cls(budget=budget).choose(scores).tolist()
    rest = [j for j in range(60) if j not in chosen]
    values = {}
    for i in chosen:
        others = [j for j in range(60) if j != i]
        near = sorted(others, key=lambda j: -float(F.cosine_similarity(keys[i], keys[j], 0)))[:32]
        values[i] = features[i] + sum(float(scores[j]) * features[j] for j in near)
    heaviest = max(rest, key=lambda j: float(scores[j]))
    extra = sum(float(scores[j]) * features[j] for j in rest)
    answer = cls(budget=budget).select(view)
    order = sorted([*chosen, heaviest])
    assert answer.places.tolist() == order and len(order) == budget
    assert answer.kept.tolist() == [-1 if j == heaviest else j for j in order]
    for j, token in zip(order, answer.tokens):
        torch.testing.assert_close(token, extra if j == heaviest else values[j], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cls", [PruMerge, PruMergePlus])
@pytest.mark.parametrize("budget", [60, 0.999, 1000])
def test_prumerge_merges_nothing_where_all_stay(cls, budget):
    answer = cls(budget=budget).select(image())
    assert answer.kept.tolist() == list(range(60)) and answer.tokens is None


def test_prumerge_adaptive_keeps_raster_order():
    for cls in (PruMerge, PruMergePlus):
        answer = cls(schedule="adaptive").select(image())
        assert answer.places.tolist() == sorted(answer.places.tolist()) and 1 < len(answer.kept) < 60
        assert (answer.kept == -1).sum() == 1


# ---- HoloV


def test_holov_follows_attention_received():
    view = image()
    answer = HoloV(budget=20, crops=6).select(view)
    scores = view[RECEIVED].view(6, 10)
    for band in range(6):
        own = [j for j in answer.kept.tolist() if j // 10 == band]
        assert own == (10 * band + scores[band].topk(len(own)).indices).tolist() or len(own) == 10
    real = answer.kept >= 0
    assert torch.equal(answer.tokens[real], view.features[answer.kept[real]])
    assert answer.places[~real].tolist() == [59] * int((~real).sum())


def test_holov_released_form():
    """One token early, scores in the tower's order, the image's last token on top."""
    pruner, view = HoloV(budget=20, form="released"), image(text_before=1)
    assert [pruner.text_before(has_cls) for has_cls in (False, True)] == [1, 0]
    assert HoloV(budget=20).text_before(False) == 0
    answer = pruner.select(view)
    assert (
        len(answer.kept) == 21 and answer.kept[-1] == 60 and torch.equal(answer.tokens[-1], view.features[60])
    )
    sliced = image(text_before=1)
    mixed = {**sliced.signals, RECEIVED: sliced[RECEIVED][sliced[TOWER_ORDER]]}
    as_repaired = ImageView(
        sliced.features[:-1], (6, 10), 2, sliced.pixels, lambda x: x, mixed, has_cls=False
    )
    expected = HoloV(budget=20).select(as_repaired)
    assert torch.equal(answer.kept[:-1], expected.kept) and torch.equal(answer.tokens[:-1], expected.tokens)
    assert not torch.equal(answer.kept[:-1], HoloV(budget=20).select(image()).kept)
