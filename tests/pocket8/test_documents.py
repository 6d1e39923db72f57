"""Questions: true of their scene, worded as lmms-eval words them, in the benchmarks' schemas."""

import hashlib
import json

import numpy as np
import pytest

from harness.drawings import facts
from harness.drawings.scenes import SceneV1, ThingV1, sample_scene
from harness.pocket.data import build, documents
from harness.tasks.benchmarks import mme


def _thing(kind, name, colour, left, top, size="medium", texture="plain", side=42):
    return ThingV1(kind, name, colour, size, texture, (left, top, side, side))


@pytest.fixture
def scene():
    things = (
        _thing("object", "star", "red", 14, 140, "large", "striped", 63),
        _thing("object", "circle", "blue", 210, 150),
        _thing("object", "circle", "green", 210, 14),
        _thing("word", "cat", "purple", 21, 28),
        _thing("digit", "7", "black", 140, 280),
    )
    return SceneV1(things, "flat", (220, 220, 220), 1)


#: Everything each sampler may say about the scene above, worked out by hand.
TRUE_ANSWERS = {
    facts.colour: {"What color is the star?": "red"},
    facts.shape: {
        "What shape is the red object?": "star",
        "What shape is the blue object?": "circle",
        "What shape is the green object?": "circle",
    },
    facts.texture: {
        "Is the star plain, striped or dotted?": "striped",
        "Is the blue circle plain, striped or dotted?": "plain",
        "Is the green circle plain, striped or dotted?": "plain",
    },
    facts.size: {
        "Is the star small, medium or large?": "large",
        "Is the blue circle small, medium or large?": "medium",
        "Is the green circle small, medium or large?": "medium",
    },
    facts.relation: {
        "Is the star to the left or to the right of the blue circle?": "left",
        "Is the blue circle to the left or to the right of the star?": "right",
        "Is the star to the left or to the right of the green circle?": "left",
        "Is the green circle to the left or to the right of the star?": "right",
        "Is the blue circle above or below the green circle?": "below",
        "Is the green circle above or below the blue circle?": "above",
    },
    facts.read_word: {"What word is written in the image?": "cat", "What word is written in purple?": "cat"},
    facts.read_digit: {"What digit is written in the image?": "7", "What digit is written in black?": "7"},
    facts.text_colour: {"What color is the word cat?": "purple", "What color is the digit 7?": "black"},
    facts.category: {"What does the purple word name?": "animal"},
}


@pytest.mark.parametrize("sampler", TRUE_ANSWERS, ids=lambda s: s.__name__)
def test_facts_are_true_and_all_get_asked(scene, sampler):
    said = {}
    for seed in range(150):
        fact = sampler(scene, np.random.default_rng(seed))
        assert fact.answer in fact.domain
        said[fact.question] = fact.answer
    assert said == TRUE_ANSWERS[sampler]


def test_counts(scene):
    expected = {
        "circles": 2,
        "stars": 1,
        "words": 1,
        "digits": 1,
        "red objects": 1,
        "blue objects": 1,
        "hearts": 0,
    }
    said = {}
    for seed in range(400):
        fact = facts.count(scene, np.random.default_rng(seed))
        said[fact.question.removeprefix("How many ").removesuffix(" are there?")] = int(fact.answer)
    assert all(said[k] == n for k, n in expected.items())


def test_claims(scene):
    rng = np.random.default_rng(0)
    pairs = {
        name: {(c.true, c.false) for c in (make(scene, rng) for _ in range(150)) if c}
        for name, (make, *_) in mme._CATEGORIES.items()
    }
    assert all(t != f for claims in pairs.values() for t, f in claims)
    assert {t for t, _ in pairs["existence"]} == {
        f"Is there a {x} in the image?" for x in ("red star", "blue circle", "green circle")
    }
    assert not {f for _, f in pairs["existence"]} & {t for t, _ in pairs["existence"]}
    assert {t for t, _ in pairs["OCR"]} == {"Is the word cat written in the image?"}
    assert {t for t, _ in pairs["text_translation"]} == {"Does the purple word mean 猫 in Chinese?"}
    assert {t for t, _ in pairs["numerical_calculation"]} == {"Is the black digit plus 1 equal to 8?"}
    assert "Is the star to the left of the blue circle?" in {t for t, _ in pairs["position"]}
    assert "Is the star to the right of the blue circle?" in {f for _, f in pairs["position"]}


def test_pope_adversarial_mixes_what_is_there(scene):
    for seed in range(40):
        claim = facts.claim_existence(scene, np.random.default_rng(seed), "adversarial")
        assert claim.false in {
            f"Is there a {c} {s} in the image?"
            for c, s in (("red", "circle"), ("blue", "star"), ("green", "star"))
        }


def test_mmbench_rotations_keep_the_right_option():
    for index in range(20):
        rows = documents.rows("mmbench_en", sample_scene("train", 0, index), np.random.default_rng(index))
        for row in rows:
            options = [row[x] for x in "ABCD" if row[x] != "nan"]
            assert len(options) == len(rows) == len(set(options))
        assert len({row[row["answer"]] for row in rows}) <= 1


def test_the_evaluation_questions_are_the_committed_ones():
    """Scores are comparable only on the same questions: a change here must be a new version, on purpose."""
    rows = [
        (task, [row for _, _, group in build._groups(task, "eval", 12) for row in group])
        for task in documents.tasks()
    ]
    digest = hashlib.sha256(json.dumps(rows, ensure_ascii=False, sort_keys=True).encode()).hexdigest()
    assert digest[:16] == "94c3e9f5839a444d"
