"""What a method says of its merging (`Selection.merged`) is what stands in its tokens, and is followed
through all cuts to the explorer and to evidence recall."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image

import backbones
from backbones.engine.trace import holders
from harness.store.journal import Answer
from harness.tasks.answering import Question, answer
from harness.tasks.evidence import recall
from methods import registry
from methods.base import ImageView, Pruner, Selection, Stage, StageView
from methods.sparsevlm import sparsify
from methods.views import Hint

N = 64


def view(pruner, has_cls: bool) -> ImageView:
    """A random image with whatever signals the method reads."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(N + has_cls, 12, generator=generator)
    signals = {}
    for signal in pruner.reads(has_cls):
        if signal.kind == "received":
            signals[signal] = (2 * torch.randn(N, generator=generator)).softmax(0)
        else:
            rows = 1 if signal.kind == "cls_query" else N + has_cls
            signals[signal] = torch.randn(rows, 12, generator=generator)
    return ImageView(hidden, (8, 8), 2, hidden, lambda x: x, signals, has_cls=has_cls)


@pytest.mark.parametrize("has_cls", [True, False])
@pytest.mark.parametrize("spec", ["visionzip", "prumerge", "prumerge_plus"])
@pytest.mark.parametrize("budget", [2, 16, 60])
def test_a_token_changes_the_one_that_it_is_said_to_have_gone_into(spec, budget, has_cls):
    pruner = registry.build(spec, budget)
    seen = view(pruner, has_cls)
    before = pruner.select(seen)
    kept = set(before.kept.tolist())
    for token, place in enumerate(before.merged.tolist()):
        hidden = seen.hidden.clone()
        hidden[token + has_cls] += 100
        after = pruner.select(replace(seen, hidden=hidden))
        changed = (after.tokens - before.tokens).abs().amax(1) > 1e-4
        assert (place >= 0) == (token not in kept and bool(changed.any()))
        assert place < 0 or changed[place]


def test_sparsevlms_clusters_are_the_means_of_their_members():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, 8, generator=generator)
    attention = torch.rand(2, 3, N, generator=generator)
    stage = StageView(attention, torch.arange(N), N, 1, hidden, torch.arange(N), count=16, length=N)
    answer = sparsify(1, stage)
    made = [place for place, k in enumerate(answer.kept.tolist()) if k < 0]
    assert made
    for place in made:
        members = hidden[answer.merged == place]
        torch.testing.assert_close(answer.tokens[place], members.mean(0), atol=1e-5, rtol=1e-4)
    assert (answer.merged >= 0).sum() == int(0.3 * (N - 16)) + 1, "as many as are recycled"


class Pairs(Pruner):
    """Halves the tokens before the language model, each pair in one; inside, drops the latter half but for
    the last token, which goes into the first."""

    name = "pairs"

    def select(self, image):
        x = image.features
        merged = torch.where(torch.arange(len(x)) % 2 == 1, torch.arange(len(x)) // 2, -1)
        return Selection(torch.arange(0, len(x), 2), (x[::2] + x[1::2]) / 2, merged=merged)

    def stages(self, visual_tokens, layers):
        return [Stage(1, self._half, attention=None)]

    def _half(self, sample):
        n = len(sample.kept)
        merged = torch.full((n,), -1)
        merged[-1] = 0
        return Selection(torch.arange(n // 2), sample.hidden[: n // 2].clone(), merged=merged)


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint):
    return backbones.load(str(tiny_checkpoint))


def test_merges_are_followed_through_all_cuts(tiny):
    image = Image.effect_mandelbrot((60, 60), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    inputs = tiny.inputs([image, image], ["What?", "And this, with more words?"])
    n = tiny.num_visual_tokens
    with torch.inference_mode(), Pairs(budget=n // 4)(tiny.model) as trace:
        tiny.model(**inputs)
    expected = [j // 2 if j < n // 2 else -1 for j in range(n)]
    expected[-2:] = [0, 0]  # the last pair went into the first
    assert [holders(own).tolist() for own in trace.cuts] == [expected] * 2
    assert holders([]) is None
    found = answer(
        tiny, Pairs(budget=n // 4), [Question(0, "What?", "i", {"max_new_tokens": 1})],
        tiny.inputs([image], ["What?"]), explored=[0],
    )  # fmt: skip
    assert found[0].kept == tuple(range(0, n // 2, 2))
    assert found[0].merged == tuple(-1 if j in found[0].kept else p for j, p in enumerate(expected))


def test_recall_counts_what_a_merged_token_took_in():
    hint = Hint(((0.0, 0.0, 0.25, 0.25),), ())  # of 8 x 8 tokens 0, 1, 8 and 9
    merged = [-1] * N
    merged[1] = merged[8] = 1
    own = Answer(0, "", "", 70, N, 1, (N, 2), (0, -1), tuple(merged))
    assert recall(hint, own, 80, 80) == 0.75 and recall(hint, own, 80, 80, merged=False) == 0.25
    only_made = replace(own, kept=(-1, -2))
    assert recall(hint, only_made, 80, 80) == 0.5, "what it took in is known"
