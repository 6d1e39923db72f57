"""Bootstrap intervals for scores that are functions of sums over clusters.

Every score of the eight benchmarks is such a function: a mean is (sum, count), POPE's F1 needs true/false
positives and negatives a category, MME points need sums a category. So one resampling routine serves all, and
two methods on the same documents can be compared with the same resamples (same seed, same clusters).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

#: features summed over clusters [R, F] float64 -> scores [R] float64
Statistic = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Units:
    """What is resampled: `counts` [clusters, F] float64 summed within each cluster; `strata`, one label a
    cluster.

    Clusters are documents that do not vary independently (questions on one image, rotations of one question).
    Resampling is done within each stratum, which a benchmark's fixed categories are.
    """

    keys: tuple[str, ...]
    counts: np.ndarray
    strata: tuple[Hashable, ...]

    @classmethod
    def gather(
        cls, keys: Sequence[Hashable], counts: np.ndarray, strata: Sequence[Hashable] | None = None
    ) -> Units:
        """Sum the documents' `counts` [documents, F] over equal `keys`; order of first appearance."""
        place: dict[Hashable, int] = {}
        for key in keys:
            place.setdefault(key, len(place))
        total = np.zeros((len(place), counts.shape[1]))
        np.add.at(total, [place[k] for k in keys], counts)
        labels: list[Hashable] = [None] * len(place)
        for key, stratum in zip(keys, strata if strata is not None else [0] * len(keys)):
            labels[place[key]] = stratum
        return cls(tuple(str(k) for k in place), total, tuple(labels))


def resampled_sums(units: Units, resamples: int, seed: int) -> np.ndarray:
    """Sums of `counts` over `resamples` stratified cluster resamples, [resamples, F] float64.

    Chunked, so that memory stays bounded for hundreds of thousands of clusters.
    """
    rng = np.random.default_rng(seed)
    sums = np.zeros((resamples, units.counts.shape[1]))
    for stratum in dict.fromkeys(units.strata):
        counts = units.counts[[s == stratum for s in units.strata]]
        n = len(counts)
        chunk = max(1, 4_000_000 // n)
        for start in range(0, resamples, chunk):
            size = min(chunk, resamples - start)
            weights = rng.multinomial(n, np.full(n, 1 / n), size=size)
            sums[start : start + size] += weights @ counts
    return sums


def interval(
    units: Units, statistic: Statistic, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of `statistic` at `level` (Efron & Tibshirani 1993, section 13.3)."""
    scores = statistic(resampled_sums(units, resamples, seed))
    low, high = np.percentile(scores, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)
