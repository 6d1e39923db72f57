"""What printed numbers say of each other: as precise as they are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from harness.published.schema import ScoreRow


def half_unit(value: float) -> float:
    """Half of the last printed digit: 63.0 -> 0.05, 1862 -> 0.5."""
    return 0.5 * 10.0 ** -len(repr(value).partition(".")[2])


def average(
    row: ScoreRow | Mapping[str, float], vanilla: Mapping[str, float], tasks: Sequence[str] = ()
) -> float:
    """Mean over the tasks of score / vanilla's, in %."""
    scores = row.scores if isinstance(row, ScoreRow) else row
    tasks = tasks or list(scores)
    return 100 * sum(scores[t] / vanilla[t] for t in tasks) / len(tasks)


def average_range(
    scores: Mapping[str, float], vanilla: Mapping[str, float], tasks: Sequence[str] = ()
) -> tuple[float, float]:
    """Lowest and highest average (%) of scores that round to the printed ones."""
    tasks = tasks or list(scores)
    if scores == vanilla:  # a row against itself: numerator and denominator are one number
        return 100.0, 100.0
    bounds = []
    for sign in (-1, 1):
        pairs = [
            (scores[t] + sign * half_unit(scores[t]), vanilla[t] - sign * half_unit(vanilla[t]))
            for t in tasks
        ]
        bounds.append(100 * sum(a / b for a, b in pairs) / len(pairs))
    return bounds[0], bounds[1]


def follows(low: float, high: float, printed: float) -> bool:
    """Whether some value between low and high rounds to `printed`."""
    slack = half_unit(printed) + 1e-9
    return low - slack <= printed <= high + slack
