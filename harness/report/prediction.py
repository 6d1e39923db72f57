"""The prediction index: how well a pocket board ranks methods as LLaVA-1.5-7B does in print.

Spearman's rank correlation between the board's averages and the published ones, over the methods that both
have. Two readings of the board: its default rows, and rows as the papers count tokens, where a method that
cuts inside of the language model has the budget on average over the layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from harness import published

BACKBONE, TABLE = "llava-1.5-7b", "table1"
#: a published row counts with so many of Table 1's benchmarks
FEWEST_SCORES = 5
#: how far, as a share of the budget, a row's mean over the layers may be from it to count as the papers do
TOLERANCE = 0.1
RESAMPLES = 2000


@dataclass(frozen=True)
class Index:
    """reading: `as published` or `default`. rho: nan for fewer than 3 methods. low, high: its 95 % interval
    over resampled methods."""

    reading: str
    budget: float
    methods: tuple[str, ...]
    rho: float
    low: float
    high: float

    def __str__(self) -> str:
        value = f"{self.rho:.2f}" if math.isfinite(self.rho) else "none"
        spread = f" ({self.low:.2f} to {self.high:.2f})" if math.isfinite(self.low) else ""
        names = f": {', '.join(self.methods)}" if self.methods else ""
        return f"{self.reading}, {self.budget:g} tokens: {value}{spread} over {len(self.methods)} rows{names}"


def averages(budget: float) -> dict[str, float]:
    """Published averages at a budget by method, in % of vanilla: Table 1's rows, then claims, first come."""
    registry = published.load()
    table = registry.accuracy[TABLE]
    vanilla = table.vanilla.scores
    found = {row.method: row.average for row in table.rows if row.tokens == budget}
    for claims in registry.claims.values():
        for row in claims.rows:
            shared = [task for task in row.scores if task in vanilla]
            if (row.backbone, row.tokens) != (BACKBONE, budget) or len(shared) < FEWEST_SCORES:
                continue
            mean = 100 * float(np.mean([row.scores[t] / vanilla[t] for t in shared]))
            found.setdefault(row.method, mean)
    return found


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation, ties at their mean rank; nan where one side does not vary."""
    x, y = (pd.Series(v).rank() for v in (x, y))
    if len(x) < 3 or x.nunique() < 2 or y.nunique() < 2:
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


def index(rows: Sequence[Mapping], budget: float, reading: str) -> Index:
    """rows: of the leaderboard's table: spec, budget, average, mean_over_layers."""
    theirs, ours = averages(budget), {}
    for row in rows:
        name, _, settings = str(row["spec"]).partition(":")
        average, mean = row.get("average", math.nan), row.get("mean_over_layers", math.nan)
        if name not in theirs or row["budget"] != budget or not math.isfinite(average):
            continue
        off = abs(mean / budget - 1)
        if reading == "default" and not settings:
            ours[name] = average
        elif reading == "as published" and off <= TOLERANCE and off < ours.get(name, (0, math.inf))[1]:
            ours[name] = average, off
    names = tuple(sorted(ours))
    board = [ours[n] if reading == "default" else ours[n][0] for n in names]
    print_ = [theirs[n] for n in names]
    rng, draws = np.random.default_rng(0), []
    for _ in range(RESAMPLES if len(names) >= 3 else 0):
        picked = rng.integers(len(names), size=len(names))
        draws.append(spearman([board[i] for i in picked], [print_[i] for i in picked]))
    draws = [d for d in draws if math.isfinite(d)]
    low, high = np.percentile(draws, (2.5, 97.5)) if draws else (math.nan, math.nan)
    return Index(reading, budget, names, spearman(board, print_), float(low), float(high))


def indices(table: pd.DataFrame, budgets: Sequence[float]) -> list[Index]:
    """Both readings at each budget for which there are published averages."""
    rows = table.to_dict("records")
    known = [b for b in sorted(budgets, reverse=True) if averages(b)]
    return [index(rows, b, reading) for b in known for reading in ("as published", "default")]


def render(table: pd.DataFrame, budgets: Sequence[float]) -> str:
    """A paragraph for below the leaderboard; empty where nothing was published at its budgets."""
    found = indices(table, budgets)
    if not found:
        return ""
    head = "Prediction index: Spearman with the published averages of LLaVA-1.5-7B (95 % over rows):"
    return "\n".join([head, *(f"- {one}" for one in found)]) + "\n"
