"""Version 2's documents: facts of a scene as rows in the schemas of the eight benchmarks.

Prompts and answers are version 1's (`harness.pocket.data.documents.prompt` and `target`), the rows have five
more columns: `kind`, `chance` (of a guess among the possible answers), `regime`, `evidence` (boxes of the
things that hold the answer: left, top, width, height as shares of the image) and `things` (boxes of all).
The benchmarks' own code reads none of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from harness.pocket.data.documents import (
    LETTERS,
    POPE_STYLES,
    TASKS,
    YES_NO,
    Row,
    in_chinese,
    options_of,
)
from harness.pocket.data.facts import pick
from harness.pocket.data.v2.facts import Fact, facts_of, roots
from harness.pocket.data.v2.scenes import Scene, shares

__all__ = ["MME_CATEGORIES", "POPE_STYLES", "TASKS", "Interview"]

#: Kinds of questions that each task asks; MME's and POPE's follow from their categories.
ASKED = {
    "gqa": ("lookup", "relation", "place", "hop"),
    "mmbench_en": ("lookup", "relation", "place", "count", "twins", "read", "meaning", "hop"),
    "mmbench_cn": ("lookup", "relation", "place", "count", "twins", "read", "meaning", "hop"),
    "scienceqa": ("meaning", "read", "count", "twins", "lookup"),
    "vqav2": ("count", "twins", "lookup", "exists"),
    "textvqa": ("read",),
}
#: MME's categories: kind and topics of the facts behind each.
MME_CATEGORIES = {
    "existence": ("exists", ("existence",)),
    "count": ("count", ("count",)),
    "position": ("relation", ("relation",)),
    "color": ("lookup", ("colour",)),
    "OCR": ("read", ("read_word",)),
    "commonsense_reasoning": ("meaning", ("category",)),
    "text_translation": ("meaning", ("translation",)),
    "numerical_calculation": ("meaning", ("sum",)),
}
_L2 = {
    "relation": "finegrained_perception (cross-instance)",
    "twins": "finegrained_perception (cross-instance)",
    "hop": "relation_reasoning",
    "meaning": "logic_reasoning",
    "read": "finegrained_perception (instance-level)",
}
#: How often an answer may have been given more than the rarest of its topic.
LEAD = 2
_HINTS = ("", "The image shows objects and written words.", "A scene with objects.")


def options_in(options: Sequence[str], chinese: bool) -> list[str]:
    """Options as a benchmark in that language shows them."""
    halves = {"top": "上半部", "bottom": "下半部"}
    return [halves.get(o) or in_chinese(o) for o in options] if chinese else list(options)


def _chance(task: str, row: Row, fact: Fact) -> float:
    """Share of right answers of somebody who guesses among the possible ones (MMBench: in every rotation)."""
    if task.startswith("mmbench"):
        options = sum(row[letter] != "nan" for letter in LETTERS)
        return options ** -float(options)
    if task == "scienceqa":
        return 1 / len(row["choices"])
    said = row.get("multiple_choice_answer", row.get("answer"))
    return 1 / len(fact.domain) if said in fact.domain else 0.5


class Interview:
    """The questions that are asked about one scene.

    disjoint: no two of them share a thing of their evidence. tally: how often each kind was asked, and each
    answer given to each topic; the rarest comes next, so that no answer can be guessed. Hand one tally to
    many interviews.
    """

    def __init__(
        self,
        scene: Scene,
        rng: np.random.Generator,
        tally: Counter | None = None,
        disjoint: bool = True,
    ) -> None:
        self.scene, self.rng, self.disjoint = scene, rng, disjoint
        self.tally = Counter() if tally is None else tally
        self.facts = facts_of(scene, rng)
        self.used: set[int] = set()

    def ask(self, task: str, category: str | None = None) -> list[Row]:
        """One question of a task as its rows (MMBench: all rotations, MME: both claims); [] if there is none
        left. category: of MME or POPE; None: any."""
        maker = getattr(self, f"_{task.partition('_')[0]}")
        fact_rows = maker(task, category)
        return [row | self._columns(fact, _chance(task, row, fact)) for row, fact in fact_rows]

    def _columns(self, fact: Fact, chance: float) -> Row:
        things = self.scene.things
        return dict(
            kind=fact.kind,
            chance=chance,
            regime=self.scene.regime,
            evidence=[list(b) for b in shares(self.scene, (things[i] for i in fact.evidence))],
            things=[list(b) for b in shares(self.scene, self.scene.alone)],
        )

    def fact(
        self,
        task: str,
        kinds: Sequence[str],
        topics: Sequence[str] = (),
        answer: str | None = None,
        near: int | None = None,
    ) -> Fact | None:
        """One that is left: of the kind asked least so far, and of its topics and answers the one given
        least. An answer that is ahead of the rarest of its topic by LEAD is not given again.

        near: of an absent object, how many near-misses it shall have (3: or more), where there is one.
        """
        for kind in sorted(kinds, key=lambda k: (self.tally[k], self.rng.random())):
            free = [
                f
                for f in self.facts[kind]
                if (not topics or f.topic in topics)
                and answer in (None, f.answer)
                and not (self.disjoint and roots(self.scene, f.evidence) & self.used)
            ]
            if near is not None:
                free = [f for f in free if min(len(f.evidence), 3) == near] or free
            groups: dict[tuple[str, str, tuple[str, ...], str], list[Fact]] = {}
            for f in free:
                if answer is not None or self._given(task, f, f.answer) < LEAD + min(
                    self._given(task, f, a) for a in f.domain
                ):
                    groups.setdefault((task, f.topic, f.domain, f.answer), []).append(f)
            if not groups:
                continue
            key = min(groups, key=lambda k: (self.tally[k[:3]], self.tally[k], self.rng.random()))
            found = pick(self.rng, groups[key])
            self.tally.update((kind, key[:3], key))
            self.used |= roots(self.scene, found.evidence)
            return found
        return None

    def _given(self, task: str, fact: Fact, answer: str) -> int:
        return self.tally[task, fact.topic, fact.domain, answer]

    def _even(self, *names: str, among: Sequence = ("yes", "no")):
        """The one of `among` that this was asked for least often so far."""
        found = min(among, key=lambda a: (self.tally[(*names, a)], self.rng.random()))
        self.tally[(*names, found)] += 1
        return found

    def _other(self, fact: Fact) -> str:
        return pick(self.rng, [v for v in fact.domain if v != fact.answer])

    def _gqa(self, task: str, _category) -> list[tuple[Row, Fact]]:
        fact = self.fact(task, ASKED[task])
        if fact is None:
            return []
        types = {
            "structural": "choose" if len(fact.domain) <= 3 else "query",
            "semantic": "rel" if fact.kind in ("relation", "hop") else "attr",
            "detailed": fact.topic,
        }
        row = dict(question=fact.question, answer=fact.answer, fullAnswer=fact.answer, types=types)
        return [(row, fact)]

    def _vqav2(self, task: str, _category) -> list[tuple[Row, Fact]]:
        fact = self.fact(task, ASKED[task])
        if fact is None:
            return []
        question, answer = fact.question, fact.answer
        kind = {"count": "number", "exists": "yes/no"}.get(fact.kind, "other")
        if fact.topic == "distinct":
            kind = "number"
        if kind == "other" and self.rng.random() < 0.25:
            answer, kind = self._even(task, "claim"), "yes/no"
            question = fact.claims(self._other(fact))[0 if answer == "yes" else 1]
        answers = [dict(answer=answer, answer_confidence="yes", answer_id=i + 1) for i in range(10)]
        row = dict(
            question=question,
            answers=answers,
            multiple_choice_answer=answer,
            answer_type=kind,
            question_type=" ".join(question.split()[:2]).lower(),
        )
        return [(row, fact)]

    def _textvqa(self, task: str, _category) -> list[tuple[Row, Fact]]:
        fact = self.fact(task, ASKED[task])
        if fact is None:
            return []
        question = fact.question.lower()
        row = dict(
            question=question,
            question_tokens=question.rstrip("?").split(),
            answers=[fact.answer] * 10,
            ocr_tokens=[t.name.upper() for t in self.scene.things if t.is_text],
        )
        return [(row, fact)]

    def _pope(self, task: str, category) -> list[tuple[Row, Fact]]:
        """Absent objects by their near-misses: random one, popular two, adversarial more, where there are."""
        style = category or pick(self.rng, POPE_STYLES)
        answer = min(("yes", "no"), key=lambda a: (self.tally[task, style, a], self.rng.random()))
        fact = self.fact(
            task, ("exists",), (), answer, None if answer == "yes" else POPE_STYLES.index(style) + 1
        )
        if fact is None:
            return []
        self.tally[task, style, answer] += 1
        return [(dict(question=fact.question, answer=fact.answer, category=style), fact)]

    def _mme(self, task: str, category) -> list[tuple[Row, Fact]]:
        category = category or pick(self.rng, list(MME_CATEGORIES))
        kind, topics = MME_CATEGORIES[category]
        if kind == "exists":
            yes = self.fact(task, (kind,), topics, "yes")
            no = yes and self.fact(task, (kind,), topics, "no")
            if no is None:
                return []
            pair = ((yes.question, "Yes", yes), (no.question, "No", no))
        else:
            fact = self.fact(task, (kind,), topics)
            if fact is None:
                return []
            true, false = fact.claims(self._other(fact))
            pair = ((true, "Yes", fact), (false, "No", fact))
        return [(dict(question=q + YES_NO, answer=a, category=category), f) for q, a, f in pair]

    def _mmbench(self, task: str, _category) -> list[tuple[Row, Fact]]:
        """One base question as its circular copies: rotation r is row r."""
        chinese = task.endswith("cn")
        fact = self.fact(task, ASKED[task])
        if fact is None:
            return []
        options = options_of(fact, self.rng)
        rows = []
        for r in range(len(options)):
            rotated = options[r:] + options[:r]
            shown = options_in(rotated, chinese)
            row = dict(
                question=fact.chinese if chinese else fact.question,
                hint=None,
                answer=LETTERS[rotated.index(fact.answer)],
                **dict(zip(LETTERS, shown + ["nan"] * 4)),
                category=fact.topic,
                **{"L2-category": _L2.get(fact.kind, "attribute_reasoning"), "comment": "nan"},
                source="pocket-8",
            )
            rows.append((row, fact))
        return rows

    def _scienceqa(self, task: str, _category) -> list[tuple[Row, Fact]]:
        fact = self.fact(task, ASKED[task])
        if fact is None:
            return []
        choices = [o for o in options_of(fact, self.rng) if o != fact.answer]
        place = self._even(task, f"letter of {len(choices) + 1}", among=range(len(choices) + 1))
        choices.insert(place, fact.answer)
        row = dict(
            question=fact.question,
            choices=choices,
            answer=choices.index(fact.answer),
            hint=pick(self.rng, _HINTS),
            topic=fact.topic,
        )
        return [(row, fact)]
