"""Version 2 of Pocket-8: its regimes, evidence, answers (by a solver of its own) and balance."""

import re
from collections import Counter

import numpy as np
import pytest

from harness.drawings.facts import CATEGORIES
from harness.drawings.v2 import paint
from harness.drawings.v2.facts import KINDS, facts_of, roots
from harness.drawings.v2.interview import Interview
from harness.drawings.v2.scenes import (
    COLOURS,
    DENSE_COVERAGE,
    REGIMES,
    SHAPES,
    SPLIT_BUCKETS,
    TEXTURES,
    cells,
    coverage,
    sample_scene,
    without_things,
)
from harness.drawings.vocabulary import CHINESE
from harness.pocket.data import build, documents, v2

SMALL = dict.fromkeys(documents.tasks(), 8)


@pytest.fixture(scope="module")
def made():
    return v2.groups("eval", counts=SMALL)


@pytest.fixture(scope="module")
def scenes():
    return [sample_scene("train", 5, i) for i in range(90)]


def test_regimes_have_their_numbers_and_coverage(scenes):
    for regime, (fewest, most) in REGIMES.items():
        own = [s for s in scenes if s.regime == regime]
        assert len(own) == 30
        assert all(fewest <= len(s.alone) <= most for s in own)
        if regime == "dense":
            touched = [coverage(s) for s in own]
            assert min(touched) >= DENSE_COVERAGE[0] and max(touched) <= DENSE_COVERAGE[1]
            sides = {side for s in own for t in s.alone for side in t.box[2:]}
            assert max(sides) == 42 and min(t.box[2] for s in own for t in s.objects) == 28


def test_splits_are_disjoint_and_scenes_repeat(scenes):
    for split, buckets in SPLIT_BUCKETS.items():
        for index in range(9):
            scene = sample_scene(split, 1, index)
            assert scene.bucket in buckets and scene == sample_scene(split, 1, index)


def test_things_lie_inside_and_apart(scenes):
    for scene in scenes:
        taken = np.zeros((scene.height, scene.width), int)
        for thing in scene.things:
            left, top, width, height = thing.box
            assert left >= 0 and top >= 0 and left + width <= scene.width and top + height <= scene.height
            if thing.host < 0:
                taken[top : top + height, left : left + width] += 1
            else:
                a, b, w, h = scene.things[thing.host].box
                assert a <= left and b <= top and left + width <= a + w and top + height <= b + h
        assert taken.max() == 1


def test_things_are_drawn_in_their_boxes_and_in_the_backgrounds_colours(scenes):
    for scene in scenes[:12]:
        image, bare = (np.asarray(paint.render(s)).astype(int) for s in (scene, without_things(scene)))
        changed = (image != bare).any(-1)
        inside = np.zeros_like(changed)
        for left, top, width, height in (t.box for t in scene.things):
            assert changed[top : top + height, left : left + width].mean() > 0.1
            inside[max(top - 2, 0) : top + height + 2, max(left - 2, 0) : left + width + 2] = True
        assert not (changed & ~inside).any()
    # a thing's colour is not rarer in the background than elsewhere: colours' spread there is wide
    spread = np.mean([np.asarray(paint.background(s)).reshape(-1, 3).std(0).max() for s in scenes[:12]])
    assert spread > 25


def test_evidence_of_an_images_questions_is_disjoint_and_marked_in_the_rows(made):
    used: dict[str, list[set[int]]] = {}
    regimes = Counter()
    for task, groups in made.items():
        for name, scene, rows in groups:
            regimes[task, scene.regime] += 1
            boxes = {tuple(b) for row in rows for b in row["evidence"]}
            assert boxes and all(row["kind"] in KINDS and row["regime"] == scene.regime for row in rows)
            assert all(0 <= v <= 1 for b in boxes for v in b)
            numbers = [
                i
                for i, t in enumerate(scene.things)
                if (t.box[0] / 336, t.box[1] / 336, t.box[2] / 336, t.box[3] / 336) in boxes
            ]
            assert len(numbers) == len(boxes)
            used.setdefault(name, []).append(set(roots(scene, numbers)))
    assert set(regimes.values()) == {8}
    for sets in used.values():
        assert sum(map(len, sets)) == len(set.union(*sets)), "two questions of an image share a thing"
    dense = [len(s) for name, s in used.items() if v2.scene_of(name).regime == "dense"]
    assert np.median(dense) >= 6


def test_cells_of_a_grid():
    box = (0.25, 0.5, 0.25, 0.25)
    assert cells([box], 4, 4).nonzero()[0].tolist() == [2] and cells([box], 4, 4)[2, 1]
    assert cells([box], 8, 8).sum() == 4
    assert cells([(0.5, 0.5, 0.001, 0.001)], 2, 2).sum() == 1, "a speck has a cell too"


# ---- the independent solver: reads the English question, looks at the list of things


def _objects(scene, words):
    """Numbers of the objects that all of these words describe."""
    return [
        i
        for i, t in enumerate(scene.things)
        if not t.is_text and all(w in (t.name, t.colour, t.texture) for w in words)
    ]


def _one(scene, text):
    (found,) = _objects(scene, text.split())
    return found


def _walk(scene, start, direction):
    """The thing that one meets first, walking over a map of the scene from the middle of a thing's side."""
    owner = np.full((scene.height, scene.width), -1)
    for i, t in enumerate(scene.things):
        if t.host < 0:
            left, top, width, height = t.box
            owner[top : top + height, left : left + width] = i
    left, top, width, height = scene.things[start].box
    x, y = left + width // 2, top + height // 2
    dx, dy = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}[direction]
    while 0 <= x < scene.width and 0 <= y < scene.height:
        if owner[y, x] not in (-1, start):
            return int(owner[y, x])
        x, y = x + dx, y + dy
    return None


_SIDES = r"(on|to the left of|to the right of|above|below)"
_WAY = {"to the left of": "left", "to the right of": "right", "above": "above", "below": "below"}


def _text_at(scene, place, name):
    thing = _one(scene, name)
    if place == "on":
        (text,) = [t for t in scene.things if t.host == thing]
        return text
    return scene.things[_walk(scene, thing, _WAY[place])]


def solve(scene, question):
    """The answer, from the question's words and the things alone."""

    def match(pattern):
        return re.fullmatch(pattern, question)

    if m := match(r"What color is the (\w+ \w+)\?"):
        return scene.things[_one(scene, m[1])].colour
    if m := match(r"What shape is the (\w+ \w+) object\?"):
        return scene.things[_one(scene, m[1])].name
    if m := match(r"Is the (\w+ \w+) plain, striped or dotted\?"):
        return scene.things[_one(scene, m[1])].texture
    if m := match(rf"What (word|digit) is {_SIDES} the (\w+ \w+)\?"):
        text = _text_at(scene, m[2], m[3])
        assert text.kind == m[1]
        return text.name
    if m := match(r"What does the word on the (\w+ \w+) name\?"):
        word = _text_at(scene, "on", m[1]).name
        return next(c for c, words in CATEGORIES.items() if word in words)
    if m := match(r"What does the word on the (\w+ \w+) mean in Chinese\?"):
        return CHINESE[_text_at(scene, "on", m[1]).name]
    if m := match(r"What is the digit on the (\w+ \w+) plus 1\?"):
        return str(int(_text_at(scene, "on", m[1]).name) + 1)
    if m := match(r"Is there an? (\w+ \w+ \w+) in the image\?"):
        return "yes" if _objects(scene, m[1].split()) else "no"
    if m := match(r"How many (\w+) (\w+) are there\?"):
        return str(len(_objects(scene, (m[1], _singular(m[2])))))
    if m := match(r"Which color appears only once among the (\w+)\?"):
        colours = Counter(scene.things[i].colour for i in _objects(scene, (_singular(m[1]),)))
        (once,) = [c for c, n in colours.items() if n == 1]
        return once
    if m := match(r"How many colors do the (\w+) have\?"):
        return str(len({scene.things[i].colour for i in _objects(scene, (_singular(m[1]),))}))
    if m := match(r"Is the (\w+ \w+) in the (\w+) or the (\w+) half\?"):
        x, y = scene.things[_one(scene, m[1])].centre
        return m[2] if (x < scene.width / 2 if m[2] == "left" else y < scene.height / 2) else m[3]
    if m := match(r"Is the (\w+ \w+) (to the left or to the right of|above or below) the (\w+ \w+)\?"):
        a, b = (scene.things[_one(scene, m[i])].centre for i in (1, 3))
        if m[2].startswith("above"):
            return "above" if a[1] < b[1] else "below"
        return "left" if a[0] < b[0] else "right"
    if m := match(rf"What (color|shape) is the object {_SIDES} the word (\w+)\?"):
        (word,) = [i for i, t in enumerate(scene.things) if t.kind == "word" and t.name == m[3]]
        start = word if scene.things[word].host < 0 else scene.things[word].host
        thing = scene.things[_walk(scene, start, _WAY[m[2]])]
        return thing.colour if m[1] == "color" else thing.name
    raise AssertionError(f"no rule for {question!r}")


def _singular(plural):
    return "cross" if plural == "crosses" else plural.removesuffix("s")


def test_every_answer_is_right_by_an_independent_solver(scenes):
    seen = Counter()
    for i, scene in enumerate(scenes):
        for kind, facts in facts_of(scene, np.random.default_rng(i)).items():
            for fact in facts:
                assert solve(scene, fact.question) == fact.answer, (fact, scene)
                assert fact.answer in fact.domain and fact.evidence
                seen[kind] += 1
    assert set(seen) == set(KINDS) and min(seen.values()) > 100, seen


def test_claims_say_the_answer_and_something_else(scenes):
    for scene in scenes[:30]:
        for facts in facts_of(scene, np.random.default_rng(0)).values():
            for fact in facts[:20]:
                if fact.kind != "exists":
                    other = next(v for v in fact.domain if v != fact.answer)
                    true, false = fact.claims(other)
                    assert true != false and "{" not in true + false


def test_a_blind_guess_is_within_chance(made):
    """The most frequent answer of each kind of question, over those with as many possible answers."""
    given: dict[tuple, Counter] = {}
    for task, groups in made.items():
        for _, _, rows in groups:
            for row in rows:
                answer = documents.target(task, row)
                options = len(set(answer_set(task, row, answer)))
                given.setdefault((task, row["kind"], options), Counter())[answer] += 1
    assert given
    for (task, kind, options), counts in given.items():
        n = sum(counts.values())
        assert max(counts.values()) <= n / options + 4, (task, kind, options, counts)


def answer_set(task, row, answer):
    if task.startswith("mmbench") or task == "scienceqa":
        return "ABCD"[: len(row["choices"]) if task == "scienceqa" else sum(row[x] != "nan" for x in "ABCD")]
    for domain in (("yes", "no"), tuple(COLOURS), SHAPES, TEXTURES, ("left", "right"), ("top", "bottom")):
        if answer in domain:
            return domain
    for domain in (("above", "below"), tuple("12345")):
        if answer in domain and row["kind"] != "read":
            return domain
    return range(10)


def test_training_never_sees_an_evaluation_scene():
    train = {sample_scene("train", 0, i).things for i in range(60)}
    assert not train & {v2.scene("eval", i, False).things for i in range(60)}


def test_varied_canvases_hold_crowds_too():
    made = v2.groups("eval", varied=True, counts={"gqa": 4, "pope": 4})
    sizes = set()
    for groups in made.values():
        for name, scene, _ in groups:
            assert v2.scene_of(name) == scene and build.scene_of(f"{name}.png") == scene
            assert paint.render(scene).size == (scene.width, scene.height)
            sizes.add((scene.width, scene.height))
            if scene.regime == "dense":
                assert DENSE_COVERAGE[0] <= coverage(scene) <= DENSE_COVERAGE[1]
    assert len(sizes) > 6


def test_training_interviews_need_not_be_disjoint(scenes):
    interview = Interview(scenes[2], np.random.default_rng(0), disjoint=False)
    asked = [documents.ask(interview, task) for _ in range(4) for task in documents.tasks()]
    assert sum(map(bool, asked)) == 32


def test_files_of_version_2_read_as_version_1s_do(tmp_path, monkeypatch):
    from harness.tasks.lmms import Documents
    from harness.tasks.lmms import build as build_task
    from harness.tasks.sources import flat
    from harness.tasks.suites import BENCHMARKS

    monkeypatch.setattr(documents, "questions", lambda version: dict.fromkeys(documents.tasks(), 4))
    root = build.build(tmp_path / "v2", progress=False, version=2)
    for task in documents.tasks():
        rows = Documents(BENCHMARKS[task], flat(BENCHMARKS[task], root, "eval"))
        assert set(rows.rows["regime"]) == set(REGIMES)
        upstream = build_task(rows)
        for doc in upstream.test_docs():
            assert upstream.doc_to_text(doc) == documents.prompt(task, doc)
            assert doc["kind"] in KINDS and len(doc["evidence"][0]) == 4
            score = next(iter(upstream.process_results(doc, [documents.target(task, doc)]).values()))
            assert (
                (score["score"] if "score" in score else score["prediction"] == doc["answer"])
                if isinstance(score, dict)
                else score == 1.0
            )
