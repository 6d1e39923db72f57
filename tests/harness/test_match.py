"""Budgets of equal cost: what is found, what cannot be had, and the table beside a leaderboard."""

import pandas as pd
import pytest
import short_run

from backbones import shapes
from harness.cli import app
from harness.costs import match
from harness.costs.shape_counter import ShapeCounter
from methods import registry


@pytest.fixture(scope="module")
def counter(tiny_checkpoint):
    return ShapeCounter(shapes.load(str(tiny_checkpoint / "config.json")), 30)


@pytest.mark.parametrize("block", [40, 0.5])
def test_every_method_is_within_a_step_of_its_budget_or_says_why_not(counter, block):
    target, found = counter.count("uniform", block).total, {}
    for spec in registry.available():
        if spec != "vanilla":
            found[spec] = match.find(counter, spec, block)
    for spec, own in found.items():
        assert own.target == target
        if own.budget is None:
            assert own.reason and own.macs is None, spec
        else:
            assert counter.count(spec, own.budget).total == own.macs, spec
            assert abs(own.macs - target) <= own.step or own.macs == target, (spec, own)
            assert isinstance(own.budget, float) is isinstance(block, float), spec
    able = {spec for spec, own in found.items() if own.budget is not None}
    assert {"random", "uniform", "fastv", "pdrop", "sparsevlm", "visionzip", "divprune", "holov"} <= able
    assert found["random"].budget == block and found["random"].macs == target


@pytest.mark.parametrize("spec", ["fastv", "sparsevlm", "dart", "visionzip", "pdrop"])
def test_no_other_budget_is_nearer_by_more_than_a_step(counter, spec):
    """Against every budget that the method can have, one by one."""
    own = match.find(counter, spec, 32)
    costs = []
    for tokens in range(1, counter.visual_tokens + 1):
        try:
            costs.append(counter.count(spec, tokens).total)
        except match.UserError:
            continue
    nearest = min(abs(cost - own.target) for cost in costs)
    assert abs(own.macs - own.target) <= nearest + own.step


def test_in_llm_methods_pay_for_the_layers_ahead_of_their_cut():
    counter = ShapeCounter(shapes.load("llava-1.5-7b"), 62)
    own = match.find(counter, "fastv", 64)
    assert own.budget == 27, "2 x 576 and 30 x 27: a mean of 61.3; 64 x 32 behind a projector of 576"
    late = match.find(counter, "fastv:k=8", 64)
    assert late.budget is None and "smallest budget, 1, costs +" in late.reason
    fixed = match.find(counter, "fastv:kept=57", 64)
    assert fixed.budget is None and fixed.reason == "its cost does not depend on its budget"


def test_a_run_has_the_table_beside_its_leaderboard_and_check_computes_it(
    tiny_checkpoint, tiny_data, tmp_path, capsys
):
    out = tmp_path / "run"
    arguments = short_run.arguments(tiny_checkpoint, tiny_data, out, "--match", "flops")
    arguments[arguments.index("16")] = "40"
    assert app.run_all([*arguments, "--explore", "2"]) == 0
    said = capsys.readouterr().out
    board, equal = (pd.read_csv(out / f"{name}.csv") for name in ("leaderboard", "equal_cost"))
    assert set(board["budget"].dropna()) == {40} and len(board) == 3, "the leaderboard is as without"
    assert "equal_cost" not in board
    assert set(equal["match"]) == {"flops"} and set(equal["block"]) == {40}
    budgets = dict(zip(equal["method"], equal["budget"]))
    assert budgets["random"] == 40 and budgets["fastv"] < 40
    text = (out / "equal_cost.md").read_text()
    assert "At equal cost" in text and f"{budgets['fastv']:g}" in text and "equal_cost.md" in said
    flops = dict(zip(equal["method"], equal["gflops"]))
    assert flops["fastv"] == pytest.approx(flops["random"], rel=0.02), "measured, not planned"
    assert app.main(["check", str(out)]) == 0, capsys.readouterr().out
    wrong = equal.assign(kept=equal["kept"] + 1)
    wrong.to_csv(out / "equal_cost.csv", index=False)
    assert app.main(["check", str(out)]) == 1
    told = capsys.readouterr()
    assert "equal_cost.csv: fastv" in told.out + told.err
