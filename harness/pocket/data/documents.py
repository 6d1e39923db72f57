"""Pocket-8's documents: a scene and a random generator in, rows in the schemas of the eight benchmarks out.

Rows carry no image; `build` adds it. `prompt` is the text lmms-eval's own task code makes of a row (a test
holds the two equal); the trainer uses it, so that it need not import lmms-eval.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import facts
from .facts import CLAIMS, FactV1, pick
from .scenes import SceneV1
from .vocabulary import CHINESE

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
LETTER_ANSWER = "\nAnswer with the option's letter from the given choices directly."
LETTER_ANSWER_CN = "\n请直接使用所提供的选项字母作为答案回答。"
OPTIONS_HEADER = "There are several options:"
YES_NO = " Please answer yes or no."
POPE_STYLES = ("random", "popular", "adversarial")
LETTERS = "ABCD"
TASKS = ("gqa", "mmbench_en", "mmbench_cn", "mme", "pope", "scienceqa", "vqav2", "textvqa")

Row = dict[str, object]


def first_fact(scene: SceneV1, rng: np.random.Generator, samplers) -> FactV1 | None:
    """The first fact found, trying the samplers in random order."""
    for i in rng.permutation(len(samplers)):
        fact = samplers[int(i)](scene, rng)
        if fact is not None:
            return fact
    return None


def options_of(fact: FactV1, rng: np.random.Generator) -> list[str]:
    """Two to four options in random order, the right one among them."""
    wrong = [v for v in fact.domain if v != fact.answer]
    most = min(3, len(wrong))
    wrong = [wrong[int(i)] for i in rng.permutation(len(wrong))[: int(rng.integers(min(2, most), most + 1))]]
    options = [fact.answer, *wrong]
    return [options[int(i)] for i in rng.permutation(len(options))]


def gqa(scene: SceneV1, rng: np.random.Generator) -> list[Row]:
    fact = first_fact(
        scene, rng, (facts.colour, facts.shape, facts.texture, facts.size, facts.relation, facts.relation)
    )
    if fact is None:
        return []
    structural = "choose" if fact.topic in ("texture", "size", "relation") else "query"
    types = {
        "structural": structural,
        "semantic": "rel" if fact.topic == "relation" else "attr",
        "detailed": fact.topic,
    }
    return [dict(question=fact.question, answer=fact.answer, fullAnswer=fact.answer, types=types)]


def vqav2(scene: SceneV1, rng: np.random.Generator) -> list[Row]:
    if rng.random() < 0.35:
        claim = first_fact(scene, rng, (facts.claim_colour, facts.claim_existence, facts.claim_count))
        if claim is None:
            return []
        answer = pick(rng, ("yes", "no"))
        question, kind = claim.true if answer == "yes" else claim.false, "yes/no"
    else:
        fact = first_fact(scene, rng, (facts.count, facts.colour, facts.text_colour, facts.shape))
        if fact is None:
            return []
        question, answer, kind = fact.question, fact.answer, "number" if fact.topic == "count" else "other"
    answers = [dict(answer=answer, answer_confidence="yes", answer_id=i + 1) for i in range(10)]
    question_type = " ".join(question.split()[:2]).lower()
    return [
        dict(
            question=question,
            answers=answers,
            multiple_choice_answer=answer,
            answer_type=kind,
            question_type=question_type,
        )
    ]


def textvqa(scene: SceneV1, rng: np.random.Generator) -> list[Row]:
    fact = first_fact(scene, rng, (facts.read_word, facts.read_word, facts.read_word, facts.read_digit))
    if fact is None:
        return []
    question = fact.question.lower()
    tokens = [t.name.upper() for t in scene.texts]
    return [
        dict(
            question=question,
            question_tokens=question.rstrip("?").split(),
            answers=[fact.answer] * 10,
            ocr_tokens=tokens,
        )
    ]


def pope(scene: SceneV1, rng: np.random.Generator) -> list[Row]:
    style = pick(rng, POPE_STYLES)
    claim = facts.claim_existence(scene, rng, style)
    if claim is None:
        return []
    return [dict(question=q, answer=a, category=style) for q, a in ((claim.true, "yes"), (claim.false, "no"))]


def mme(scene: SceneV1, rng: np.random.Generator, category: str | None = None) -> list[Row]:
    category = category or pick(rng, CLAIMS)
    claim = CLAIMS[category](scene, rng)
    if claim is None:
        return []
    return [
        dict(question=q + YES_NO, answer=a, category=category)
        for q, a in ((claim.true, "Yes"), (claim.false, "No"))
    ]


CHOICE_FACTS = (
    facts.colour,
    facts.shape,
    facts.texture,
    facts.size,
    facts.relation,
    facts.count,
    facts.read_word,
    facts.category,
)
_L2 = {
    "relation": "finegrained_perception (cross-instance)",
    "category": "logic_reasoning",
    "read_word": "finegrained_perception (instance-level)",
}


_DIRECTIONS_CN = {"left": "左边", "right": "右边", "above": "上面", "below": "下面"}


def in_chinese(option: str) -> str:
    """An option as MMBench-CN shows it (digits stay digits)."""
    return CHINESE.get(option, _DIRECTIONS_CN.get(option, option))


def mmbench(scene: SceneV1, rng: np.random.Generator, chinese: bool) -> list[Row]:
    """One base question as its circular copies, MMBench's way: rotation r is row r."""
    fact = first_fact(scene, rng, CHOICE_FACTS)
    if fact is None:
        return []
    options = options_of(fact, rng)
    rows = []
    for r in range(len(options)):
        rotated = options[r:] + options[:r]
        shown = [in_chinese(o) for o in rotated] if chinese else rotated
        cells = dict(zip(LETTERS, shown + ["nan"] * 4))
        rows.append(
            dict(
                question=fact.chinese if chinese else fact.question,
                hint=None,
                answer=LETTERS[rotated.index(fact.answer)],
                **cells,
                category=fact.topic,
                **{"L2-category": _L2.get(fact.topic, "attribute_reasoning"), "comment": "nan"},
                source="pocket-8",
            )
        )
    return rows


_HINTS = ("", "The image shows objects and written words.", "A scene with objects.")


def scienceqa(scene: SceneV1, rng: np.random.Generator) -> list[Row]:
    fact = first_fact(
        scene,
        rng,
        (
            facts.category,
            facts.category,
            facts.read_word,
            facts.read_digit,
            facts.count,
            facts.shape,
            facts.texture,
        ),
    )
    if fact is None:
        return []
    choices = options_of(fact, rng)
    return [
        dict(
            question=fact.question,
            choices=choices,
            answer=choices.index(fact.answer),
            hint=pick(rng, _HINTS),
            topic=fact.topic,
        )
    ]


MAKERS: dict[str, Callable[[SceneV1, np.random.Generator], list[Row]]] = {
    "gqa": gqa,
    "mmbench_en": lambda scene, rng: mmbench(scene, rng, chinese=False),
    "mmbench_cn": lambda scene, rng: mmbench(scene, rng, chinese=True),
    "mme": mme,
    "pope": pope,
    "scienceqa": scienceqa,
    "vqav2": vqav2,
    "textvqa": textvqa,
}


def prompt(task: str, row: Row) -> str:
    """The user's text for a row, as lmms-eval 0.7.3 words it with its default settings."""
    question = str(row["question"])
    if task.startswith("mmbench"):
        options = "".join(f"{letter}. {row[letter]}\n" for letter in LETTERS if row[letter] != "nan").rstrip(
            "\n"
        )
        tail = LETTER_ANSWER_CN if task.endswith("cn") else LETTER_ANSWER
        return f"{question} {OPTIONS_HEADER}\n{options}\n{tail}"
    if task == "scienceqa":
        context = f"Context: {row['hint']}\n" if row["hint"] else ""
        choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"]))
        return f"{context}{question}\n{choices}{LETTER_ANSWER}"
    if task == "mme":
        question = question.replace(YES_NO, "")
    elif task == "textvqa":
        question = question.capitalize()
    return question + SHORT_ANSWER


def target(task: str, row: Row) -> str:
    """The answer the model is trained to give."""
    if task == "scienceqa":
        return LETTERS[int(row["answer"])]
    if task in ("vqav2", "textvqa"):
        return str(row["multiple_choice_answer"] if task == "vqav2" else row["answers"][0])
    return (
        str(row["answer"]).lower() if task == "mme" else str(row["answer"])
    )  # MME says Yes where POPE says yes
