"""True things one can ask about a scene, before any benchmark's wording: `FactV1` and the samplers that find
one.

Each sampler takes a scene and a random generator and returns a fact, or None where the scene has nothing to
ask.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from harness.drawings.scenes import (
    ANIMALS,
    COLOURS,
    DIGITS,
    FOODS,
    PLACES,
    SHAPES,
    SIZES,
    TEXTURES,
    TOOLS,
    WORDS,
    SceneV1,
    ThingV1,
)
from harness.drawings.vocabulary import CHINESE

CATEGORIES = {"animal": ANIMALS, "food": FOODS, "tool": TOOLS, "place": PLACES}
CATEGORY_OF = {word: name for name, words in CATEGORIES.items() for word in words}
#: Two centres must differ by this many pixels before we ask which is further left or higher up.
CLEAR_GAP = 42
MOST_COUNTED = 5
NUMBERS = tuple(str(n) for n in range(MOST_COUNTED + 1))


@dataclass(frozen=True)
class FactV1:
    """A question with its answer in both languages, and what else could have been the answer."""

    topic: str
    question: str
    chinese: str
    answer: str
    domain: tuple[str, ...]  # every possible answer, the right one included


Sampler = Callable[[SceneV1, np.random.Generator], "FactV1 | None"]


def pick(rng: np.random.Generator, items):
    items = list(items)
    return items[int(rng.integers(len(items)))] if items else None


def names_of(scene: SceneV1) -> list[tuple[ThingV1, str, str]]:
    """Every object that has an unambiguous name: (thing, English, Chinese)."""
    shapes = Counter(t.name for t in scene.objects)
    pairs = Counter((t.colour, t.name) for t in scene.objects)
    named = []
    for t in scene.objects:
        if shapes[t.name] == 1:
            named.append((t, t.name, CHINESE[t.name]))
        elif pairs[t.colour, t.name] == 1:
            named.append((t, f"{t.colour} {t.name}", f"{CHINESE[t.colour]}{CHINESE[t.name]}"))
    return named


def _attribute(scene: SceneV1, rng: np.random.Generator, topic: str) -> FactV1 | None:
    found = pick(rng, names_of(scene))
    if found is None:
        return None
    thing, english, chinese = found
    if topic == "texture":
        return FactV1(
            topic,
            f"Is the {english} plain, striped or dotted?",
            f"{chinese}是什么图案？",
            thing.texture,
            TEXTURES,
        )
    return FactV1(
        topic, f"Is the {english} small, medium or large?", f"{chinese}是什么大小？", thing.size, SIZES
    )


def texture(scene: SceneV1, rng: np.random.Generator) -> FactV1 | None:
    return _attribute(scene, rng, "texture")


def size(scene: SceneV1, rng: np.random.Generator) -> FactV1 | None:
    return _attribute(scene, rng, "size")


def colour(scene: SceneV1, rng: np.random.Generator) -> FactV1 | None:
    shapes = Counter(t.name for t in scene.objects)
    thing = pick(rng, [t for t in scene.objects if shapes[t.name] == 1])
    if thing is None:
        return None
    return FactV1(
        "colour",
        f"What color is the {thing.name}?",
        f"{CHINESE[thing.name]}是什么颜色？",
        thing.colour,
        tuple(COLOURS),
    )


def shape(scene: SceneV1, rng: np.random.Generator) -> FactV1 | None:
    colours = Counter(t.colour for t in scene.objects)
    thing = pick(rng, [t for t in scene.objects if colours[t.colour] == 1])
    if thing is None:
        return None
    return FactV1(
        "shape",
        f"What shape is the {thing.colour} object?",
        f"{CHINESE[thing.colour]}的物体是什么形状？",
        thing.name,
        SHAPES,
    )


def relation(scene: SceneV1, rng: np.random.Generator) -> FactV1 | None:
    named = names_of(scene)
    if len(named) < 2:
        return None
    first, second = (named[int(i)] for i in rng.choice(len(named), 2, replace=False))
    dx, dy = (a - b for a, b in zip(first[0].centre, second[0].centre))
    sideways = abs(dx) > abs(dy)
    gap = dx if sideways else dy
    if abs(gap) < CLEAR_GAP:
        return None
    where, where_cn, domain = (
        ("to the left or to the right of", "左边还是右边", ("left", "right"))
        if sideways
        else ("above or below", "上面还是下面", ("above", "below"))
    )
    return FactV1(
        "relation",
        f"Is the {first[1]} {where} the {second[1]}?",
        f"{first[2]}在{second[2]}的{where_cn}？",
        domain[0] if gap < 0 else domain[1],
        domain,
    )


def plural(shape: str) -> str:
    """Of a shape's name."""
    return "crosses" if shape == "cross" else f"{shape}s"


def count(scene: SceneV1, rng: np.random.Generator) -> FactV1 | None:
    present = [t.name for t in scene.objects]
    kind = pick(rng, ["shape", "shape", "colour", "words", "digits"])
    if kind == "shape":
        name = pick(rng, present or SHAPES) if rng.random() < 0.8 else pick(rng, SHAPES)
        n, english, chinese = present.count(name), plural(name), CHINESE[name]
    elif kind == "colour":
        name = pick(rng, [t.colour for t in scene.objects] or list(COLOURS))
        n = sum(t.colour == name for t in scene.objects)
        english, chinese = f"{name} objects", f"{CHINESE[name]}物体"
    else:
        n = sum(t.kind == kind[:-1] for t in scene.things)
        english, chinese = kind, "单词" if kind == "words" else "数字"
    if n > MOST_COUNTED:
        return None
    return FactV1("count", f"How many {english} are there?", f"有多少个{chinese}？", str(n), NUMBERS)


def _sole_text(scene: SceneV1, kind: str, rng: np.random.Generator) -> tuple[ThingV1, str, str] | None:
    """A word or digit and how to point at it: by its colour, or as the only one."""
    texts = [t for t in scene.texts if t.kind == kind]
    colours = Counter(t.colour for t in texts)
    thing = pick(rng, [t for t in texts if colours[t.colour] == 1])
    if thing is None:
        return None
    return thing, f"{thing.colour} {kind}", f"{CHINESE[thing.colour]}的{'单词' if kind == 'word' else '数字'}"


def _read(scene: SceneV1, rng: np.random.Generator, kind: str, domain: tuple[str, ...]) -> FactV1 | None:
    found = _sole_text(scene, kind, rng)
    if found is None:
        return None
    thing, _, chinese = found
    texts = [t for t in scene.texts if t.kind == kind]
    if len(texts) == 1 and rng.random() < 0.4:
        question, chinese = (
            f"What {kind} is written in the image?",
            f"图中写的是什么{'单词' if kind == 'word' else '数字'}？",
        )
    else:
        question, chinese = f"What {kind} is written in {thing.colour}?", f"{chinese}是什么？"
    return FactV1(f"read_{kind}", question, chinese, thing.name, domain)


def read_word(scene: SceneV1, rng: np.random.Generator) -> FactV1 | None:
    return _read(scene, rng, "word", WORDS)


def read_digit(scene: SceneV1, rng: np.random.Generator) -> FactV1 | None:
    return _read(scene, rng, "digit", DIGITS)


def text_colour(scene: SceneV1, rng: np.random.Generator) -> FactV1 | None:
    words = Counter(t.name for t in scene.texts)
    thing = pick(rng, [t for t in scene.texts if words[t.name] == 1])
    if thing is None:
        return None
    chinese = CHINESE.get(thing.name, thing.name)
    return FactV1(
        "text_colour",
        f"What color is the {thing.kind} {thing.name}?",
        f"{chinese}这个词是什么颜色？",
        thing.colour,
        tuple(COLOURS),
    )


def category(scene: SceneV1, rng: np.random.Generator) -> FactV1 | None:
    found = _sole_text(scene, "word", rng)
    if found is None:
        return None
    thing, english, chinese = found
    return FactV1(
        "category",
        f"What does the {english} name?",
        f"{chinese}指的是什么？",
        CATEGORY_OF[thing.name],
        tuple(CATEGORIES),
    )


@dataclass(frozen=True)
class Claim:
    """A yes/no question in two versions about the same matter, one true and one false."""

    topic: str
    true: str
    false: str
    chinese_true: str = ""
    chinese_false: str = ""


def _other(rng: np.random.Generator, domain, answer):
    return pick(rng, [v for v in domain if v != answer])


def claim_existence(scene: SceneV1, rng: np.random.Generator, style: str = "random") -> Claim | None:
    """ "Is there a red star?": the false object is drawn at random, among the scene's shapes ("popular"), or
    from a colour and a shape that are both there but not together ("adversarial").
    """
    present = {(t.colour, t.name) for t in scene.objects}
    if not present:
        return None
    colours = sorted({c for c, _ in present}) if style == "adversarial" else list(COLOURS)
    shapes = list(SHAPES) if style == "random" else sorted({s for _, s in present})
    absent = [(c, s) for c in colours for s in shapes if (c, s) not in present]
    absent = absent or [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in present]
    yes, no = pick(rng, sorted(present)), pick(rng, absent)
    ask = "Is there {} {} {} in the image?".format
    article = lambda colour: "an" if colour[0] in "aeiou" else "a"  # noqa: E731
    return Claim("existence", ask(article(yes[0]), *yes), ask(article(no[0]), *no))


def claim_colour(scene: SceneV1, rng: np.random.Generator) -> Claim | None:
    fact = colour(scene, rng)
    if fact is None:
        return None
    subject = fact.question.removeprefix("What color is ").removesuffix("?")
    return Claim(
        "color", f"Is {subject} {fact.answer}?", f"Is {subject} {_other(rng, fact.domain, fact.answer)}?"
    )


def claim_count(scene: SceneV1, rng: np.random.Generator) -> Claim | None:
    fact = count(scene, rng)
    if fact is None:
        return None
    subject = fact.question.removeprefix("How many ").removesuffix(" are there?")
    wrong = pick(rng, [n for n in fact.domain if 1 <= abs(int(n) - int(fact.answer)) <= 2])
    return Claim("count", f"Are there {fact.answer} {subject}?", f"Are there {wrong} {subject}?")


def claim_position(scene: SceneV1, rng: np.random.Generator) -> Claim | None:
    fact = relation(scene, rng)
    if fact is None:
        return None
    words = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
    head, tail = fact.question.removesuffix("?").split(
        " to the left or to the right of " if fact.answer in ("left", "right") else " above or below "
    )
    wrong = _other(rng, fact.domain, fact.answer)
    return Claim("position", f"{head} {words[fact.answer]} {tail}?", f"{head} {words[wrong]} {tail}?")


def claim_ocr(scene: SceneV1, rng: np.random.Generator) -> Claim | None:
    written = {t.name for t in scene.texts if t.kind == "word"}
    if not written:
        return None
    absent = pick(rng, [w for w in WORDS if w not in written])
    ask = "Is the word {} written in the image?".format
    return Claim("OCR", ask(pick(rng, sorted(written))), ask(absent))


def claim_category(scene: SceneV1, rng: np.random.Generator) -> Claim | None:
    fact = category(scene, rng)
    if fact is None:
        return None
    subject = fact.question.removeprefix("What does ").removesuffix(" name?")
    article = lambda noun: "an" if noun == "animal" else "a"  # noqa: E731
    wrong = _other(rng, fact.domain, fact.answer)
    return Claim(
        "commonsense_reasoning",
        f"Does {subject} name {article(fact.answer)} {fact.answer}?",
        f"Does {subject} name {article(wrong)} {wrong}?",
    )


def claim_translation(scene: SceneV1, rng: np.random.Generator) -> Claim | None:
    found = _sole_text(scene, "word", rng)
    if found is None:
        return None
    thing, english, _ = found
    ask = "Does the {} mean {} in Chinese?".format
    return Claim(
        "text_translation",
        ask(english, CHINESE[thing.name]),
        ask(english, CHINESE[_other(rng, WORDS, thing.name)]),
    )


def claim_sum(scene: SceneV1, rng: np.random.Generator) -> Claim | None:
    found = _sole_text(scene, "digit", rng)
    if found is None or found[0].name == "9":
        return None
    thing, english, _ = found
    right = int(thing.name) + 1
    ask = "Is the {} plus 1 equal to {}?".format
    return Claim("numerical_calculation", ask(english, right), ask(english, _other(rng, range(1, 10), right)))
