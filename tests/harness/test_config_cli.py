"""Options: what is understood, and what is refused with one line and exit code 2."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from harness.cli import app
from harness.cli.options import split_specs
from harness.run.config import digest, parse_budget
from harness.tasks.suites import BENCHMARKS, EIGHT, parse_tasks
from methods.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("text, value", [("64", 64), ("0.111", 0.111), ("1", 1)])
def test_budgets(text, value):
    assert parse_budget(text) == value and type(parse_budget(text)) is type(value)


@pytest.mark.parametrize("text", ["0", "-3", "0.0", "1.0", "1.5", "many", "", "nan", "1e3"])
def test_bad_budgets(text):
    with pytest.raises(UserError, match="budget"):
        parse_budget(text)


def test_tasks_keep_the_tables_order():
    assert [b.name for b in parse_tasks("pope, gqa")] == ["gqa", "pope"]
    assert len(parse_tasks("all")) == 8
    with pytest.raises(UserError, match=r"unknown task coco.*gqa.*textvqa"):
        parse_tasks("gqa,coco")
    with pytest.raises(UserError, match="none given"):
        parse_tasks(",")


@pytest.mark.parametrize(
    "text, specs",
    [
        ("all", ["all"]),
        ("fastv, visionzip", ["fastv", "visionzip"]),
        ("fastv:k=3,schedule=average,random", ["fastv:k=3,schedule=average", "random"]),
        ("random,fastv:k=3", ["random", "fastv:k=3"]),
    ],
)
def test_method_specs(text, specs):
    assert split_specs(text) == specs


@pytest.mark.parametrize("text", ["k=3", ",", ""])
def test_bad_method_lists(text):
    with pytest.raises(UserError):
        split_specs(text)


def test_digest_is_stable_and_sensitive():
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) == "ae8a9a505246"
    assert digest({"a": 1}) != digest({"a": 2})


def test_every_benchmark_says_whether_it_compares():
    assert len(EIGHT) == 8 and all(b.why for b in BENCHMARKS.values())
    assert {b.variant_of for b in BENCHMARKS.values()} == {None, "textvqa"}


def test_help_answers_within_a_second():
    """Processor time, so that a busy machine does not fail it; on a slow one, not more than three times what
    the command line's own libraries need to be imported (torch alone needs more)."""

    def spent(*command: str) -> tuple[float, subprocess.CompletedProcess]:
        """Of three times the least: the first one after an installation compiles what it reads."""
        taken = []
        for _ in range(3):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            taken.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
        return min(taken), done

    libraries, _ = spent("-c", "import numpy, pydantic, rich.console, typer")
    taken, done = spent("run_all.py", "--help")
    assert done.returncode == 0 and "examples:" in done.stdout
    assert taken < max(1.0, 3 * libraries)


def test_bad_input_is_one_line_and_exit_code_2(tiny_checkpoint, tiny_data, tmp_path, capsys):
    good = [
        "--backbone",
        str(tiny_checkpoint),
        "--data",
        str(tiny_data),
        "--tasks",
        "pope",
        "--out",
        str(tmp_path),
    ]

    def refused(*arguments: str) -> str:
        assert app.run_all([*good, *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        return error

    assert "fastv" in refused("--methods", "nosuch")
    assert "k" in refused("--methods", "fastv:nosuch=1")
    assert "gqa" in refused("--tasks", "nosuch")
    assert "pocket-llava" in refused("--backbone", "nosuch")
    assert "65" in refused("--budget", "65")
    assert "0" in refused("--budget", "0")
    assert "-4" in refused("--budget", "-4")
    assert "all" in refused("--limit", "some")
    assert "cpu" in refused("--device", "tpu")
    assert "--engine ray" in refused("--workers", "2")
    assert "--engine ray" in refused("--address", "auto")
    assert "--data" in refused("--data", str(tmp_path / "nowhere"))
    assert not list(tmp_path.glob("**/*.json")), "nothing was written"


def test_an_unwritable_out_is_refused(tiny_checkpoint, tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    code = app.run_all(["--backbone", str(tiny_checkpoint), "--out", str(blocked / "run")])
    assert code == 2
    assert "--out" in capsys.readouterr().err
    assert blocked.read_text() == "in the way"
