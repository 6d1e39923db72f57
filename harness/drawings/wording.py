"""What the questions of several benchmarks share: instructions, options, and how a fact is found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from harness.drawings.facts import FactV1, pick
from harness.drawings.scenes import SceneV1
from harness.drawings.vocabulary import CHINESE

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
LETTER_ANSWER = "\nAnswer with the option's letter from the given choices directly."
LETTER_ANSWER_CN = "\n请直接使用所提供的选项字母作为答案回答。"
OPTIONS_HEADER = "There are several options:"
LETTERS = "ABCD"
HINTS = ("", "The image shows objects and written words.", "A scene with objects.")

Row = dict[str, object]
Sampler = Callable[[SceneV1, np.random.Generator], "FactV1 | None"]
_DIRECTIONS_CN = {"left": "左边", "right": "右边", "above": "上面", "below": "下面"}
_HALVES_CN = {"top": "上半部", "bottom": "下半部"}


def first_fact(scene: SceneV1, rng: np.random.Generator, samplers: Sequence[Sampler]):
    """The first fact or claim found, trying the samplers in random order; None if there is none."""
    for i in rng.permutation(len(samplers)):
        fact = samplers[int(i)](scene, rng)
        if fact is not None:
            return fact
    return None


def options_of(fact, rng: np.random.Generator) -> list[str]:
    """Two to four options in random order, the right one among them."""
    wrong = [v for v in fact.domain if v != fact.answer]
    most = min(3, len(wrong))
    wrong = [wrong[int(i)] for i in rng.permutation(len(wrong))[: int(rng.integers(min(2, most), most + 1))]]
    options = [fact.answer, *wrong]
    return [options[int(i)] for i in rng.permutation(len(options))]


def in_chinese(option: str) -> str:
    """An option as MMBench-CN shows it (digits stay digits)."""
    return _HALVES_CN.get(option) or CHINESE.get(option, _DIRECTIONS_CN.get(option, option))


def short_prompt(row: Mapping) -> str:
    """The question, to be answered in a word."""
    return str(row["question"]) + SHORT_ANSWER


def said(row: Mapping) -> str:
    """The column `answer`."""
    return str(row["answer"])


def ten_answers(question: str, answer: str, kind: str) -> Row:
    """A row of VQAv2: ten people gave the same answer."""
    answers = [dict(answer=answer, answer_confidence="yes", answer_id=i + 1) for i in range(10)]
    return dict(
        question=question,
        answers=answers,
        multiple_choice_answer=answer,
        answer_type=kind,
        question_type=" ".join(question.split()[:2]).lower(),
    )


__all__ = [
    "HINTS", "LETTERS", "LETTER_ANSWER", "LETTER_ANSWER_CN", "OPTIONS_HEADER", "SHORT_ANSWER", "Row",
    "first_fact", "in_chinese", "options_of", "pick", "said", "short_prompt", "ten_answers",
]  # fmt: skip
