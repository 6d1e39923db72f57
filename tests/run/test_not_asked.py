"""A question that cannot be made into model inputs is named and counted; all others are asked and scored."""

import json
import shutil

import pyarrow
import pyarrow.parquet
import pytest
import short_run

from backbones import prompts
from harness.cli import app
from harness.report import figures
from harness.store import records


@pytest.fixture
def data(tiny_data, tmp_path):
    """POPE's row 2 has no question, row 5 no answer."""
    data = shutil.copytree(tiny_data, tmp_path / "data")
    table = pyarrow.parquet.read_table(data / "pope/eval.parquet")
    rows = table.to_pylist()
    rows[2]["question"] = rows[5]["answer"] = None
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows, schema=table.schema), data / "pope/eval.parquet"
    )
    return data


@pytest.fixture
def spoilt(monkeypatch):
    """A processor that fails, for a reason that nobody foresaw, at MME's row 4 and whatever is with it."""
    monkeypatch.setattr(figures, "draw", lambda *arguments: None)
    real = prompts._called

    def called(processor, images, texts):
        if any("box 2 here" in text for text in texts):
            raise ZeroDivisionError("division by zero")
        return real(processor, images, texts)

    monkeypatch.setattr(prompts, "_called", called)


def test_what_cannot_be_made_into_inputs_is_named_and_the_rest_scored(
    tiny_checkpoint, data, tmp_path, capsys, spoilt
):
    out = tmp_path / "out"
    command = short_run.arguments(tiny_checkpoint, data, out)
    assert app.run_all(command) == 0
    said = " ".join(capsys.readouterr().out.split())
    for words in (
        "NOT ASKED pope row 2, image 1.png: question is empty",
        "NOT ASKED pope row 5, image 2.png: answer is empty",
        "NOT ASKED mme row 4, image 2.png: ZeroDivisionError: division by zero",
        "NOT ASKED mme row 5, image 2.png: it is scored together with row 4, which cannot be asked",
    ):
        assert said.count(words) == 1, said
    found = [records.read(p, "cell") for p in out.glob("cells/*/*.json")]
    assert len(found) == short_run.CELLS
    for record in found:
        left_out = {"mme": [4, 5], "pope": [2, 5]}[record["task"]]
        assert record["status"] == "done" and [row for row, *_ in record["data"]["unaskable"]] == left_out
        assert not set(left_out) & set(record["documents"]["row"])
    assert "Not asked, since they cannot be shown to the model: MME 2, POPE 2" in " ".join(
        (out / "leaderboard.md").read_text().split()
    )
    times = {p: p.stat().st_mtime_ns for p in out.glob("cells/*/*.json")}
    assert app.run_all(command) == 0
    again = capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in out.glob("cells/*/*.json")} == times, "re-used"
    assert again.count("NOT ASKED mme row 4") == 1


def test_a_failure_of_all_questions_is_one_line(tiny_checkpoint, tiny_data, tmp_path, capsys, monkeypatch):
    def called(processor, images, texts):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(prompts, "_called", called)
    assert app.run_all(short_run.arguments(tiny_checkpoint, tiny_data, tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: mme: no question can be asked; mme row 0") and error.count("\n") == 1
    assert "ZeroDivisionError: division by zero" in error


def test_a_failure_of_the_method_is_the_cells(tiny_checkpoint, tiny_data, tmp_path, monkeypatch):
    """What goes wrong once inputs are there is no question's fault."""
    from methods.random import Random

    monkeypatch.setattr(figures, "draw", lambda *arguments: None)
    monkeypatch.setattr(Random, "select", lambda self, view: 1 / 0)
    out = tmp_path / "out"
    assert app.run_all(short_run.arguments(tiny_checkpoint, tiny_data, out, "--tasks", "pope")) == 1
    found = {r["method"]["spec"]: r for r in (json.loads(p.read_text()) for p in out.glob("cells/*/*.json"))}
    assert found["random"]["status"] == "failed" and "ZeroDivisionError" in found["random"]["error"]
    assert found["fastv"]["status"] == "done" and not found["fastv"]["data"]["unaskable"]


@pytest.mark.parametrize("batch", ["1", "4"])  # one question alone, and several that share an image's prefix
def test_logits_that_are_no_numbers_are_no_answer(tiny_checkpoint, tiny_data, tmp_path, capsys, batch):
    """A config.json with an epsilon of NaN, as float16 that overflows, was scored: exit code 0."""
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    body = json.loads((checkpoint / "config.json").read_text())
    body["text_config"]["rms_norm_eps"] = float("nan")
    (checkpoint / "config.json").write_text(json.dumps(body))
    more = ("--tasks", "pope", "--methods", "random", "--batch-size", batch)
    assert app.run_all(short_run.arguments(checkpoint, tiny_data, tmp_path / "out", *more)) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("ArithmeticError: the model's logits are NaN or infinite") == 2, "of vanilla and random"
