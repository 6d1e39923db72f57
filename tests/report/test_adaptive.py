"""`harness adaptive`: what is read from a run, and the figures of it."""

import json

import numpy as np
import pandas as pd
import pytest
from made_up_run import cell, save, write

from harness.check import folder
from harness.cli import app
from harness.report import adaptive
from methods.errors import UserError


def table(kept, things, score=None, vanilla=None):
    n = len(kept)
    ones = np.ones(n)
    columns = {"budget": 64, "task": "gqa", "kept": kept, "things": things}
    return pd.DataFrame(
        columns | {"score": ones if score is None else score, "vanilla": ones if vanilla is None else vanilla}
    )


def test_rank_correlation():
    things = np.arange(200) % 14 + 1.0
    rising = adaptive.describe(table(things**2, things))
    assert rising["rho_things"] == pytest.approx(1) and rising["rho_things_interval"][0] > 0.99
    falling = adaptive.describe(table(100 - things, things))
    assert falling["rho_things"] == pytest.approx(-1)
    fixed = adaptive.describe(table(np.full(200, 64.0), things))
    assert fixed["rho_things"] == 0 and fixed["std"] == 0 and len(fixed["by_kept"]) == 1
    shuffled = adaptive.describe(table(np.random.default_rng(1).permutation(things), things))
    low, high = shuffled["rho_things_interval"]
    assert low < 0 < high and high - low < 0.4


def test_breakdowns_hold_every_question_once():
    rng = np.random.default_rng(0)
    kept = rng.integers(1, 300, 500).astype(float)
    score, vanilla = rng.integers(0, 2, 500).astype(float), rng.integers(0, 2, 500).astype(float)
    found = adaptive.describe(table(kept, rng.integers(1, 15, 500), score, vanilla))
    for rows in (found["by_kept"], found["by_things"]):
        assert sum(r["questions"] for r in rows) == 500
        for column, whole in (("score", score), ("vanilla", vanilla)):
            mean = sum(r[column] * r["questions"] for r in rows) / 500
            assert mean == pytest.approx(100 * whole.mean())
    edges = [r["from"] for r in found["by_kept"]]
    assert np.diff(np.log(edges)) == pytest.approx(np.log(edges[1] / edges[0]))


def test_unknown_complexity_is_left_out():
    found = adaptive.describe(table([10.0, 20.0, 30.0], [np.nan] * 3))
    assert found["rho_things"] is None and found["by_things"] == [] and found["mean"] == 20


@pytest.fixture
def run(tmp_path):
    """A run folder of vanilla and of a method that keeps 1 to 40 tokens."""

    right = [1, 0] * 20
    vanilla = cell("gqa", "vanilla", None, [1] * 40, suite="other")
    mine = cell("gqa", "stepprune", 20, right, suite="other")
    mine["documents"]["kept"] = list(range(1, 41))
    return save(tmp_path, vanilla, mine)


def test_command(run, capsys):
    assert app.main(["adaptive", str(run)]) == 0
    out = capsys.readouterr().out
    assert "20.5 ± 11.5" in out and "1, 40" in out
    record = json.loads((run / "adaptive_stepprune.json").read_text())
    (block,) = record["budgets"]
    assert block["budget"] == 20 and block["questions"] == 40 and block["by_things"] == []
    assert (run / "adaptive_stepprune.md").read_text().strip() == out.strip()
    assert (run / "adaptive_stepprune.png").stat().st_size > 10_000


def test_bad_input(run):
    with pytest.raises(UserError, match="no cells of holov; it has: stepprune"):
        adaptive.questions(folder.read(run), "holov")
    (path,) = (run / "cells/gqa").glob("stepprune*.json")
    record = json.loads(path.read_text())
    record["documents"]["row"][0] = 99
    write(path.parent, record)
    with pytest.raises(UserError, match="no vanilla cell on the same questions"):
        adaptive.questions(folder.read(run), "stepprune")
    del record["documents"]["kept"]
    write(path.parent, record)
    with pytest.raises(UserError, match="run it again"):
        adaptive.questions(folder.read(run), "stepprune")
