"""Answers that reached the cap on their length are counted in record and caption."""

import pytest
import short_run

from harness.cli import app
from harness.report import leaderboard
from harness.tasks.answering import capped
from harness.tasks.suites import PAPER


def test_the_benchmarks_themselves_have_a_cap_below_mmbenchs_own():
    assert capped({"max_new_tokens": 1024}, PAPER.max_new_tokens)["max_new_tokens"] == 128
    assert capped({"max_new_tokens": 16}, PAPER.max_new_tokens)["max_new_tokens"] == 16


@pytest.mark.slow
def test_a_babbling_model_is_counted(tiny_checkpoint, tiny_data, tmp_path):
    """The tiny random model never stops by itself."""
    more = ("--methods", "random", "--tasks", "mme")
    arguments = short_run.arguments(tiny_checkpoint, tiny_data, tmp_path, *more)
    assert app.run_all(arguments) == 0
    for record in short_run.cells(tmp_path).values():
        assert record["answers_at_cap"] == record["data"]["documents"] == 10
    text = (tmp_path / "leaderboard.md").read_text()
    assert "Answers that reached the cap on their length" in text and "MME 20 of 20 (at 3 tokens)" in text


def test_nothing_is_said_where_no_answer_reached_it():
    record = {"task": "gqa", "answers_at_cap": 0, "data": {"documents": 9}}
    assert leaderboard._cut([record, {"task": "gqa"}], {"gqa": "GQA"}) == ""
