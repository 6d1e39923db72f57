"""Settings and pure functions; equality with the released code is tests/methods/test_parity.py."""

from __future__ import annotations

import pytest
import torch

from methods.base import ImageView, Signal
from methods.errors import UserError
from methods.fastv import FastV, most_attended
from methods.visionzip import LAYER, VisionZip, dominant_patches, merge


def test_fastv_schedules():
    assert [FastV(budget=b).tokens_after_cut(576, 32) for b in (192, 128, 64)] == [192, 128, 64]
    average = [FastV(budget=b, schedule="average") for b in (192, 128, 64)]
    assert [p.tokens_after_cut(576, 32) for p in average] == [166, 98, 30]
    assert [FastV(budget=b, k=3, schedule="average").tokens_after_cut(576, 32) for b in (192, 128, 64)] == [
        152,
        82,
        11,
    ]
    assert FastV(kept=7).tokens_after_cut(576, 32) == 7 and FastV(kept=7).acts and not FastV().acts
    assert [s.layer for s in FastV(budget=64).stages(576, 12)] == [2]


def test_fastv_refuses_what_cannot_be():
    for pruner in (
        FastV(budget=64, k=0),
        FastV(budget=64, k=12),
        FastV(budget=64, schedule="average"),
        FastV(kept=577),
    ):
        with pytest.raises(UserError, match="fastv"):
            pruner.validate(576, 12)  # a mean of 64 over 12 layers cannot be had with two of them full
    FastV(budget=192, schedule="average").validate(576, 12)


def test_fastv_takes_the_head_mean():
    attention = torch.tensor([[[0.3, 0.1, 0.2, 0.0]], [[0.0, 0.25, 0.2, 0.05]]])
    assert most_attended(attention, 2).tolist() == [1, 2]


def test_visionzip_split():
    assert [VisionZip(budget=b).split(576) for b in (192, 128, 64)] == [(162, 30), (108, 20), (54, 10)]
    assert [VisionZip(budget=b).split(576) for b in (1, 2, 3, 4)] == [(1, 0), (2, 0), (3, 0), (3, 1)]
    assert VisionZip(budget=64, contextual=20).split(576) == (44, 20)
    with pytest.raises(UserError, match="contextual"):
        VisionZip(budget=64, contextual=64).validate(576, 32)


@pytest.mark.parametrize("budget", [1, 3, 4, 64, 575, 576])
def test_visionzip_gives_exactly_b_tokens(budget):
    generator = torch.Generator().manual_seed(0)
    hidden, keys = torch.randn(2, 577, 8, generator=generator)
    signals = {Signal("cls_query", LAYER): keys[:1], Signal("keys", LAYER): keys}
    answer = VisionZip(budget=budget).select(ImageView(hidden, (24, 24), 2, hidden, lambda x: x, signals))
    assert len(answer.kept) == len(answer.tokens) == budget and answer.kept[0] == -1
    assert len(set(answer.kept.tolist())) == budget
    dominant, _ = VisionZip(budget=budget).split(576)
    assert torch.equal(answer.tokens[:dominant], hidden[answer.kept[:dominant] + 1])


def test_visionzip_merges_target_plus_mean():
    features = torch.tensor([[1.0], [10.0], [30.0], [2.0], [50.0]])
    keys = torch.tensor([[1.0, 0.0], [2.0, 0.1], [5.0, -0.1], [0.0, 1.0], [1.0, 0.2]])
    targets, merged, joined = merge(features, keys, 2)  # step floor(5 / 2) = 2: places 0 and 2
    assert targets.tolist() == [0, 2]
    # 10 and 50 are nearest to key 0, and so is 2 (cosine 0 against -0.02)
    assert merged[:, 0].tolist() == pytest.approx([1 + (10 + 2 + 50) / 3, 30.0])
    assert joined.tolist() == [-1, 0, -1, 0, 0]


def test_visionzip_dominant_patches_leave_cls_out():
    attention = torch.tensor([[0.9, 0.1, 0.3, 0.2], [0.9, 0.3, 0.05, 0.2]])
    chosen, rest = dominant_patches(attention, 2)
    assert (chosen.tolist(), rest.tolist()) == ([0, 2], [1])
