"""Bootstrap intervals for scores that are functions of sums over clusters.

Every score of the eight benchmarks is such a function: a mean is (sum, count), POPE's F1 needs true/false
positives and negatives a category, MME points need sums a category. So one resampling routine serves all, and
two methods on the same documents can be compared with the same resamples (same seed, same clusters).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

#: with fewer resampled clusters in a task a bootstrap tells nothing apart
FEWEST_CLUSTERS = 10
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


def resampled_sums(units: Units, resamples: int, seed: int | Sequence[int]) -> np.ndarray:
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


def stream(units: Units, seed: int) -> list[int]:
    """A seed of its own for these clusters: tasks that share their clusters (one set of questions in two
    languages) share the resamples too, all others are drawn independently of each other."""
    body = "\x1f".join(units.keys).encode()
    return [seed, int.from_bytes(hashlib.sha256(body).digest()[:8], "big")]


def sums_of_many(several: Sequence[Units], resamples: int, seed: int | Sequence[int]) -> list[np.ndarray]:
    """`resampled_sums` of each, for units with equal keys and strata, drawn once for all."""
    first = several[0]
    if any((u.keys, u.strata) != (first.keys, first.strata) for u in several):
        raise ValueError("only units of the same clusters can share resamples")
    joint = Units(first.keys, np.concatenate([u.counts for u in several], 1), first.strata)
    edges = np.cumsum([u.counts.shape[1] for u in several])[:-1]
    return np.split(resampled_sums(joint, resamples, seed), edges, axis=1)


def paired_p_values(points: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Two-sided p-values that two of M scores differ, [M, M] float64, from their paired bootstrap.

    points: the scores, [M]. draws: their resamples, [M, R], column r from the same clusters for all. The
    difference is taken as normal with the spread of its resamples, since the tail that a correction for
    many comparisons asks about is thinner than R resamples resolve.
    """
    draws = draws[:, np.isfinite(draws).all(0)]
    difference = np.abs(points[:, None] - points[None, :])
    if draws.shape[1] < 2:
        return np.ones_like(difference)
    # rows are the same documents' scores: var(a - b) = var(a) + var(b) - 2 cov(a, b)
    covariance = np.cov(draws) if len(points) > 1 else np.zeros((1, 1))
    variance = np.diag(covariance)
    spread = np.sqrt(np.maximum(variance[:, None] + variance[None, :] - 2 * covariance, 0))
    # where no resample ever differs, only equal scores are alike
    z = np.divide(difference, spread, out=np.where(difference > 1e-9, np.inf, 0.0), where=spread > 1e-9)
    # twice the normal's upper tail; scipy.stats would take a second to import
    return np.array([[math.erfc(value / math.sqrt(2)) for value in row] for row in z])


def holm(p_values: Sequence[float]) -> np.ndarray:
    """p-values corrected for their number (Holm 1979, Scand. J. Statistics 6, the step-down procedure)."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(stepped, 1)
    return corrected


def groups(points: np.ndarray, draws: np.ndarray, level: float = 0.05) -> list[str]:
    """Letters, one text per score: two scores share a letter exactly if they cannot be told apart at `level`
    by the paired bootstrap, corrected by Holm for all pairs. "a" holds the best score.
    """
    import networkx

    m = len(points)
    pairs = [(i, j) for i in range(m) for j in range(i)]
    p = paired_p_values(points, draws)
    corrected = holm([p[pair] for pair in pairs]) if pairs else []
    graph = networkx.Graph([pair for pair, value in zip(pairs, corrected) if value >= level])
    graph.add_nodes_from(range(m))
    order = {i: place for place, i in enumerate(np.argsort(-points, kind="stable").tolist())}
    cliques = sorted(sorted(order[i] for i in clique) for clique in networkx.find_cliques(graph))
    letters: dict[int, str] = dict.fromkeys(range(m), "")
    for number, clique in enumerate(cliques):
        for place in clique:
            letters[place] += _letter(number)
    return [letters[order[i]] for i in range(m)]


def _letter(number: int) -> str:
    """a ... z, then a' ... z', and so on."""
    return chr(ord("a") + number % 26) + "'" * (number // 26)
