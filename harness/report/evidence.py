"""Beside a leaderboard, in `evidence.md`, on data that says where its answers are: evidence recall, and
accuracy by regime and by kind of question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from harness.report import tables
from harness.report.tables import MISSING
from harness.tasks.bootstrap import FEWEST_CLUSTERS

#: of the images, for intervals of a part of the questions
RESAMPLES = 1000


def questions(records: Sequence[Mapping]) -> pd.DataFrame:
    """One row per question and cell of the cells that carry evidence. Columns: spec, budget, task, row, score
    (in %, of its own answer), recall, recall_alone (in %), kind, chance (in %), regime."""
    frames = []
    for record in records:
        documents = record.get("documents", {})
        if record["status"] != "done" or "recall" not in documents:
            continue
        names = ("row", "score", "recall", "recall_alone", "kind", "chance", "regime")
        frame = pd.DataFrame({name: documents.get(name, np.nan) for name in names})
        recalls = ["recall", "recall_alone"]
        frame[recalls] = frame[recalls].astype(float)
        frame[["score", *recalls, "chance"]] *= 100
        method = record["method"]
        frames.append(frame.assign(spec=method["spec"], budget=method["budget"], task=record["task"]))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def table(found: pd.DataFrame, budget: float) -> pd.DataFrame:
    """One row per method and budget (and vanilla): recall, then accuracy by regime and by kind, means over
    the questions."""
    rows = {}
    for spec, own in found[found["budget"].isna() | (found["budget"] == budget)].groupby("spec", sort=False):
        rows[spec] = {"evidence recall": own["recall"].mean(), "not merged": own["recall_alone"].mean()}
        for column in ("regime", "kind"):
            means = own.groupby(column)["score"].mean()
            rows[spec] |= {name: means[name] for name in _order(found[column]) if name in means}
    return pd.DataFrame(rows).T.dropna(axis="columns", how="all")


def parts(found: pd.DataFrame, images: Mapping[tuple[str, int], str]) -> pd.DataFrame:
    """Accuracy (%) of each method on each part of the questions, with a 95 % interval by the bootstrap over
    images. Rows: spec, budget, part (`regime` or `kind`), name, score, low, high; regimes first.

    Args:
        found: of `questions`.
        images: the image of each (task, row); questions on one image are drawn together.
    """
    asked = found.assign(
        image=[images[q] for q in zip(found["task"], found["row"])],
        method=[f"{spec} {budget}" for spec, budget in zip(found["spec"], found["budget"])],
    )
    of = {m: pair for m, *pair in asked[["method", "spec", "budget"]].drop_duplicates().values}
    rows = []
    for part in ("regime", "kind"):
        for name in _order(asked[part]):
            own = asked[asked[part] == name].groupby(["image", "method"])["score"].agg(["sum", "count"])
            sums, counts = (own[c].unstack(fill_value=0) for c in ("sum", "count"))
            low, high = _bounds(sums.to_numpy(float), counts.to_numpy(float))
            for i, method in enumerate(sums):
                score = sums[method].sum() / counts[method].sum()
                rows.append((*of[method], part, name, score, low[i], high[i]))
    return pd.DataFrame(rows, columns=["spec", "budget", "part", "name", "score", "low", "high"])


def _bounds(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[2, methods]: 95 % of the means over resampled images; nan for too few of them. sums, counts: [images,
    methods]."""
    n = len(sums)
    if n < FEWEST_CLUSTERS:
        return np.full((2, sums.shape[1]), np.nan)
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(float)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nanpercentile((drawn @ sums) / (drawn @ counts), [2.5, 97.5], axis=0)


def _order(column: pd.Series) -> list[str]:
    """Regimes from sparse to dense, kinds by alphabet."""
    return sorted(column.unique(), key=lambda name: (name != "sparse", name != "medium", name))


def render(records: Sequence[Mapping], budgets: Sequence[float]) -> str:
    """Markdown; empty for data without evidence."""
    found = questions(records)
    if found.empty:
        return ""
    parts = [
        "# Where the answers are",
        "",
        "Evidence recall: the share, in %, of the visual tokens that hold a question's answer and reached "
        "the last layer, by themselves or merged into another one that did; not merged: the former alone. "
        "Then the share of right answers, in "
        "%, by the scene's regime and by the question's kind, over the questions of all tasks (no mean of "
        "tasks).",
    ]
    for budget in sorted(budgets, reverse=True):
        body = table(found, budget)
        rows = [
            {"method": spec} | {head: MISSING if np.isnan(v) else f"{v:.1f}" for head, v in own.items()}
            for spec, own in body.iterrows()
        ]
        parts += ["", f"Budget {budget:g}", "", tables.markdown(rows)]
    return "\n".join(parts) + "\n"
