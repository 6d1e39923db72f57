"""Beside a leaderboard, in `evidence.md`, on data that says where its answers are: evidence recall, and
accuracy by regime and by kind of question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from harness.report import tables
from harness.report.tables import MISSING


def questions(records: Sequence[Mapping]) -> pd.DataFrame:
    """One row a question and cell of the cells that carry evidence. Columns: spec, budget, task, row, score
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
    """One row a method at a budget (and vanilla): recall, then accuracy by regime and by kind, means over the
    questions."""
    rows = {}
    for spec, own in found[found["budget"].isna() | (found["budget"] == budget)].groupby("spec", sort=False):
        rows[spec] = {"evidence recall": own["recall"].mean(), "not merged": own["recall_alone"].mean()}
        for column in ("regime", "kind"):
            means = own.groupby(column)["score"].mean()
            rows[spec] |= {name: means[name] for name in _order(found[column]) if name in means}
    return pd.DataFrame(rows).T.dropna(axis="columns", how="all")


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
