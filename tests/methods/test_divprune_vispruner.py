"""DivPrune and VisPruner: against recordings of the released code, against plain loops, and on odd input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from harness.parity import compare, rounds
from methods import vispruner
from methods.base import RECEIVED, ImageView, cls_attention
from methods.divprune import DivPrune, farthest
from methods.errors import UserError
from methods.together import by_size
from methods.vispruner import VisPruner

GOLDEN = Path(__file__).parent.parent / "golden"
RECORDED = {name: load_file(GOLDEN / name / "vectors.safetensors") for name in ("divprune", "vispruner")}
STEPS = load_file(GOLDEN / "vispruner/steps.safetensors")
LABELS = [("divprune", label) for label in ("192", "64", "56", "64unsorted")]
LABELS += [("vispruner", label) for label in ("192", "64r0.75", "128r1.0")]


@pytest.fixture(scope="module")
def recorded():
    return compare._load(GOLDEN)


def image(total=60, width=12, seed=0, has_cls=True):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(total + has_cls, width, generator=generator)
    keys = torch.randn(total + has_cls, width, generator=generator)
    signals = dict(zip(cls_attention(vispruner.LAYER), (keys[:1], keys)))
    signals[RECEIVED] = torch.randn(total, generator=generator).softmax(0)
    return ImageView(hidden, (6, total // 6), 2, hidden, lambda x: x, signals, has_cls=has_cls)


@pytest.mark.parametrize("method, label", LABELS)
def test_recordings(recorded, method, label):
    vectors = {k: v for k, v in RECORDED[method].items() if k.split(".", 1)[1].rpartition(".")[0] == label}
    rows = list(compare.check(*recorded, method, vectors))
    assert rows and all(row.agrees for row in rows), [str(row) for row in rows]


def test_divprune_picks_in_the_recorded_order():
    v = RECORDED["divprune"]
    assert torch.equal(farthest(v["projected.3"][None], 192)[0], v["order.192.3"])


@pytest.mark.parametrize("budget", [1, 2, 20, 60])
def test_divprune_is_the_loop(budget):
    view = image()
    unit = torch.nn.functional.normalize(view.features.double(), dim=-1)
    distance = (1 - unit @ unit.T).tolist()
    others = [[d for j, d in enumerate(row) if j != i] for i, row in enumerate(distance)]
    chosen = [max(range(60), key=lambda i: min(others[i]))]
    while len(chosen) < budget:
        rest = [j for j in range(60) if j not in chosen]
        chosen.append(max(rest, key=lambda j: min(distance[j][s] for s in chosen)))
    assert DivPrune(budget=budget, order="picked").select(view).kept.tolist() == chosen
    answer = DivPrune(budget=budget).select(view)
    assert answer.kept.tolist() == sorted(chosen)
    assert torch.equal(answer.tokens, view.features[answer.kept])


def test_divprune_repeats_nothing():
    """Ten distinct tokens and forty to keep: the released code repeats some of the ten."""
    few = torch.randn(10, 12, generator=torch.Generator().manual_seed(0))
    kept = farthest(few.repeat(6, 1)[None], 40)[0]
    assert len(set(kept.tolist())) == 40
    assert len({k % 10 for k in kept[:10].tolist()}) == 10, "the distinct ones first"
    few[0] = 0  # without a direction: no number where the released code divides
    assert len(set(farthest(few[None], 10)[0].tolist())) == 10


def naive_rounds(order, features, diverse):
    unit = torch.nn.functional.normalize(features, dim=-1)
    pool = list(order)
    while len(pool) > diverse:
        even, odd = pool[::2], pool[1::2]
        nearest = {i: max(float(unit[i] @ unit[j]) for j in odd) if odd else 0.0 for i in even}
        cut = min(8, len(pool) - diverse, len(even))
        pool = sorted(even, key=lambda i: -nearest[i])[cut:] + odd
    return pool


@pytest.mark.parametrize("budget, ratio", [(1, 0.5), (7, 0.5), (9, 1.0), (20, 0.5), (20, 0.75), (21, 0.0)])
@pytest.mark.parametrize("has_cls", [True, False])
def test_vispruner_is_the_loop(budget, ratio, has_cls):
    """Odd numbers, where the released code fails, among them."""
    view, pruner = image(has_cls=has_cls), VisPruner(budget=budget, important_ratio=ratio)
    scores = view.cls_attention(-2)[:, 1:].mean(0) if has_cls else view[RECEIVED]
    order = sorted(range(60), key=lambda j: -float(scores[j]))
    important, diverse = pruner.split(60)
    assert important == int(budget * ratio) and important + diverse == budget
    rest = naive_rounds(order[important:], view.features, diverse) if diverse else []
    assert pruner.select(view).kept.tolist() == sorted(order[:important] + rest)


def test_vispruner_round_by_round():
    rows = list(rounds.check(STEPS))
    assert [(r.label, r.sample, r.rounds) for r in rows] == [("192", 1, 48), ("64", 2, 64)]
    assert all(row.agrees for row in rows), [str(row) for row in rows]


@pytest.mark.parametrize("far", [False, True])
def test_a_wrong_round_is_seen(far):
    """Two neighbours that changed places: a fault, unless their cosines are as near as rounding."""
    steps = {k: v.clone() for k, v in STEPS.items() if ".192." in k or k.endswith(".1")}
    pools = steps["pools.192.1"]
    start = 480 + 100 if far else None
    if far:
        pools[[start, start + 9]] = pools[[start + 9, start]]
    (row,) = rounds.check(steps)
    assert row.agrees == (not far) and row.kept


def test_important_ratio_is_a_share():
    with pytest.raises(UserError, match=r"important_ratio=1\.5 must lie between 0 and 1"):
        VisPruner(budget=64, important_ratio=1.5).validate(576, 32)


class Synchronising(TorchDispatchMode):
    """Fails at any operator whose result the host must wait for on a GPU."""

    OPERATORS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "item")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(word in str(func) for word in self.OPERATORS), f"{func} waits for the device"
        self.calls = getattr(self, "calls", 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("pruner", [DivPrune(budget=40), VisPruner(budget=40)])
def test_together_as_alone_and_without_waiting(pruner):
    views = [image(seed=s) for s in range(3)] + [image(total=66, seed=3)]
    alone = [pruner.select(view) for view in views]
    with Synchronising() as mode:
        together = pruner.select_all([views[3], *views[:3]])
    assert all(torch.equal(a.kept, b.kept) for a, b in zip([alone[3], *alone[:3]], together))
    with Synchronising() as single:
        pruner.select(views[0])
    assert mode.calls < 3 * single.calls, "three images of a size share the steps of one"


def test_answers_stay_with_their_images():
    views = [image(total=n) for n in (60, 66, 60, 72)]
    assert by_size(views, lambda own: [id(view) for view in own]) == [id(view) for view in views]
