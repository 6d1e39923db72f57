"""Drills: the shortest possible questions, a few tokens each, that only teach what belongs to what in a
scene.

A benchmark's question is 15 to 40 tokens long and has one answer to learn from; a drill ("star color" ->
"red") has one answer in three tokens, so the first part of stage 2 sees several times more answers a second.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from harness.pocket.data import documents
from harness.pocket.data.facts import CATEGORIES, CATEGORY_OF, CLEAR_GAP, MOST_COUNTED, NUMBERS, Fact, plural
from harness.pocket.data.scenes import COLOURS, DIGITS, SHAPES, SIZES, TEXTURES, WORDS, Scene
from harness.pocket.recipe.tokenizer import PROMPT_TAIL


@dataclass(frozen=True)
class Drill:
    """A question in pieces of text, each with what the model shall think of at its end (None: nothing); the
    last piece's thought is the answer it gives.

    The thoughts in between are only trained, never said: the model reads its prompt at once. They pay where
    an answer takes several steps, as with lettered options.
    """

    kind: str
    pieces: tuple[tuple[str, str | None], ...]

    @classmethod
    def plain(cls, kind: str, question: str, answer: str) -> Drill:
        return cls(kind, ((question, answer),))


KINDS = (
    "hop", "colour", "texture", "size", "shape", "word", "digit", "category", "place", "side", "height",
    "exists", "written", "count", "pick", "choose",
)  # fmt: skip
#: What drills beside questions ask: what is learnt slowest from questions alone.
SLOW = ("place", "side", "height", "word", "digit", "category", "size", "count")
#: What the options of one question are drawn from, as in the benchmarks.
DOMAINS = (
    tuple(COLOURS), SHAPES, TEXTURES, SIZES, WORDS, DIGITS, NUMBERS, tuple(CATEGORIES), ("left", "right"),
    ("above", "below"),
)  # fmt: skip


def _lettered(fact: Fact, kind: str, rng: np.random.Generator) -> Drill:
    """The options of a fact in one of the two languages, after its question or ("pick") its answer."""
    options = documents.options_of(fact, rng)
    chinese = rng.random() < 0.5
    shown = [documents.in_chinese(o) for o in options] if chinese else options
    listed = tuple(
        (f"\n{letter}. {text}", letter if option == fact.answer else "no")
        for letter, text, option in zip(documents.LETTERS, shown, options)
    )
    tail = (documents.LETTER_ANSWER_CN if chinese else documents.LETTER_ANSWER) + PROMPT_TAIL
    ask = f" {fact.answer}" if kind == "pick" else "\n" + (fact.chinese if chinese else fact.question)
    letter = documents.LETTERS[options.index(fact.answer)]
    return Drill(kind, ((ask, None if kind == "pick" else fact.answer), *listed, (tail, letter)))


def picks(rng: np.random.Generator, most: int) -> list[Drill]:
    """Which option is this word? Teaches the way from an option to its letter; needs no image."""
    found = []
    for _ in range(most):
        domain = DOMAINS[int(rng.integers(len(DOMAINS)))]
        answer = domain[int(rng.integers(len(domain)))]
        found.append(_lettered(Fact("pick", "", "", answer, domain), "pick", rng))
    return found


def chooses(scene: Scene, rng: np.random.Generator, most: int) -> list[Drill]:
    """Questions with lettered options, in a few words."""
    facts = [documents.first_fact(scene, rng, documents.CHOICE_FACTS) for _ in range(most)]
    return [_lettered(fact, "choose", rng) for fact in facts if fact is not None]


def drills(scene: Scene, rng: np.random.Generator, most: int, kinds: Sequence[str] = KINDS) -> list[Drill]:
    """Up to `most` drills of some kinds about a scene, in random order."""
    found: list[tuple[str, str, str]] = []
    names = Counter(t.name for t in scene.things)
    colours = {
        kind: Counter(t.colour for t in scene.things if t.kind == kind)
        for kind in ("object", "word", "digit")
    }
    unique = [t for t in scene.things if names[t.name] == 1]
    hues = Counter(t.colour for t in scene.things)
    for t in unique:
        # One token asks: a single step of attention answers, and the longer drills can build on it.
        found.append(("hop", f" {t.name}", t.colour))
        if hues[t.colour] == 1:
            found.append(("hop", f" {t.colour}", t.name))
        found.append(("colour", f" {t.name} color", t.colour))
        if not t.is_text:
            found.append(("texture", f" {t.name} plain striped dotted", t.texture))
            found.append(("size", f" {t.name} small medium large", t.size))
    for t in scene.things:
        if colours[t.kind][t.colour] == 1:
            asked = "shape" if t.kind == "object" else t.kind
            found.append((asked, f" {t.colour} {asked}", t.name))
            if t.kind == "word":
                found.append(("category", f" {t.colour} word name", CATEGORY_OF[t.name]))
    middle = (scene.width / 2, scene.height / 2)
    for first in unique:
        for at, half, (low, high) in zip(first.centre, middle, (("left", "right"), ("above", "below"))):
            if abs(at - half) >= CLEAR_GAP / 2:
                found.append(("place", f" {low} {high} {first.name}", low if at < half else high))
        second = unique[int(rng.integers(len(unique)))]
        dx, dy = (a - b for a, b in zip(first.centre, second.centre))
        if abs(dx) >= CLEAR_GAP:
            found.append(("side", f" {first.name} left right {second.name}", "left" if dx < 0 else "right"))
        if abs(dy) >= CLEAR_GAP:
            found.append(
                ("height", f" {first.name} above below {second.name}", "above" if dy < 0 else "below")
            )
    present = {(t.colour, t.name) for t in scene.objects}
    written = {t.name for t in scene.texts}
    for colour, name in sorted(present):
        other = (list(COLOURS)[int(rng.integers(len(COLOURS)))], SHAPES[int(rng.integers(len(SHAPES)))])
        for c, s in ((colour, name), (colour, other[1]), (other[0], name))[: 2 + int(rng.random() < 0.5)]:
            found.append(("exists", f" {c} {s}?", "yes" if (c, s) in present else "no"))
    if written:
        for word in (sorted(written)[0], WORDS[int(rng.integers(len(WORDS)))]):
            found.append(("written", f" {word} written?", "yes" if word in written else "no"))
    shapes = Counter(t.name for t in scene.objects)
    for name in {*list(shapes)[:3], SHAPES[int(rng.integers(len(SHAPES)))]}:
        if shapes[name] <= MOST_COUNTED:
            found.append(("count", f" many {plural(name)}", str(shapes[name])))
    found = [drill for drill in found if drill[0] in kinds]
    return [Drill.plain(*found[int(i)]) for i in rng.permutation(len(found))[:most]]
