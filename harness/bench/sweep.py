"""How much a sweep saves: all cells together, batched and with shared vision features, against each cell
alone.

"Alone" is what a plain evaluation does: one cell after the other, batch size 1, the vision tower run for
every question. Both answer the same questions from scratch in scratch folders; the answers are compared too.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from harness.run import preflight
from harness.run.config import RunConfig
from harness.run.runner import check_writable
from harness.run.session import Session
from harness.run.sweep import VISION_CACHE_BYTES, SweepEntry, answer_all
from harness.store import records


def run(config: RunConfig, report: Path) -> int:
    """Measure, write `report` and print it. Exit code 1 if a cell failed or an answer differs."""
    preflight.check(config)
    check_writable(report.parent)
    session = Session(config)
    with tempfile.TemporaryDirectory() as scratch:
        sweep, together = _answer(session, Path(scratch) / "sweep", together=True)
        one_by_one, alone = _answer(session, Path(scratch) / "alone", together=False)
    same = sum(together[k] == alone.get(k) for k in together)
    result = {
        **session.header(),
        "kind": "sweep_bench",
        "status": "done",
        "cells": len(session.cells),
        "answers": len(together),
        "sweep": {"batch_size": config.batch_size, "vision_cache": True, "seconds": sweep},
        "alone": {"batch_size": 1, "vision_cache": False, "seconds": one_by_one},
        "speedup": one_by_one / sweep,
        "equal_answers": same,
        "limit": config.limit,
        "budgets": list(config.budgets),
        "methods": [m.spec for m in session.methods],
    }
    records.write(report, result)
    print(
        f"{len(session.cells)} cells, {len(together)} answers: sweep {sweep:.1f} s, each cell alone at batch "
        f"size 1 {one_by_one:.1f} s, {one_by_one / sweep:.2f}x; {same} of {len(together)} answers equal. "
        f"Written to {report}"
    )
    return 0 if same == len(together) == len(alone) else 1


def _answer(session: Session, out: Path, together: bool) -> tuple[float, dict]:
    """Seconds for answering every cell, and {(task, cell key, row): text}. Task building is not timed."""
    seconds, answers = 0.0, {}
    for documents in session.documents:
        task = session.task(documents)
        cells = [c for c in session.cells if c.benchmark is documents.benchmark]
        entries = session.entries(documents, cells, out)
        start = time.perf_counter()
        answered(session.backbone, task, entries, together, session.config.batch_size)
        seconds += time.perf_counter() - start
        for entry in entries:
            for answer in entry.model.journal.answers.values():
                answers[entry.cell.benchmark.name, entry.cell.key, answer.row] = answer.text
    return seconds, answers


def answered(backbone, task, entries: Sequence[SweepEntry], together: bool, batch_size: int) -> None:
    """Answer every question of the task in every entry.

    together: batch by batch in all entries, with a vision cache; else entry by entry at batch size 1,
    without. Raises RuntimeError if an entry fails.
    """
    for group in [entries] if together else [[entry] for entry in entries]:
        size, cache = (batch_size, VISION_CACHE_BYTES) if together else (1, None)
        answer_all(backbone, task, group, size, time.perf_counter, cache_bytes=cache)
    for entry in entries:
        if entry.report.error:
            raise RuntimeError(f"cell {entry.cell.name} failed:\n{entry.report.error}")
