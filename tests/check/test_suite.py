"""`python -m harness suite` and the prediction index: honest about what is missing, right about what is
there."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from harness.check import suite
from harness.cli import app
from harness.report import prediction
from harness.store.bundle import Run


def record(task, spec, budget, score, **columns):
    n = len(score)
    documents = {"row": list(range(n)), "score": score, "recall": [1.0] * n, "kind": ["hop"] * n}
    documents |= {"chance": [0.125] * n, "regime": ["dense"] * n, **columns}
    return {
        "status": "done",
        "task": task,
        "method": {"spec": spec, "budget": budget},
        "documents": documents,
        "data": {"blind": False},
        "run": {"seconds": 1.0},
    }


def points_of(*records):
    cells = {(r["task"], r["method"]["spec"], r["method"]["budget"]): r for r in records}
    return {p.text.split(":")[0]: p for p in suite.points([Run(Path("run"), cells, {})])}


@pytest.fixture(autouse=True)
def no_index(monkeypatch):
    monkeypatch.setattr(suite, "_indices", lambda run, budget: [])


def test_points_follow_from_the_scores():
    right, wrong = [1.0] * 40, [0.0] * 40
    half = [1.0, 0.0] * 20
    found = points_of(
        record("gqa", "vanilla", None, right),
        record("gqa", "oracle", 64, right),
        record("gqa", "things", 64, half),
        record("gqa", "uniform", 64, right),
        record("gqa", "random", 192, wrong),
    )
    assert found["dense, vanilla less oracle"].holds is True
    assert found["dense, oracle less things"].holds is True
    assert "50.0" in found["dense, oracle less things"].text
    assert found["dense, oracle less uniform"].holds is False
    assert found["dense, untrained StepPrune less random"].holds is None
    assert found["vanilla less random at 192"].holds is True
    assert found["vanilla, kind hop"].holds is True
    assert found["blind"].holds is None, "no blind run: it cannot be told"


def test_the_untrained_policy_is_known_by_its_files_name():
    """`train --steps 0 --out FOLDER/untrained.safetensors`, named to a run."""
    name = "dense, untrained StepPrune less random"
    rest = record("gqa", "random", 64, [0.0] * 40)
    for score, holds in (([0.0] * 40, True), ([1.0, 0.0] * 20, False)):
        row = record("gqa", "stepprune:checkpoint=build/untrained.safetensors", 64, score)
        assert points_of(row, rest)[name].holds is holds
    assert (
        points_of(record("gqa", "stepprune:checkpoint=other.safetensors", 64, score), rest)[name].holds
        is None
    )


def test_a_weak_vanilla_fails():
    found = points_of(record("gqa", "vanilla", None, [1.0, 0.0] * 20))
    assert found["vanilla over the tasks"].holds is False and found["vanilla, kind hop"].holds is False
    assert found["kinds of questions kept"].holds is False


def test_a_kind_that_the_backbone_cannot_do_is_named_and_left_out_of_the_rest():
    kinds = ["hop"] * 20 + ["read"] * 20
    scores = [0.0] * 20 + [1.0] * 20
    found = points_of(
        record("gqa", "vanilla", None, scores, kind=kinds),
        record("gqa", "oracle", 64, [1.0] * 40, kind=kinds),
    )
    assert found["vanilla, kind hop"].holds is False and not found["vanilla, kind hop"].counts
    assert "left out" in found["vanilla, kind hop"].text
    assert found["vanilla, kind read"].holds and found["vanilla, regime dense"].holds
    assert found["dense, vanilla less oracle"].text.endswith("20 questions), at most 3")


def test_the_equal_cost_table_is_looked_for_beside_the_run(tmp_path):
    own = record("gqa", "vanilla", None, [1.0] * 4)
    run = Run(tmp_path, {("gqa", "vanilla", None): own}, {})
    assert suite._fifth([run]).holds is None
    (tmp_path / "equal_cost.csv").write_text("match,method\nflops,uniform\n", encoding="utf-8")
    assert suite._fifth([run]).holds is True


def test_todays_committed_runs_do_not_pass(capsys, monkeypatch):
    monkeypatch.undo()
    assert app.main(["suite"]) == 1
    said = capsys.readouterr().out
    assert "no data  1a" in said and "prediction index, default, 64 tokens: 0." in said


def test_a_folder_that_is_no_run_is_bad_input(tmp_path, capsys):
    assert app.main(["suite", str(tmp_path)]) == 2
    assert "no run folder" in capsys.readouterr().err


def test_spearman_is_the_rank_correlation():
    assert prediction.spearman([1, 2, 3, 4], [10, 20, 25, 90]) == pytest.approx(1)
    assert prediction.spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert prediction.spearman([1, 2, 2, 4], [1, 2, 3, 4]) == pytest.approx(0.9486833, abs=1e-6)
    assert math.isnan(prediction.spearman([1, 1, 1], [1, 2, 3]))


def test_at_least_ten_methods_are_published_at_64_and_128():
    for budget, least in ((64, 13), (128, 10)):
        found = prediction.averages(budget)
        assert len(found) >= least and all(40 < v < 100 for v in found.values())
    assert prediction.averages(64)["visionzip"] == 92.0, "Table 1 as printed comes before the methods' papers"
    assert prediction.averages(64)["random"] < prediction.averages(64)["holov"]


def test_the_two_readings_choose_different_rows():
    def row(spec, average, mean=64.0):
        return {"spec": spec, "budget": 64, "average": average, "mean_over_layers": mean}

    rows = [
        row("fastv", 90, 149.0), row("fastv:schedule=average", 50), row("holov", 92), row("random", 60),
        row("visionzip", 91), row("nobody", 99), {"spec": "vanilla", "budget": None, "average": 100},
    ]  # fmt: skip
    ours = prediction.index(rows, 64, "as published")
    default = prediction.index(rows, 64, "default")
    assert ours.methods == default.methods == ("fastv", "holov", "random", "visionzip")
    published = [prediction.averages(64)[m] for m in ours.methods]
    assert ours.rho == pytest.approx(prediction.spearman([50, 92, 60, 91], published))
    assert default.rho == pytest.approx(prediction.spearman([90, 92, 60, 91], published))
    assert ours.low <= ours.rho <= ours.high and np.isfinite(ours.low)
    assert math.isnan(prediction.index(rows[:1], 64, "default").rho)
