"""oracle and things: controls that are handed the answer key, which no other method ever sees."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import backbones
from harness.store.journal import Answer
from harness.tasks.answering import Question, answer
from harness.tasks.evidence import columns, grid_of, recall
from methods import registry
from methods.base import ImageView, Pruner
from methods.errors import UserError
from methods.views import Hint, cells

#: evidence: the upper left quarter of a quarter; things: that and the lower right quarter
HINT = Hint(((0.0, 0.0, 0.25, 0.25),), ((0.0, 0.0, 0.25, 0.25), (0.5, 0.5, 0.5, 0.5)))


def view(hint=HINT, n=24):
    pixels = torch.rand(3, 336, 336, generator=torch.Generator().manual_seed(0))
    return ImageView(torch.zeros(n * n + 1, 4), (n, n), 2, pixels, lambda x: x, {}, hint=hint)


def test_oracle_keeps_the_evidence_first_and_things_any_thing():
    evidence = cells(HINT.evidence, 24, 24).ravel().nonzero()[0]
    things = cells(HINT.things, 24, 24).ravel().nonzero()[0]
    assert len(evidence) == 36 and len(things) == 36 + 144
    kept = registry.build("oracle", 64).select(view()).kept.tolist()
    assert len(kept) == 64 and kept == sorted(kept) and set(evidence) < set(kept)
    assert not set(kept) - set(evidence) <= set(things), "what is left over is spent at random"
    some = registry.build("oracle", 16).select(view()).kept.tolist()
    assert set(some) < set(evidence) and set(some) < set(kept)
    kept = registry.build("things", 64).select(view()).kept.tolist()
    assert len(kept) == 64 and set(kept) < set(things) and not set(evidence) <= set(kept)
    assert len(registry.build("things", 192).select(view()).kept) == 192


def test_no_run_of_all_methods_gets_them_unless_the_data_has_a_key():
    assert not {"oracle", "things"} & set(registry.available())
    assert {"oracle", "things"} <= set(registry.available(answer_key=True))
    with pytest.raises(UserError, match="answer key"):
        registry.build("oracle", 64).select(view(hint=None))
    assert "knows the answer key" in registry.build("things", 64).note


def test_the_engine_hands_each_sample_its_own_key_and_others_none(tiny_checkpoint):
    backbone = backbones.load(str(tiny_checkpoint))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (336, 336, 3), np.uint8))
    keys = (HINT, Hint(((0.75, 0.75, 0.25, 0.25),), HINT.things))
    settings = {"max_new_tokens": 1}
    asked = [Question(i, "a?", "one image", settings, key) for i, key in enumerate(keys)]
    inputs = backbone.inputs([image, image], ["a?", "a?"])
    side = round(backbone.num_visual_tokens**0.5)
    few = side * side // 16
    found = answer(backbone, registry.build("oracle", few), asked, inputs)
    for own, key in zip(found, keys):
        assert set(own.kept) <= set(cells(key.evidence, side, side).ravel().nonzero()[0].tolist())
        assert recall(key, own, 336, 336) == 1.0

    seen = []

    class Spy(Pruner):
        name = "spy"

        def select(self, image):
            seen.append(image.hint)
            return registry.build("uniform", 4).select(image)

    answer(backbone, Spy(budget=4), asked, inputs)
    assert seen and set(seen) == {None}


def test_recall_counts_the_kept_tokens_under_the_evidence():
    def of(kept, last=3):
        return Answer(0, "", "", 600, 576, 1, (576, last), kept)

    first_rows = tuple(24 * r + c for r in range(3) for c in range(6))
    assert recall(HINT, of(first_rows), 336, 336) == pytest.approx(18 / 36)
    assert recall(HINT, of((-1, 0, 575)), 336, 336) == pytest.approx(1 / 36)
    assert recall(HINT, of((-1, -2)), 336, 336) is None, "only tokens that the method made"
    assert recall(HINT, of(None, last=576), 336, 336) == 1.0, "nothing was pruned"


@pytest.mark.parametrize(("tokens", "size", "grid"), [(576, (336, 336), (24, 24)), (88, (231, 300), (11, 8))])
def test_the_grid_follows_from_count_and_shape(tokens, size, grid):
    assert grid_of(tokens, *size) == grid


def test_a_raster_of_its_own_has_no_recall():
    rows = {"kind": ["hop"], "chance": [0.1], "regime": ["dense"]}
    found = [Answer(0, "", "", 600, 576, 1, (64, 64), tuple(range(64)))]
    for spec, known in (("downsample", False), ("uniform", True)):
        own = columns(registry.build(spec, 64), rows, [HINT], found, [(336, 336)])
        assert (own["recall"][0] is not None) == known and own["kind"] == ["hop"]
    assert columns(registry.build("uniform", 64), rows, [], found, []) == {}


def test_the_table_beside_the_leaderboard():
    from harness.report import evidence

    def record(spec, budget, score, recalled):
        documents = {"row": [0, 1], "score": score, "recall": recalled, "kind": ["count", "hop"]}
        documents |= {"chance": [0.2, 0.125], "regime": ["dense", "sparse"]}
        method = {"spec": spec, "budget": budget}
        return {"status": "done", "task": "gqa", "method": method, "documents": documents}

    records = [record("vanilla", None, [1.0, 1.0], [1.0, 1.0]), record("random", 64, [0.0, 1.0], [0.5, 0.0])]
    table = evidence.table(evidence.questions(records), 64)
    assert list(table.columns) == ["evidence recall", "sparse", "dense", "count", "hop"]
    assert table.loc["random"].tolist() == [25.0, 100.0, 0.0, 0.0, 100.0]
    assert "Budget 64" in evidence.render(records, [64])
    del records[1]["documents"]["recall"], records[0]["documents"]["recall"]
    assert evidence.render(records, [64]) == "", "data without evidence has no such table"
