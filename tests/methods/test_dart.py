"""DART: against recordings of the released code, its choice from recorded states, and on odd input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from harness.parity import compare
from methods.base import StageView
from methods.dart import DART, least_alike, visits
from methods.errors import UserError

GOLDEN = Path(__file__).parent.parent / "golden"
V = load_file(GOLDEN / "dart/vectors.safetensors")
QWEN = load_file(GOLDEN / "dart/qwen_vectors.safetensors")
BEFORE = 35


def check(model, inputs, vectors, label):
    vectors = {k: v for k, v in vectors.items() if k.split(".", 1)[1].rpartition(".")[0] == label}
    return list(compare.check(model, inputs, "dart", vectors))


@pytest.fixture(scope="module")
def recorded():
    return compare._load(GOLDEN)


@pytest.mark.parametrize("label", ["192", "64", "64fit", "64avg", "64k3", "128p8"])
def test_recordings(recorded, label):
    rows = check(*recorded, V, label)
    assert len(rows) == 4 and all(row.agrees for row in rows), [str(row) for row in rows]


@pytest.fixture(scope="module")
def recorded_qwen():
    return compare._load_source(GOLDEN / "qwen_model", GOLDEN / "qwen_inputs.safetensors", qwen=True)


@pytest.mark.parametrize("label", ["r33", "r778"])
def test_recordings_on_qwen(recorded_qwen, label):
    """A budget that is a share; images of several sizes in the batch."""
    rows = check(*recorded_qwen, QWEN, label)
    assert len(rows) == 3 and all(row.agrees for row in rows), [str(row) for row in rows]


@pytest.mark.parametrize("label, pivots, share", [("64", 4, 8), ("128", 4, 16), ("128p8", 8, 8)])
def test_choice_from_recorded_states(label, pivots, share):
    """Pivots in the recorded order of visits, and what each of them picks, the least alike first."""
    norms, states = V["norms.3"], V["states.3"]
    in_image = norms[:576].topk(pivots).indices
    in_text = norms[576:].topk(pivots).indices + 576
    order = visits(in_image + BEFORE, in_text + BEFORE, torch.tensor(575 + BEFORE)) - BEFORE
    assert torch.equal(order, V[f"pivots.{label}.3"])
    unit = F.normalize(states, dim=-1)
    kept = least_alike(unit[order], unit[:576], in_image, share)
    assert torch.equal(kept[:pivots], in_image)
    assert torch.equal(kept[pivots:].view(-1, share), V[f"picked.{label}.3"])


def sample(sizes, after=9, padding=3, seed=0, before=2):
    """A sample with images of these sizes, text around and between them, in a padded row."""
    generator = torch.Generator().manual_seed(seed)
    columns, at = [], padding + before
    for n in sizes:
        columns.append(torch.arange(at, at + n))
        at += n + 1
    width = at - 1 + after
    length = width - padding
    hidden, keys = torch.randn(2, width, 16, generator=generator)
    columns = torch.cat(columns)
    return StageView(
        None, torch.arange(len(columns)), len(columns), len(sizes), hidden, columns, None, tuple(sizes),
        length, keys[padding:], lambda x: x,
    )  # fmt: skip


def by_hand(view, start, n, t, image_pivots, text_pivots):
    norms = view.keys.abs().sum(-1).tolist()
    unit = F.normalize(view.sequence, dim=-1)
    places = view.places.tolist()
    own = sorted(places[start : start + n], key=lambda p: -norms[p])[:image_pivots]
    text = sorted(range(places[-1] + 1, view.length), key=lambda p: -norms[p])[:text_pivots]
    candidates = [p for p in places[start : start + n] if p not in own]
    kept = list(own)
    for pivot in set(own + text):
        candidates.sort(key=lambda p: float(unit[pivot] @ unit[p]))
        kept += candidates[:t]
        candidates = candidates[t:]
    return sorted(places.index(p) for p in kept)


@pytest.mark.parametrize("sizes", [(40,), (40, 26)])
@pytest.mark.parametrize("after", [9, 2, 0])
def test_choice_is_the_loop(sizes, after):
    """Several images choose each for itself; a prompt may have less text behind them than pivots."""
    view = sample(sizes, after)
    (stage,) = DART(budget=24).stages(40, 6)
    expected = [by_hand(view, 0, 40, 3, 4, 4)]
    if len(sizes) > 1:
        expected.append(by_hand(view, 40, 26, 3, 4, 4))
    assert stage.select(view).kept.tolist() == [i for own in expected for i in own]


def test_padding_does_not_count():
    """The order of visits follows the position in the prompt, not the column in the batch."""
    alone, padded = sample((60,), padding=0), sample((60,), padding=13)
    padded._hidden[13:] = alone._hidden
    padded = StageView(**{**vars(padded), "keys": alone.keys})
    assert torch.equal(alone.places, padded.places)
    (stage,) = DART(budget=24).stages(60, 6)
    assert torch.equal(stage.select(alone).kept, stage.select(padded).kept)


@pytest.mark.parametrize("n", [1, 3, 5, 8])
def test_small_images(n):
    (stage,) = DART(budget=64).stages(n, 6)
    assert stage.select(sample((n,))).kept.tolist() == list(range(n))


def test_what_a_budget_means():
    kept = {
        schedule: [DART(budget=b, schedule=schedule).stages(576, 32)[0].count for b in (192, 128, 64)]
        for schedule in ("released", "fit", "average")
    }
    assert kept == {"released": [196, 132, 68], "fit": [188, 124, 60], "average": [164, 100, 28]}
    assert "4 tokens more than the budget" in DART(budget=64).note
    assert not DART(budget=64, schedule="fit").note and not DART(budget=64, schedule="fit").may_exceed_budget
    assert DART(budget=576).stages(576, 32)[0].count == 576


@pytest.mark.parametrize(
    "settings, problem",
    [
        ({"budget": 3, "schedule": "fit"}, "does not hold the 4 image pivots"),
        ({"budget": 64, "k": 32}, r"k=32 must lie between 1 and 31"),
        ({"budget": 64, "image_pivots": 0}, "image_pivots=0 must be 1 or more"),
        ({"budget": 30, "schedule": "average"}, "cannot be had"),
    ],
)
def test_settings_that_cannot_be(settings, problem):
    with pytest.raises(UserError, match=problem):
        DART(**settings).validate(576, 32)
