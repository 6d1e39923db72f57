"""A benchmark is one file: put into `harness/tasks/benchmarks`, it is a task of every command."""

import pyarrow.parquet as parquet
import pytest

from harness.cli import app
from harness.pocket.data import build, documents
from harness.tasks import benchmarks, suites
from harness.tasks.schemas import column_problems

NINTH = '''
"""A ninth benchmark: open questions with ten answers, asked by VQAv2's task code."""

from harness.drawings import facts
from harness.drawings.drawing import Drawing
from harness.drawings.wording import first_fact, ten_answers
from harness.tasks.benchmark import ANSWERS, IMAGE, INT, TEXT, Benchmark, rows_in
from harness.tasks.scoring import EXACT_MATCH



def rows(scene, rng, number):
    fact = first_fact(scene, rng, (facts.colour, facts.shape))
    return [] if fact is None else [ten_answers(fact.question, fact.answer, "other")]


def asked(interview, task, category):
    fact = interview.fact(task, ("lookup",))
    return [] if fact is None else [(ten_answers(fact.question, fact.answer, "other"), fact)]


BENCHMARKS = (
    Benchmark(
        name="ninth",
        title="Ninth",
        place=10,
        yaml="vqav2/vqav2_val.yaml",
        files=rows_in("ninth"),
        columns={"rows": {"question_id": INT, "question": TEXT, "answers": ANSWERS, "image": IMAGE}},
        scoring=EXACT_MATCH,
        documents=7,
        comparable=False,
        why="made up by a test",
        upstream_split="validation",
        repository="Ninth",
        drawing=Drawing(
            questions=6,
            per_regime=2,
            rows=rows,
            asked=asked,
            identify=lambda row, image, question, position: dict(question_id=question),
            target=lambda row: row["multiple_choice_answer"],
        ),
    ),
)
'''


@pytest.fixture
def ninth(tmp_path, monkeypatch):
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "ninth_benchmark.py").write_text(NINTH)
    monkeypatch.setattr(benchmarks, "__path__", [*benchmarks.__path__, str(folder)])
    monkeypatch.delitem(__import__("sys").modules, "harness.tasks.benchmarks.ninth_benchmark", raising=False)
    found = benchmarks.load()
    for name, benchmark in found.items():
        monkeypatch.setitem(suites.BENCHMARKS, name, benchmark)
    return found["ninth"]


@pytest.mark.parametrize("version", build.VERSIONS)
def test_pocket_draws_its_questions(ninth, tmp_path, monkeypatch, version):
    """In both versions, as its file says; data sets drawn before do not count as having it."""
    root = build.default_root(version=version)
    assert root.name == f"v{version}+ninth"
    monkeypatch.setattr(documents, "questions", lambda version: {"ninth": 6, "pope": 8})
    build.build(tmp_path, progress=False, version=version)
    rows = parquet.read_table(tmp_path / "ninth/eval.parquet").to_pylist()
    assert len(rows) == 6 if version == 1 else len(rows) == 3 * 6
    assert [row["question_id"] for row in rows] == list(range(len(rows)))
    assert all(documents.target("ninth", row) == row["answers"][0]["answer"] for row in rows)
    assert not column_problems(ninth, "rows", parquet.read_schema(tmp_path / "ninth/eval.parquet"))


def test_one_file_is_a_column_of_the_leaderboard(ninth, tiny_checkpoint, tmp_path, monkeypatch, capsys):
    data = tmp_path / "data"
    monkeypatch.setattr(documents, "questions", lambda version: {"ninth": 6})
    build.build(data, progress=False)
    arguments = ["--backbone", tiny_checkpoint, "--data", data, "--tasks", "ninth", "--methods", "uniform"]
    arguments += ["--budget", "16", "--max-new-tokens", "2", "--latency-repeats", "1", "--device", "cpu"]
    assert app.run_all([str(a) for a in (*arguments, "--out", tmp_path / "out")]) == 0
    assert "Ninth" in (tmp_path / "out/leaderboard.md").read_text()
    assert app.run_all(["--list"]) == 0
    assert "ninth" in capsys.readouterr().out


def test_its_columns_are_checked(ninth, tiny_data):
    schema = parquet.read_schema(next((tiny_data / "pope").glob("*.parquet")))
    assert column_problems(ninth, "rows", schema)


def test_two_benchmarks_of_one_name_are_refused(tmp_path, monkeypatch):
    (tmp_path / "twin_benchmark.py").write_text(NINTH.replace('"ninth"', '"pope"'))
    monkeypatch.setattr(benchmarks, "__path__", [*benchmarks.__path__, str(tmp_path)])
    with pytest.raises(ValueError, match="two benchmarks are named pope"):
        benchmarks.load()
