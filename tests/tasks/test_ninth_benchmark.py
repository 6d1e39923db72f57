"""A benchmark is one file: put into `harness/tasks/benchmarks`, it is a task of every command."""

import shutil

import pytest

from harness.cli import app
from harness.tasks import benchmarks, suites
from harness.tasks.schemas import column_problems

NINTH = '''
"""A ninth benchmark: open questions with ten answers, asked by VQAv2's task code."""

from harness.tasks.benchmark import ANSWERS, IMAGE, INT, TEXT, Benchmark, rows_in
from harness.tasks.scoring import EXACT_MATCH

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


def test_one_file_is_a_column_of_the_leaderboard(ninth, tiny_checkpoint, tiny_data, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(tiny_data / "vqav2", data / "ninth")
    arguments = ["--backbone", tiny_checkpoint, "--data", data, "--tasks", "ninth", "--methods", "uniform"]
    arguments += ["--budget", "16", "--max-new-tokens", "2", "--latency-repeats", "1", "--device", "cpu"]
    assert app.run_all([str(a) for a in (*arguments, "--out", tmp_path / "out")]) == 0
    assert "Ninth" in (tmp_path / "out/leaderboard.md").read_text()
    assert app.run_all(["--list"]) == 0
    assert "ninth" in capsys.readouterr().out


def test_its_columns_are_checked(ninth, tiny_data):
    import pyarrow.parquet

    schema = pyarrow.parquet.read_schema(next((tiny_data / "pope").glob("*.parquet")))
    assert column_problems(ninth, "rows", schema)


def test_two_benchmarks_of_one_name_are_refused(tmp_path, monkeypatch):
    (tmp_path / "twin_benchmark.py").write_text(NINTH.replace('"ninth"', '"pope"'))
    monkeypatch.setattr(benchmarks, "__path__", [*benchmarks.__path__, str(tmp_path)])
    with pytest.raises(ValueError, match="two benchmarks are named pope"):
        benchmarks.load()
