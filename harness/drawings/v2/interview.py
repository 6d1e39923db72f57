"""Questions about a scene of version 2, whatever the benchmark: which fact is asked next.

Prompts and answers are version 1's (`harness.drawings.drawing.Drawing`), the rows have five more columns:
`kind`, `chance` (of a guess among the possible answers), `regime`, `evidence` (boxes of the things that hold
the answer: left, top, width, height as shares of the image) and `things` (boxes of all). The benchmarks' own
code reads none of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from harness.drawings.v2.facts import Fact, facts_of, roots
from harness.drawings.v2.scenes import Scene, shares
from harness.drawings.wording import Row, pick

#: How often an answer may have been given more than the rarest of its topic.
LEAD = 2


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

    def ask(self, task: str, drawing, category: str | None = None) -> list[Row]:
        """One question of a task as its rows (MMBench: all rotations, MME: both claims); [] if there is none
        left. drawing: the task's (`harness.drawings.drawing.Drawing`). category: one of its categories; None:
        any."""
        asked = drawing.asked(self, task, category)
        return [row | self._columns(fact, drawing.chance(row, fact)) for row, fact in asked]

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

    def even(self, *names: str, among: Sequence = ("yes", "no")):
        """The one of `among` that this was asked for least often so far."""
        found = min(among, key=lambda a: (self.tally[(*names, a)], self.rng.random()))
        self.tally[(*names, found)] += 1
        return found

    def other(self, fact: Fact) -> str:
        """A wrong answer."""
        return pick(self.rng, [v for v in fact.domain if v != fact.answer])
