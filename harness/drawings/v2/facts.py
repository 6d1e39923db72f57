"""True things to ask about a scene of version 2, each with its evidence: the things that hold the answer.

`facts_of` lists them by kind; `KINDS` says what each kind asks. Objects are named by two attributes ("red
star", "striped star"), and only where no other object has the same two, so that a near-miss (one attribute in
common) is usually there, and a name never fits two things.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from harness.drawings.facts import CATEGORIES, CATEGORY_OF, CLEAR_GAP, plural
from harness.drawings.v2.scenes import COLOURS, DIGITS, SHAPES, TEXTURES, WORDS, Scene, Thing
from harness.drawings.vocabulary import CHINESE

#: What each kind of question asks.
KINDS = {
    "lookup": "an attribute of the object that two others name",
    "read": "the word or digit on an object, or beside it",
    "meaning": "what a word on an object names or means, or a digit plus one",
    "exists": "whether an object of three attributes is there, where near-misses are",
    "count": "how many objects have two attributes, among near-misses",
    "twins": "which color appears once among the objects of a shape, or how many colors do",
    "place": "in which half of the image an object lies",
    "relation": "on which side of another an object lies",
    "hop": "an attribute of the thing beside a word",
}
MOST_COUNTED = 5
NUMBERS = tuple(str(n) for n in range(1, MOST_COUNTED + 1))
#: Farthest that a thing may lie from the one it is "left of", "right of", "above" or "below", in pixels.
NEAR = 42
#: A centre this close to the middle, in pixels, lies in neither half.
MIDDLE = 21
#: Most things of a group that has to be looked at as a whole.
MOST_COMPARED = 6
#: Most near-misses of an absent object.
MOST_NEAR_MISSES = 4
DIRECTIONS = ("left", "right", "above", "below")
SIDE_OF = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
_SIDE_CN = {"left": "左边", "right": "右边", "above": "上面", "below": "下面"}
HALVES = (("left", "right"), ("top", "bottom"))
_HALVES_CN = ("左半边还是右半边", "上半部还是下半部")
#: Pairs of objects that are looked at for relations; a crowd has a thousand.
_PAIRS = 60


@dataclass(frozen=True)
class Fact:
    """A question about a scene with its answer.

    Attributes:
        kind: one of KINDS.
        topic: what is asked within the kind, as MMBench's column `category` has it.
        question: in English. chinese: in Chinese.
        answer: in one word.
        domain: every possible answer, the right one included.
        evidence: numbers of the scene's things that hold the answer.
        claim: a yes/no question with {} for the answer; empty where the question is one already.
    """

    kind: str
    topic: str
    question: str
    chinese: str
    answer: str
    domain: tuple[str, ...]
    evidence: tuple[int, ...]
    claim: str = ""

    def claims(self, other: str) -> tuple[str, str]:
        """The yes/no question that is true, and the one with another answer of the domain, which is not."""
        said = (lambda a: SIDE_OF[a]) if self.kind == "relation" else (lambda a: a)
        return self.claim.format(said(self.answer)), self.claim.format(said(other))


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _english(*words: str) -> str:
    return " ".join(words)


def _chinese(*words: str) -> str:
    return "的".join(CHINESE[w] for w in words)


def unique_names(scene: Scene) -> dict[int, tuple[str, str]]:
    """Objects that colour and shape name, by number: (English, Chinese)."""
    pairs = Counter((t.colour, t.name) for t in scene.objects)
    return {
        i: (_english(t.colour, t.name), _chinese(t.colour, t.name))
        for i, t in enumerate(scene.things)
        if not t.is_text and pairs[t.colour, t.name] == 1
    }


def written_on(scene: Scene) -> dict[int, int]:
    """The text on each object that has one: object's number -> text's."""
    return {t.host: i for i, t in enumerate(scene.things) if t.host >= 0}


def beside(scene: Scene) -> dict[tuple[int, str], int]:
    """(a thing's number, direction) -> the thing next to it that way, both of those that stand alone.

    Next is what three lines, from a quarter, the middle and three quarters of the thing's side, all meet
    first, within NEAR pixels.
    """
    alone = [(i, t.box) for i, t in enumerate(scene.things) if t.host < 0]
    if len(alone) < 2:
        return {}
    numbers = np.array([i for i, _ in alone])
    boxes = np.array([b for _, b in alone], float)
    found: dict[tuple[int, str], int] = {}
    low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    for k, own in enumerate(numbers):
        for direction in DIRECTIONS:
            axis = 0 if direction in ("left", "right") else 1
            ahead = direction in ("right", "below")
            gap = low[:, axis] - high[k, axis] if ahead else low[k, axis] - high[:, axis]
            met = set()
            for share in (0.25, 0.5, 0.75):
                line = low[k, 1 - axis] + share * boxes[k, 3 - axis]
                hit = (gap >= 0) & (low[:, 1 - axis] <= line) & (line < high[:, 1 - axis])
                hit[k] = False
                near = np.where(hit, gap, np.inf)
                met.add(int(near.argmin()) if near.min() <= NEAR else None)
            if len(met) == 1 and None not in met:
                found[int(own), direction] = int(numbers[met.pop()])
    return found


def _lookups(scene: Scene, _rng) -> Iterable[Fact]:
    objects = [(i, t) for i, t in enumerate(scene.things) if not t.is_text]
    by_colour_shape = Counter((t.colour, t.name) for _, t in objects)
    by_texture_shape = Counter((t.texture, t.name) for _, t in objects)
    by_texture_colour = Counter((t.texture, t.colour) for _, t in objects)
    for i, t in objects:
        if by_texture_shape[t.texture, t.name] == 1:
            name, chinese = _english(t.texture, t.name), _chinese(t.texture, t.name)
            yield Fact(
                "lookup", "colour", f"What color is the {name}?", f"{chinese}是什么颜色？", t.colour,
                tuple(COLOURS), (i,), f"Is the {name} {{}}?",
            )  # fmt: skip
        if by_texture_colour[t.texture, t.colour] == 1:
            name, chinese = _english(t.texture, t.colour), _chinese(t.texture, t.colour)
            yield Fact(
                "lookup", "shape", f"What shape is the {name} object?", f"{chinese}的物体是什么形状？",
                t.name, SHAPES, (i,), f"Is the {name} object a {{}}?",
            )  # fmt: skip
        if by_colour_shape[t.colour, t.name] == 1:
            name, chinese = _english(t.colour, t.name), _chinese(t.colour, t.name)
            yield Fact(
                "lookup", "texture", f"Is the {name} plain, striped or dotted?", f"{chinese}是什么图案？",
                t.texture, TEXTURES, (i,), f"Is the {name} {{}}?",
            )  # fmt: skip


def _reads(scene: Scene, _rng) -> Iterable[Fact]:
    names, on, next_to = unique_names(scene), written_on(scene), beside(scene)
    where = [(i, j, "on", "上") for i, j in on.items()]
    where += [(i, j, SIDE_OF[d], _SIDE_CN[d]) for (i, d), j in next_to.items() if scene.things[j].is_text]
    for i, j, place, place_cn in where:
        if i not in names:
            continue
        (name, chinese), text = names[i], scene.things[j]
        kind, kind_cn = ("word", "单词") if text.kind == "word" else ("digit", "数字")
        domain = WORDS if kind == "word" else DIGITS
        yield Fact(
            "read", f"read_{kind}", f"What {kind} is {place} the {name}?",
            f"{chinese}{place_cn}写的是什么{kind_cn}？", text.name, domain, (i, j),
            f"Is the {kind} {place} the {name} {{}}?",
        )  # fmt: skip


def _meanings(scene: Scene, _rng) -> Iterable[Fact]:
    names = unique_names(scene)
    for i, j in written_on(scene).items():
        if i not in names:
            continue
        (name, chinese), text = names[i], scene.things[j]
        if text.kind == "word":
            yield Fact(
                "meaning", "category", f"What does the word on the {name} name?",
                f"{chinese}上的单词指的是什么？", CATEGORY_OF[text.name], tuple(CATEGORIES), (i, j),
                f"Does the word on the {name} name this: {{}}?",
            )  # fmt: skip
            yield Fact(
                "meaning", "translation", f"What does the word on the {name} mean in Chinese?",
                f"{chinese}上的单词用中文怎么说？", CHINESE[text.name], tuple(CHINESE[w] for w in WORDS),
                (i, j), f"Does the word on the {name} mean {{}} in Chinese?",
            )  # fmt: skip
        elif text.name != "9":
            yield Fact(
                "meaning", "sum", f"What is the digit on the {name} plus 1?",
                f"{chinese}上的数字加一是多少？", str(int(text.name) + 1), DIGITS[1:], (i, j),
                f"Is the digit on the {name} plus 1 equal to {{}}?",
            )  # fmt: skip


def _look(t: Thing) -> tuple[str, str, str]:
    return t.texture, t.colour, t.name


def _exists(scene: Scene, rng: np.random.Generator) -> Iterable[Fact]:
    """Answers yes and no; what is absent has near-misses, things that share two of its three attributes."""
    objects = {i: _look(t) for i, t in enumerate(scene.things) if not t.is_text}
    present = Counter(objects.values())
    ask = "Is there {} {} in the image?".format
    for i, look in objects.items():
        if present[look] == 1:
            yield _existence(ask(article(look[0]), _english(*look)), look, "yes", (i,))
    absent: set[tuple[str, str, str]] = set()
    values = (TEXTURES, tuple(COLOURS), SHAPES)
    for look in present:
        for which in rng.integers(3, size=3):
            other = list(look)
            other[which] = values[which][int(rng.integers(len(values[which])))]
            absent.add(tuple(other))
    for look in sorted(absent - set(present)):
        near = tuple(i for i, own in objects.items() if sum(a == b for a, b in zip(own, look)) == 2)
        if 1 <= len(near) <= MOST_NEAR_MISSES:
            yield _existence(ask(article(look[0]), _english(*look)), look, "no", near)


def _existence(question: str, look: tuple[str, str, str], answer: str, evidence: tuple[int, ...]) -> Fact:
    chinese = f"图中有{_chinese(*look)}吗？"
    return Fact("exists", "existence", question, chinese, answer, ("yes", "no"), evidence)


def _counts(scene: Scene, _rng) -> Iterable[Fact]:
    objects = {i: t for i, t in enumerate(scene.things) if not t.is_text}
    for first in ("colour", "texture"):
        groups: dict[tuple[str, str], list[int]] = defaultdict(list)
        for i, t in objects.items():
            groups[getattr(t, first), t.name].append(i)
        for (value, shape), members in groups.items():
            near = any((getattr(t, first) == value) != (t.name == shape) for t in objects.values())
            if near and len(members) <= MOST_COUNTED:
                many = f"{value} {plural(shape)}"
                yield Fact(
                    "count", "count", f"How many {many} are there?",
                    f"有多少个{_chinese(value, shape)}？", str(len(members)), NUMBERS, tuple(members),
                    f"Is the number of {many} {{}}?",
                )  # fmt: skip


def _twins(scene: Scene, _rng) -> Iterable[Fact]:
    groups: dict[str, list[int]] = defaultdict(list)
    for i, t in enumerate(scene.things):
        if not t.is_text:
            groups[t.name].append(i)
    for shape, members in groups.items():
        colours = Counter(scene.things[i].colour for i in members)
        if not 3 <= len(members) <= MOST_COMPARED or len(colours) == len(members):
            continue
        single = [c for c, n in colours.items() if n == 1]
        many, chinese = plural(shape), CHINESE[shape]
        if len(single) == 1:
            yield Fact(
                "twins", "once", f"Which color appears only once among the {many}?",
                f"{chinese}中哪种颜色只出现一次？", single[0], tuple(COLOURS), tuple(members),
                f"Is the color that appears only once among the {many} {{}}?",
            )  # fmt: skip
        yield Fact(
            "twins", "distinct", f"How many colors do the {many} have?", f"{chinese}有多少种颜色？",
            str(len(colours)), NUMBERS, tuple(members), f"Is the number of colors of the {many} {{}}?",
        )  # fmt: skip


def _places(scene: Scene, _rng) -> Iterable[Fact]:
    for i, (name, chinese) in unique_names(scene).items():
        for axis, (at, size) in enumerate(zip(scene.things[i].centre, (scene.width, scene.height))):
            if abs(at - size / 2) >= MIDDLE:
                low, high = HALVES[axis]
                yield Fact(
                    "place", "place", f"Is the {name} in the {low} or the {high} half?",
                    f"{chinese}在{_HALVES_CN[axis]}？", low if at < size / 2 else high, (low, high), (i,),
                    f"Is the {name} in the {{}} half?",
                )  # fmt: skip


def _relations(scene: Scene, rng: np.random.Generator) -> Iterable[Fact]:
    names = unique_names(scene)
    numbers = list(names)
    if len(numbers) < 2:
        return
    for _ in range(min(_PAIRS, len(numbers) ** 2)):
        i, j = (numbers[int(k)] for k in rng.choice(len(numbers), 2, replace=False))
        dx, dy = (a - b for a, b in zip(scene.things[i].centre, scene.things[j].centre))
        sideways = abs(dx) > abs(dy)
        gap = dx if sideways else dy
        if abs(gap) < CLEAR_GAP:
            continue
        domain = DIRECTIONS[:2] if sideways else DIRECTIONS[2:]
        where = "to the left or to the right of" if sideways else "above or below"
        where_cn = "左边还是右边" if sideways else "上面还是下面"
        yield Fact(
            "relation", "relation", f"Is the {names[i][0]} {where} the {names[j][0]}?",
            f"{names[i][1]}在{names[j][1]}的{where_cn}？", domain[0] if gap < 0 else domain[1], domain,
            (i, j), f"Is the {names[i][0]} {{}} the {names[j][0]}?",
        )  # fmt: skip


def _hops(scene: Scene, _rng) -> Iterable[Fact]:
    said = Counter(t.name for t in scene.things if t.kind == "word")
    for (i, direction), j in beside(scene).items():
        word, thing = scene.things[i], scene.things[j]
        if word.kind != "word" or said[word.name] != 1 or thing.is_text:
            continue
        place, place_cn = SIDE_OF[direction], _SIDE_CN[direction]
        for topic, answer, domain in (
            ("color", thing.colour, tuple(COLOURS)),
            ("shape", thing.name, SHAPES),
        ):
            yield Fact(
                "hop", f"hop_{topic}", f"What {topic} is the object {place} the word {word.name}?",
                f"单词 {word.name} {place_cn}的物体是什么{'颜色' if topic == 'color' else '形状'}？", answer,
                domain, (i, j), f"Is the {topic} of the object {place} the word {word.name} {{}}?",
            )  # fmt: skip


_SAMPLERS: dict[str, Callable[[Scene, np.random.Generator], Iterable[Fact]]] = {
    "lookup": _lookups, "read": _reads, "meaning": _meanings, "exists": _exists, "count": _counts,
    "twins": _twins, "place": _places, "relation": _relations, "hop": _hops,
}  # fmt: skip


def facts_of(
    scene: Scene, rng: np.random.Generator, kinds: Sequence[str] = tuple(KINDS)
) -> dict[str, list[Fact]]:
    """Everything there is to ask about a scene, by kind (of relations and absent objects: a sample)."""
    return {kind: list(_SAMPLERS[kind](scene, rng)) for kind in kinds}


def roots(scene: Scene, evidence: Iterable[int]) -> frozenset[int]:
    """Numbers of the things that stand alone behind those of an evidence: a text's host in place of it."""
    return frozenset(i if scene.things[i].host < 0 else scene.things[i].host for i in evidence)
