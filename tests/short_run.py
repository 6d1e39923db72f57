"""A short run on a tiny random checkpoint, and whether two folders hold the same run."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pandas as pd

from harness.store import records

#: columns of the leaderboard that may differ between two runs
TIMINGS = ["prefill", "prefill_p10", "prefill_p90", "vision", "selection", "llm", "speedup"]
#: parts of a cell's record that may not
SAME = ["key", "status", "method", "data", "prompt", "metrics", "visual_tokens", "documents", "units"]
CELLS, ANSWERS = 6, 3 * (10 + 12)


def arguments(checkpoint: Path, data: Path, out: Path, *more: str) -> list[str]:
    """run_all's: MME and POPE for vanilla, random and FastV, 66 answers in batches of four."""
    base = ["--backbone", checkpoint, "--data", data, "--methods", "random,fastv", "--tasks", "mme,pope"]
    rest = ["--budget", "16", "--max-new-tokens", "3", "--latency-repeats", "1", "--batch-size", "4"]
    return [str(a) for a in (*base, *rest, "--device", "cpu", "--out", out, *more)]


def config(arguments: list[str]):
    """The RunConfig of run_all's arguments."""
    from harness.cli import app, run
    from harness.cli.options import RunOptions

    given = app.parser().commands["run"].make_context("run_all.py", list(map(str, arguments))).params
    return run.config_of(RunOptions(**{f.name: given[f.name] for f in fields(RunOptions)}))


def assert_same(run: Path, reference: Path) -> None:
    """Leaderboard, scores and samples are the same; every answer is in the journals once."""
    tables = [pd.read_csv(folder / "leaderboard.csv") for folder in (run, reference)]
    pd.testing.assert_frame_equal(
        *(t.drop(columns=TIMINGS, errors="ignore") for t in tables), check_exact=True
    )
    assert tables[0][["mme", "pope"]].notna().all().all() and len(tables[0]) == 3
    found, expected = cells(run), cells(reference)
    assert found.keys() == expected.keys() and len(expected) == CELLS
    for name, record in found.items():
        for part in SAME:
            assert record[part] == expected[name][part], (run, name, part)
        counted = record["run"]["answers_computed"] + record["run"]["answers_from_journal"]
        assert counted == record["data"]["documents"]
    assert journals(run) == journals(reference)
    assert sum(map(len, journals(run).values())) == ANSWERS


def cells(run: Path) -> dict[str, dict]:
    """The cells' records by the files' names."""
    return {str(p.relative_to(run)): records.read(p) for p in sorted((run / "cells").rglob("*.json"))}


def journals(run: Path) -> dict[str, list[str]]:
    """The lines of all journals, sorted. Files of single processes show as further ones."""
    found = (run / "journal").rglob("*.jsonl")
    return {str(p.relative_to(run)): sorted(p.read_text().splitlines()) for p in found}
