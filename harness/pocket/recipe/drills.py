"""What is asked in training: the benchmarks' questions, and drills of a few tokens that teach what they are
made of.

A benchmark's question is 15 to 40 tokens long and has one answer to learn from. A drill is a question's
telling words alone ("color striped star" -> "red"): several times more answers per second.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from harness.drawings import wording
from harness.drawings.facts import CATEGORIES, plural
from harness.drawings.v2.facts import KINDS, NUMBERS, Fact, roots
from harness.drawings.v2.interview import Interview
from harness.drawings.v2.scenes import COLOURS, DIGITS, SHAPES, TEXTURES, WORDS, Scene, shares
from harness.pocket.data import documents

#: Words of the questions that drills leave out.
_SILENT = re.compile(
    "what|is|the|how|are|do|have|which|appears|only|among|in|or|to|of|a|an|image|does|with", re.IGNORECASE
)
#: What the options of a "pick" are drawn from.
DOMAINS = (
    tuple(COLOURS), SHAPES, TEXTURES, WORDS, DIGITS, NUMBERS, tuple(CATEGORIES), ("left", "right"),
    ("above", "below"), ("top", "bottom"),
)  # fmt: skip
LETTERED = ("mmbench_en", "mmbench_cn", "scienceqa")
#: Kinds of drills: one word asks ("hop1"), one kind of fact each, an option's letter ("pick", "choose").
DRILLS = ("hop1", *KINDS, "pick", "choose")
#: Kinds whose evidence is two things, each with its part in the question.
ORDERED = ("read", "meaning", "relation", "hop")

Looks = tuple[frozenset[int], ...]


@dataclass(frozen=True)
class Drill:
    """A question in pieces of text, each with what the model shall think of at its end (None: nothing); the
    last piece's thought is the answer it gives.

    The thoughts in between are only trained, never said: the model reads its prompt at once. They pay where
    an answer takes several steps, as with lettered options. whole: it is a prompt as the harness words it,
    which the family's chat template closes. looks: the things that its answer needs a look at, by their
    numbers among `scene.alone`: all of them at once, or first the one and then the other.
    """

    kind: str
    pieces: tuple[tuple[str, str | None], ...]
    whole: bool = False
    looks: Looks = ()


def asked(task: str, row: wording.Row, looks: Looks) -> Drill:
    """A benchmark's question as the harness words it, with a thought after each option: its letter if it is
    the right one, else "no".
    """
    question, answer = documents.prompt(task, row), documents.target(task, row)
    if task not in LETTERED:
        return Drill(task, ((question, answer),), whole=True, looks=looks)
    pieces = re.split(r"(?=\n[A-D]\. |\n+(?:Answer with|请直接))", question)
    thoughts = [(answer if p[1] == answer else "no") if p[2:4] == ". " else None for p in pieces[:-1]]
    return Drill(task, tuple(zip(pieces, [*thoughts, answer])), whole=True, looks=looks)


def short(fact: Fact, looks: Looks) -> Drill:
    """A fact's question in its telling words."""
    words = [w for w in re.findall(r"\w+", fact.question) if not _SILENT.fullmatch(w)]
    return Drill(fact.kind, (("".join(f" {w.lower()}" for w in words), fact.answer),), looks=looks)


def single(scene: Scene) -> list[Drill]:
    """One word asks: what is the only thing of this name, or colour, like? A single step of attention
    answers, and the longer questions build on it."""
    names, colours = defaultdict(list), defaultdict(list)
    for i, thing in enumerate(scene.alone):
        names[thing.name].append(i)
        colours[thing.colour].append(i)

    def drill(kind: str, ask: str, answer: str, things: list[int]) -> Drill:
        return Drill(kind, ((f" {ask}", answer),), looks=(frozenset(things),))

    found = []
    for name, own in names.items():
        if len(own) == 1:
            found.append(drill("hop1", name, scene.alone[own[0]].colour, own))
        if name in SHAPES and len(own) <= len(NUMBERS):
            found.append(drill("count", f"many {plural(name)}", str(len(own)), own))
    found += [drill("hop1", c, scene.alone[own[0]].name, own) for c, own in colours.items() if len(own) == 1]
    return found


def _lettered(answer: str, domain: Sequence[str], ask: str, kind: str, chinese: bool, rng) -> Drill:
    fact = Fact(kind, kind, "", "", answer, tuple(domain), ())
    options = wording.options_of(fact, rng)
    shown = map(wording.in_chinese, options) if chinese else options
    listed = tuple(
        (f"\n{letter}. {text}", letter if option == answer else "no")
        for letter, text, option in zip(wording.LETTERS, shown, options)
    )
    tail = wording.LETTER_ANSWER_CN if chinese else wording.LETTER_ANSWER
    letter = wording.LETTERS[options.index(answer)]
    return Drill(kind, ((ask, None if kind == "pick" else answer), *listed, (tail, letter)), whole=True)


def picks(rng: np.random.Generator, most: int) -> list[Drill]:
    """Which option is this word? Teaches the way from an option to its letter; needs no image."""
    found = []
    for _ in range(most):
        domain = DOMAINS[int(rng.integers(len(DOMAINS)))]
        answer = domain[int(rng.integers(len(domain)))]
        found.append(_lettered(answer, domain, f" {answer}", "pick", rng.random() < 0.5, rng))
    return found


class Lessons:
    """What one scene can be asked in training; the same generator gives the same questions."""

    def __init__(self, scene: Scene, rng: np.random.Generator) -> None:
        self.scene, self.rng = scene, rng
        self._interview = Interview(scene, rng, disjoint=False)
        self._single = single(scene)
        alone = [i for i, thing in enumerate(scene.things) if thing.host < 0]
        self._alone = {i: number for number, i in enumerate(alone)}
        self._boxes = {tuple(box): i for i, box in enumerate(shares(scene, scene.things))}

    def facts(self, most: int, of: Collection[str] = KINDS) -> list[Fact]:
        """Facts of these kinds in turn, of a kind all answers in turn."""
        kinds = [k for k, facts in self._interview.facts.items() if facts and k in of]
        found = []
        for i in range(most if kinds else 0):
            facts = self._interview.facts[kinds[i % len(kinds)]]
            answers = sorted({f.answer for f in facts})
            answer = answers[int(self.rng.integers(len(answers)))]
            fitting = [f for f in facts if f.answer == answer]
            found.append(fitting[int(self.rng.integers(len(fitting)))])
        return found

    def drills(self, most: int) -> list[Drill]:
        """Up to `most`, a quarter of them of one word."""
        singles = self.singles(most // 4)
        return singles + self._short(most - len(singles))

    def _short(self, most: int, of: Collection[str] = KINDS) -> list[Drill]:
        return [short(fact, self._looks(fact.kind, fact.evidence)) for fact in self.facts(most, of)]

    def _looks(self, kind: str, evidence: Sequence[int]) -> Looks:
        """evidence: as of a `Fact`."""
        groups = [(i,) for i in evidence] if kind in ORDERED else [evidence]
        return tuple(frozenset(self._alone[i] for i in roots(self.scene, group)) for group in groups)

    def singles(self, most: int) -> list[Drill]:
        """Up to `most` of one word."""
        return [self._single[int(i)] for i in self.rng.permutation(len(self._single))[:most]]

    def first_drills(self, most: int) -> list[Drill]:
        """Up to `most` that one look at one thing answers, half of them of one word."""
        return self.singles(most // 2) + self._short(most // 2, ("lookup", "read"))

    def chooses(self, most: int) -> list[Drill]:
        """Questions with lettered options, without the benchmark's header."""
        found = []
        for fact in self.facts(most):
            chinese = bool(self.rng.random() < 0.5)
            ask = fact.chinese if chinese else fact.question
            if fact.kind != "exists":
                found.append(_lettered(fact.answer, fact.domain, ask, "choose", chinese, self.rng))
        return found

    def questions(self, task: str, most: int) -> list[Drill]:
        """Up to `most` questions of a benchmark, one of each document's rows."""
        found = []
        for _ in range(most):
            rows = documents.ask(self._interview, task)
            if rows:
                row = rows[int(self.rng.integers(len(rows)))]
                evidence = [self._boxes[tuple(box)] for box in row["evidence"]]
                found.append(asked(task, row, self._looks(row["kind"], evidence)))
        return found
