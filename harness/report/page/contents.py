"""What a run's page shows, gathered from the run: rows, pairs of methods, hard questions, evidence and parts
of the questions, the explorer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from harness.report import evidence, numbers, page, tables
from harness.report.page import lineage
from harness.store import records
from harness.store.journal import Answer, Journal
from harness.tasks.bootstrap import holm, paired_p_values

#: differences are called significant below this, after Holm's correction
LEVEL = 0.05


def acts(spec: str) -> tuple[str, str]:
    """Where a method acts (before, inside, none: of the language model), and its footnote."""
    from methods import registry
    from methods.base import Pruner

    pruner = registry.build(spec)
    inside = type(pruner).stages is not Pruner.stages
    return ("none" if pruner.name == "vanilla" else "inside" if inside else "before"), pruner.note


def roles(table: pd.DataFrame) -> dict[str, tuple[str, str, str]]:
    """By method: its role in the table (reference, method, control, answer key), where it acts, its
    footnote."""
    found = {}
    for row in table.to_dict("records"):
        name = row["spec"].partition(":")[0]
        found[row["method"]] = (
            "answer key" if name in numbers.ANSWER_KEYS else row["kind"],
            *acts(row["spec"]),
        )
    return found


def pairs(table: pd.DataFrame, means: Mapping[tuple, numbers.Average]) -> dict[float, dict]:
    """By budget: the methods, and for each pair [difference of the averages, low, high, p, significant]; p is
    corrected by Holm for all pairs of the budget."""
    found = {}
    for block, rows in table[table["budget"].notna()].groupby("block", sort=False):
        able = [r for r in rows.to_dict("records") if means[r["spec"], r["budget"]].point is not None]
        if len(able) < 2:
            continue
        own = [means[r["spec"], r["budget"]] for r in able]
        points, draws = np.array([m.point for m in own]), np.stack([m.draws for m in own])
        places = [(i, j) for i in range(len(own)) for j in range(i)]
        p = paired_p_values(points, draws)
        corrected = dict(zip(places, holm([p[place] for place in places])))
        cells: list[list] = [[None] * len(own) for _ in own]
        for (i, j), value in corrected.items():
            low, high = np.nanpercentile(draws[i] - draws[j], [2.5, 97.5])
            difference, sure = float(points[i] - points[j]), bool(value < LEVEL)
            cells[i][j] = [difference, float(low), float(high), float(value), sure]
            cells[j][i] = [-difference, -float(high), -float(low), float(value), sure]
        found[block] = {"methods": [r["method"] for r in able], "cells": cells}
    return found


def scores_by_question(records: Iterable[Mapping]) -> dict[tuple, dict[tuple[str, int], float]]:
    """By (spec, budget), then by (task, row): each document's score, 0 to 1."""
    found: dict[tuple, dict] = {}
    for record in records:
        if record["status"] == "done":
            own = found.setdefault((record["method"]["spec"], record["method"]["budget"]), {})
            documents = record["documents"]
            own |= {(record["task"], row): s for row, s in zip(documents["row"], documents["score"])}
    return found


def with_hard(table: pd.DataFrame, records: Iterable[Mapping]) -> pd.DataFrame:
    """The table with a column `hard`: accuracy on the block's hard questions (`page.hard`), where
    `downsample` is in it."""
    scores = scores_by_question(records)
    vanilla = scores.get(("vanilla", None))
    column = pd.Series(np.nan, index=table.index, dtype=float)
    for block, rows in table.groupby("block", sort=False):
        reduced = scores.get(("downsample", block))
        if vanilla is None or reduced is None:
            continue
        shared = [q for q in vanilla if q in reduced]
        own = {
            place: [of[q] for q in shared]
            for place, row in rows.iterrows()
            if (of := scores.get((row["spec"], None if pd.isna(row["budget"]) else row["budget"])))
            and all(q in of for q in shared)
        }
        for place, value in page.hard(
            own, [vanilla[q] for q in shared], [reduced[q] for q in shared]
        ).items():
            column[place] = value
    return table.assign(hard=column)


def with_evidence(
    table: pd.DataFrame, records: Sequence[Mapping], images: Mapping[tuple[str, int], str]
) -> tuple[pd.DataFrame, list[dict]]:
    """The table with columns `capped` (answers as long as they may be, where there are any), and on data that
    says where its answers are `recall`, `recall_alone` and accuracy by regime and by kind of question; and
    the columns that can be chosen of these.

    Args:
        images: see `evidence.parts`.
    """
    capped: dict[tuple, int] = {}
    for r in records:
        own = r["method"]["spec"], r["method"]["budget"]
        capped[own] = capped.get(own, 0) + (r.get("answers_at_cap") or 0)
    places = [(row["spec"], numbers.budget_of(row)) for row in table.to_dict("records")]
    if any(capped.values()):
        table = table.assign(capped=[capped.get(place) for place in places])
    found = evidence.questions(records)
    if found.empty:
        return table, []
    found["budget"] = found["budget"].astype(object).where(found["budget"].notna(), None)
    means = found.groupby(["spec", "budget"], dropna=False)[["recall", "recall_alone"]].mean()
    recalls = {(spec, None if pd.isna(b) else b): row for (spec, b), row in means.iterrows()}
    extra = {name: [recalls[p][name] if p in recalls else None for p in places] for name in means.columns}
    columns = []
    for (part, name), own in evidence.parts(found, images).groupby(["part", "name"], sort=False):
        key = f"{part}: {name}"
        columns.append({"name": key, "title": name, "group": part})
        by = {(row["spec"], numbers.budget_of(row)): row for row in own.to_dict("records")}
        for end, column in (("", "score"), ("_low", "low"), ("_high", "high")):
            extra[key + end] = [by[p][column] if p in by else None for p in places]
    return pd.concat([table, pd.DataFrame(extra, index=table.index)], axis=1), columns


def explored(session, outcome, names: Mapping[str, str]) -> list[page.Explored]:
    """The explorer's questions with every method's answer.

    Args:
        names: what the table calls each method spec.
    """
    from harness.report.overlay import Picture, grid_of
    from methods import registry
    from methods.base import Pruner
    from methods.views import cells as cells_under

    done = {
        (r["task"], r["method"]["spec"], r["method"]["budget"]): r
        for r in outcome.cells
        if r["status"] == "done"
    }
    wanted: dict[str, list[int]] = {}
    for task, row in session.explored:
        wanted.setdefault(task, []).append(row)
    several, methods = len(session.config.budgets) > 1, registry.available(answer_key=True)
    found = []
    for documents in session.documents:
        rows = wanted.get(documents.benchmark.name, [])
        if not rows:
            continue
        model, task = session.model(documents), session.task(documents)
        asked = {model.question(r).row: r for r in task.instances}
        cells = []
        for cell in session.cells:
            record = done.get((cell.benchmark.name, cell.method.spec, cell.method.budget))
            own = cell.method.budget in (None, *session.config.budgets)  # else there for its cost alone
            if own and cell.benchmark is documents.benchmark and record is not None:
                answers = _answers(cell.journal_path(session.config.out), record)
                scores = dict(zip(record["documents"]["row"], record["documents"]["score"]))
                cells.append((cell, answers, scores))
        for row in rows:
            if row not in asked:
                continue
            image, text = model.picture(asked[row])
            place = documents.numbers.index(row)
            document, grid = documents.rows[place], grid_of(session.backbone, Picture(image, text))
            hint = documents.hints[place].evidence if documents.hints else ()
            question = page.Explored(
                f"{documents.benchmark.name}/{row}",
                documents.benchmark.name,
                documents.benchmark.title,
                text,
                _target(task.doc_to_target(document)),
                image,
                grid,
                str(document.get("regime") or ""),
                str(document.get("kind") or ""),
                cells_under(hint, *grid).ravel().nonzero()[0].tolist() if hint else (),
            )
            for cell, answers, scores in cells:
                answer = answers.get(row)
                if answer is None or row not in scores:
                    continue
                name = names.get(cell.method.spec, cell.method.spec)
                if several and cell.method.budget is not None:
                    name += f" @ {cell.method.budget:g}"
                pruner = methods[cell.method.name]
                own_raster = pruner.image_grid is not Pruner.image_grid  # no places of this one
                question.answers[name] = {
                    "text": answer.text,
                    "score": float(scores[row]),
                    "kept": None if answer.kept is None or own_raster else list(answer.kept),
                    "tokens": answer.visual_tokens[-1],
                    "ordered": hasattr(pruner, "orders"),
                    "merged": None if own_raster or answer.merged is None else list(answer.merged),
                }
            found.append(question)
    return found


def _answers(path: Path, record: Mapping) -> dict[int, Answer]:
    """The record's answers by row; {} if they are not there. path: of the journal that the cell has now: what
    `--keep-results` keeps may have been answered under another key."""
    slug, key = path.stem.rpartition("_")[0], records.digest(record["identity"].get("answers"))
    path = path.with_name(f"{slug}_{key}.jsonl")
    return {a.row: a for a in Journal(path).answers.values()} if path.exists() else {}


def _target(target: object) -> str:
    """The right answer as text; of several that count, the first."""
    if isinstance(target, Sequence) and not isinstance(target, str):
        return str(target[0]) if target else ""
    return str(target)


def publish(
    session,
    outcome,
    table: pd.DataFrame,
    averages: Mapping[tuple, numbers.Average],
    lines: Sequence[str],
    labels: Mapping[float, str],
):
    """Write OUT/index.html of a run; its path.

    Args:
        table, averages: of `numbers.build`.
        lines: the caption.
        labels: of each budget.
    """
    config = session.config
    tasks = [{"name": b.name, "title": b.title, "group": "task"} for b in config.benchmarks]
    images = {
        (d.benchmark.name, row): image
        for d in session.documents
        for row, image in zip(d.numbers, d.image_ids)
    }
    table, parts = with_evidence(with_hard(table, outcome.cells), outcome.cells, images)
    names = dict(zip(table["spec"], table["method"]))
    name = tables.without_paths(str(session.backbone.name))
    found = page.build(
        f"{name} at {' and '.join(labels[b] for b in sorted(config.budgets, reverse=True))}",
        table,
        [*tasks, *parts],
        labels,
        roles(table),
        pairs(table, averages),
        explored(session, outcome, names),
        asked=len(images),
    )
    prunes = table.loc[table["kind"] == "method", "method"].nunique()
    lead = (
        f"{prunes} methods of visual-token pruning and their controls on {len(tasks)} tasks "
        f"({config.suite.title}), measured by the same code on one machine."
    )
    packages = records.package_versions()
    footer = "Made by visual-token-pruning-bench with " + ", ".join(
        f"{n} {packages[n]}" for n in ("torch", "transformers", "lmms-eval") if n in packages
    )
    plain = [tables.without_paths(line).replace("**", "") for line in lines]
    family = str(session.described["family"])
    board = None
    if config.suite.synthetic and family == "llava":
        board = {
            block: {
                row["spec"]: row["average"]
                for row in rows.to_dict("records")
                if row["average"] == row["average"]
            }
            for block, rows in table.groupby("block", sort=False)
        }
    printed = lineage.section(family, outcome.cells, board)
    return page.write(config.out / "index.html", found, plain, lead, f"{footer}.", printed)
