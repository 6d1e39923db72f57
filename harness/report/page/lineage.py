"""The page's section on published numbers: their tables beside ours, and where each figure comes from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from backbones import shapes
from harness import published
from harness.costs import fitted
from harness.costs.conventions import CONVENTIONS
from harness.published.arithmetic import average, average_range, follows, half_unit
from harness.published.schema import Accuracy, AuthorClaim, Efficiency, ScoreRow
from harness.report import prediction
from harness.report.tables import MISSING
from harness.tasks.suites import BENCHMARKS

STANDINGS = {"own": "the method's own paper", "rerun": "measured again by others", "copied": "copied"}


@dataclass(frozen=True)
class PublishedCell:
    """text: as printed. state: checked, other (others print another figure), or "". title: why."""

    text: str
    state: str = ""
    title: str = ""


def section(family: str, cells: Sequence[Mapping], board: Mapping[float, Mapping[str, float]] | None) -> dict:
    """What the template draws.

    Args:
        family: of the run's backbone; tables on backbones of other families are left out.
        cells: the run's records.
        board: of a board whose order may be held against LLaVA-1.5-7B's, by budget the average of each method
            at its default settings; else None.
    """
    registry = published.load()
    claims = [c for own in registry.claims.values() for c in own.rows]
    mine = [t for t in registry.accuracy.values() if _family(t.backbone) == family]
    costs = [t for t in registry.efficiency.values() if _family(t.backbone) == family]
    return {
        "beside": _beside(mine, cells),
        "order": _order(board) if board else [],
        "tables": [_table(table, claims) for table in mine],
        "claims": [_claim(c) for c in claims if _family(c.backbone) == family],
        "costs": [_costs(table) for table in costs],
    }


def _family(backbone: str) -> str:
    return shapes.load(backbone).family.model_type


def _title(task: str) -> str:
    return BENCHMARKS[task].title if task in BENCHMARKS else task


def _of(row: ScoreRow | AuthorClaim) -> str:
    rate = getattr(row, "pruning_rate", None)
    size = f"{row.tokens} tokens" if row.tokens else f"{rate:g} % pruned" if rate else ""
    return ", ".join(filter(None, (row.method + (f" {row.version}" if row.version else ""), size)))


def _beside(mine: Iterable[Accuracy], cells: Sequence[Mapping]) -> list[dict[str, str]]:
    """Cells that compare with a published one of the same backbone, task, method and budget."""
    found = []
    for record in cells:
        shape = shapes.named_like(record["backbone"]["name"])
        if record["status"] != "done" or shape is None or not record["data"].get("comparable_to_paper"):
            continue
        for table in mine:
            row = published.row_for(table, record["method"]["spec"], record["method"]["budget"])
            alike = table.backbone == shape.name and record["backbone"]["layers"] == shape.layers
            if not alike or row is None or record["task"] not in row.scores:
                continue
            low, high = record["metrics"]["interval"]
            found.append(
                {
                    "row": f"{table.place}: {_of(row)}",
                    "task": _title(record["task"]),
                    "theirs": f"{row.scores[record['task']]}",
                    "ours": f"{record['metrics']['score']:.1f}",
                    "interval": f"{low:.1f}–{high:.1f}",
                }
            )
    return found


def _order(board: Mapping[float, Mapping[str, float]]) -> list[dict[str, str]]:
    """Published averages and ours, by budget and in the published order."""
    rows = []
    for budget, ours in board.items():
        theirs = prediction.averages(budget)
        for method in sorted(theirs.keys() & ours.keys(), key=lambda m: -theirs[m]):
            numbers = {"theirs": f"{theirs[method]:.1f}", "ours": f"{ours[method]:.1f}"}
            rows.append({"budget": f"{budget:g}", "method": method, **numbers})
    return rows


def _table(table: Accuracy, claims: Sequence[AuthorClaim]) -> dict:
    rows, others = [], []
    for row in table.rows:
        second = [c for c in claims if _same_row(c, table, row)]
        cells = [asdict(_cell(row, task, second)) for task in table.tasks]
        mean = PublishedCell(MISSING) if row.average is None else _average(table, row)
        origin = STANDINGS.get(row.standing or "", "not known")
        origin += f": {row.copied_from}" if row.copied_from else ""
        rows.append(
            {"row": _of(row), "cells": cells, "average": asdict(mean), "origin": origin, "note": row.note}
        )
        others += _others(table, row)
    heads = [_title(task) for task in table.tasks]
    return {
        "title": f"{table.place} of {table.source.work}, {shapes.load(table.backbone).title}",
        "heads": heads, "rows": rows, "others": others,
    }  # fmt: skip


def _same_row(claim: AuthorClaim, table: Accuracy, row: ScoreRow) -> bool:
    """Whether a claim is about the row of the table, from another work."""
    ours, theirs = ((x.method, x.tokens, x.version) for x in (row, claim))
    return claim.backbone == table.backbone and ours == theirs and bool(row.tokens) and not claim.setting


def _cell(row: ScoreRow, task: str, second: Sequence[AuthorClaim]) -> PublishedCell:
    value = row.scores[task]
    for other in row.elsewhere:
        if other.column == task:
            note = f" ({other.note})" if other.note else ""
            return PublishedCell(f"{value}", "other", f"{other.value} in {other.by}{note}")
    for claim in second:
        theirs = claim.scores.get(task)
        if claim.standing == "rerun" or theirs is None:
            continue
        if abs(theirs - value) <= half_unit(theirs) + half_unit(value) + 1e-9:
            return PublishedCell(f"{value}", "checked", f"the same in {claim.source}")
    return PublishedCell(f"{value}")


def _average(table: Accuracy, row: ScoreRow) -> PublishedCell:
    """The printed average, and over which columns it follows."""
    vanilla = table.vanilla.scores
    text = f"{row.average}"
    if follows(*average_range(row.scores, vanilla), row.average):
        return PublishedCell(text, "checked", f"follows from the {len(row.scores)} cells")
    ours = f"{average(row, vanilla):.1f}"
    if row.average_over:
        further = ", ".join(_title(t) for t in row.average_over if t in row.further)
        why = (
            f"from the {len(row.scores)} cells {ours}; follows over {len(row.average_over)} columns, with "
            f"{further} of {row.further_source}"
        )
        return PublishedCell(text, "further", why)
    return PublishedCell(text, "other", f"does not follow: from the {len(row.scores)} cells {ours}")


def _others(table: Accuracy, row: ScoreRow) -> list[str]:
    """What is to be said of the row's cells and average, in sentences."""
    said, vanilla = [], table.vanilla.scores
    for other in row.elsewhere:
        stands = row.average if other.column == "average" else row.scores[other.column]
        text = f"{_of(row)}, {_title(other.column)}: {stands} here, {other.value} in {other.by}"
        text += f" ({other.note})" if other.note else ""
        if other.column != "average":
            theirs = average({**row.scores, other.column: other.value}, vanilla)
            text += f"; with it the row averages {theirs:.2f} instead of {average(row, vanilla):.2f}"
        said.append(f"{text}.")
    found = _average(table, row) if row.average is not None else PublishedCell("")
    if found.state in ("further", "other"):
        said.append(f"{_of(row)}, average {found.text}: {found.title}.")
    return said


def _claim(claim: AuthorClaim) -> dict[str, str]:
    scores = ", ".join(f"{_title(task)} {value}" for task, value in claim.scores.items())
    return {
        "row": _of(claim) + (f" ({claim.setting})" if claim.setting else ""),
        "standing": STANDINGS[claim.standing],
        "scores": scores + (f"; average {claim.average}" if claim.average is not None else ""),
        "source": claim.source,
        "checked": claim.checked or MISSING,
    }


def _costs(table: Efficiency) -> dict:
    """Rows of a table of costs, and those of another work beside them, with their parts where those are
    known."""
    known = fitted.published()
    split = {str(r["plan"]) + f"{r['total']:.1f}": r for r in known["rows"]}
    rows = []
    own = [(r, table.place, r.reading or r.plan) for r in table.rows]
    for row, source, plan in own + [(r, r.source, r.plan) for r in table.beside]:
        parts = split.get(f"{plan}{row.latency_ms:.1f}")
        rows.append(
            {
                "row": f"{row.method}, {row.tokens} tokens",
                "by": source,
                "ms": f"{row.latency_ms}",
                "split": MISSING
                if parts is None
                else " + ".join(f"{parts[p]}" for p in ("vision", "selection", "llm")),
                "tflops": f"{row.tflops}",
                "note": row.note,
            }
        )
    convention = CONVENTIONS.get(table.convention or "")
    lines = [
        f"Milliseconds are {table.measures}." if table.measures else "",
        f"{table.protocol}." if table.protocol else "",
    ]
    lines.append(
        f"FLOPs: {convention.rule} (the way of counting that gives most of them)." if convention else ""
    )
    return {
        "title": f"{table.place} of {table.source.work}, {table.device}",
        "rows": rows,
        "lines": [x for x in lines if x],
    }
