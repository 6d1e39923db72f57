"""From lmms-eval's per-sample results to our number, its bootstrap units and the numbers beside it.

lmms-eval computes the official number of each benchmark. Here the same number is written as a function of
sums over clusters (for the bootstrap), and both must agree: `Scoring.score` raises if they do not. What is
peculiar to one benchmark stands in its file in `harness/tasks/benchmarks`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from harness.tasks.bootstrap import Statistic, Units

#: one document as lmms-eval's `samples` has it: doc (without media), filtered_resps, and a value per metric
Sample = Mapping[str, object]


@dataclass(frozen=True)
class Score:
    """One benchmark's score.

    Attributes:
        value: in the benchmark's unit.
        documents: score of each document, 0 to 1, in document order.
        units: what is resampled; the statistic of their summed counts is `value`.
        extra: numbers beside it.
    """

    value: float
    documents: list[float]
    units: Units
    extra: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Scoring:
    """How a benchmark is scored.

    Attributes:
        per_sample: (samples, groups, images) -> Score; groups: see `Benchmark.group_key`, images: identity of
            each image, all in document order.
        statistic: summed counts [R, F] -> scores [R].
        compared: (our score, lmms-eval's aggregated metrics) -> two numbers that must be equal.
    """

    per_sample: Callable[[Sequence[Sample], Sequence[object], Sequence[str]], Score]
    statistic: Statistic
    compared: Callable[[Score, Mapping[str, object]], tuple[float, float]]

    def score(
        self,
        samples: Sequence[Sample],
        groups: Sequence[object],
        images: Sequence[str],
        official: Mapping[str, object],
    ) -> Score:
        """The score; official: lmms-eval's aggregated metrics. Raises ArithmeticError when our sum does not
        give its number."""
        result = self.per_sample(samples, groups, images)
        ours, theirs = self.compared(result, official)
        if abs(ours - theirs) > 1e-6 * max(1.0, abs(theirs)):
            raise ArithmeticError(f"bootstrap statistic gives {ours}, lmms-eval {theirs}")
        return result

    def finish(
        self, documents: Sequence[float], units: Units, extra: dict[str, float] | None = None
    ) -> Score:
        """A Score whose value is the statistic over all units."""
        value = float(self.statistic(units.counts.sum(0, keepdims=True))[0])
        return Score(value, [float(d) for d in documents], units, extra or {})


def number(value: object) -> float:
    """lmms-eval puts an empty list where no document had the metric (MME without a cognition category)."""
    return float(value) if isinstance(value, (int, float, np.floating, np.integer)) else 0.0


def mean_percent(sums: np.ndarray) -> np.ndarray:
    """Statistic of counts (points, documents): mean in %."""
    return 100 * sums[:, 0] / sums[:, 1]


def _exact_match(samples, groups, images) -> Score:
    """Mean of the per-document score (exact match or VQA accuracy) in %, clustered by image."""
    each = np.array([float(s["exact_match"]) for s in samples])
    units = Units.gather(images, np.stack([each, np.ones_like(each)], 1))
    return EXACT_MATCH.finish(each, units)


EXACT_MATCH = Scoring(
    per_sample=_exact_match,
    statistic=mean_percent,
    compared=lambda s, m: (s.value, 100 * number(m["exact_match"])),
)
