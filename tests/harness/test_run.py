"""The whole run on a tiny checkpoint: records, re-use, resume, failures, batch size, bad files."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import short_run

from harness.cli import app
from harness.store import atomic, records
from harness.store.journal import Journal
from harness.tasks import pruned_model

METHODS = "random,visionzip,fastv"


@pytest.fixture
def command(tiny_checkpoint, tiny_data):
    """run_all's arguments for a small run into a folder."""

    def arguments(out: Path, *more: str) -> list[str]:
        base = ["--backbone", tiny_checkpoint, "--data", tiny_data, "--methods", METHODS, "--budget", "16"]
        rest = ["--tasks", "gqa,mme,pope", "--max-new-tokens", "3", "--latency-repeats", "2", "--out", out]
        return [str(a) for a in (*base, *rest, "--device", "cpu", *more)]

    return arguments


def cells(out: Path) -> dict[tuple[str, str], dict]:
    found = [records.read(p) for p in sorted((out / "cells").rglob("*.json"))]
    return {(r["task"], r["method"]["spec"]): r for r in found}


def answers(out: Path) -> dict:
    """{(task, journal file): {row: text}}"""
    return {
        (p.parent.name, p.name): {a.row: a.text for a in Journal(p).answers.values()}
        for p in sorted((out / "journal").rglob("*.jsonl"))
    }


@pytest.fixture(scope="module")
def finished(tiny_checkpoint, tiny_data, tmp_path_factory):
    """One uninterrupted run, shared by the tests that only read it."""
    out = tmp_path_factory.mktemp("run")
    arguments = ["--backbone", tiny_checkpoint, "--data", tiny_data, "--methods", METHODS, "--budget", "16"]
    arguments += ["--tasks", "gqa,mme,pope", "--max-new-tokens", "3", "--latency-repeats", "2", "--out", out]
    assert app.run_all([str(a) for a in (*arguments, "--device", "cpu")]) == 0
    return out


def test_every_cell_has_a_complete_record(finished):
    done = cells(finished)
    assert set(done) == {
        (t, m) for t in ("gqa", "mme", "pope") for m in ("vanilla", "random", "visionzip", "fastv")
    }
    for (_, method), record in done.items():
        assert record["status"] == "done" and record["schema_version"] == records.SCHEMA_VERSION
        for key in (
            "git_commit",
            "packages",
            "backbone",
            "device",
            "dtype",
            "seed",
            "prompt",
            "run",
            "written",
        ):
            assert key in record
        assert record["packages"]["lmms-eval"] == "0.7.3"
        metrics = record["metrics"]
        assert metrics["interval"][0] <= metrics["score"] <= metrics["interval"][1]
        tokens = record["visual_tokens"]
        assert len(tokens["per_layer"]) == 6 and tokens["image_places"] == 64
        assert tokens["kept"] == (64 if method == "vanilla" else 16)
        if method == "fastv":
            assert tokens["per_layer"][0] == 64 and tokens["mean_over_layers"] > 16
        if method == "visionzip":
            assert tokens["per_layer"] == [16] * 6


def test_the_journal_has_one_line_an_answer(finished):
    for (task, _), texts in answers(finished).items():
        assert len(texts) == {"gqa": 10, "mme": 10, "pope": 12}[task]


def test_the_leaderboard_is_the_records(finished):
    table = pd.read_csv(finished / "leaderboard.csv")
    done = cells(finished)
    assert table["method"].iloc[0] == "vanilla" and len(table) == 4
    for _, row in table.iterrows():
        for task in ("gqa", "mme", "pope"):
            assert row[task] == pytest.approx(done[task, row["method"]]["metrics"]["score"])
    pruned = table[table["method"] != "vanilla"]
    assert (pruned["gflops_ratio"] < 1).all() and (table["prefill"] > 0).all()
    assert (table[["vision", "llm"]] > 0).all().all()
    text = (finished / "leaderboard.md").read_text()
    for word in ("tiny-llava", "Budget 16 visual tokens", "text tokens", "re-used", "fastv", "GFLOPs"):
        assert word in text
    if table["average"].isna().all():
        assert "No Avg. for any method: vanilla scores 0 on " in text, "the reason is said"
        assert not list(finished.glob("*.png")), "no empty axes"
    else:
        assert (finished / "accuracy_budget.png").stat().st_size > 5000
        assert (finished / "accuracy_latency.png").stat().st_size > 5000


def test_the_same_command_computes_nothing(finished, command, capsys, monkeypatch):
    before = {p: p.read_bytes() for p in finished.rglob("*.json*")}
    csv = (finished / "leaderboard.csv").read_bytes()
    monkeypatch.setattr(pruned_model, "answer", lambda *a: pytest.fail("computed an answer"))
    monkeypatch.setattr("harness.costs.latency.measure_once", lambda *a: pytest.fail("timed a prefill"))
    assert app.run_all(command(finished)) == 0
    assert "12 finished earlier" in capsys.readouterr().out
    assert {p: p.read_bytes() for p in finished.rglob("*.json*")} == before
    assert (finished / "leaderboard.csv").read_bytes() == csv


def test_batch_size_does_not_change_answers(finished, command, tmp_path):
    assert app.run_all(command(tmp_path, "--batch-size", "1")) == 0
    assert answers(tmp_path) == answers(finished)


def test_an_interrupted_run_goes_on(finished, command, tmp_path, monkeypatch, capsys):
    real, calls = pruned_model.answer, []

    def interrupted(*arguments):
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*arguments)

    monkeypatch.setattr(pruned_model, "answer", interrupted)
    assert app.run_all(command(tmp_path)) == 130
    assert "same command" in capsys.readouterr().err
    kept = sum(map(len, answers(tmp_path).values()))
    assert kept > 0
    computed = []

    def counted(backbone, pruner, questions, inputs, *more):
        computed.extend(questions)
        return real(backbone, pruner, questions, inputs, *more)

    monkeypatch.setattr(pruned_model, "answer", counted)
    assert app.run_all(command(tmp_path)) == 0
    total = sum(map(len, answers(finished).values()))
    assert len(computed) == total - kept
    assert answers(tmp_path) == answers(finished)
    for key, record in cells(tmp_path).items():
        assert record["metrics"] == cells(finished)[key]["metrics"]


def test_a_larger_slice_re_uses_the_answers_of_a_smaller_one(command, tmp_path):
    assert app.run_all(command(tmp_path, "--limit", "4")) == 0
    small = {k: r["data"]["documents"] for k, r in cells(tmp_path).items()}
    assert small["pope", "fastv"] == 6 and small["mme", "fastv"] == 4  # POPE: yes and no of each part
    assert app.run_all(command(tmp_path, "--limit", "8")) == 0
    found = [records.read(p) for p in tmp_path.glob("cells/pope/fastv*")]
    grown = max(found, key=lambda r: r["data"]["documents"])
    total = grown["data"]["documents"]
    assert total >= 8
    assert grown["run"]["answers_from_journal"] == 6 and grown["run"]["answers_computed"] == total - 6


def test_a_failing_cell_is_recorded_and_the_run_goes_on(command, tmp_path, monkeypatch, capsys):
    real = pruned_model.answer

    def broken(backbone, pruner, questions, inputs, *more):
        if "fastv" in type(pruner).__module__ and questions[0].text.startswith("Is box"):  # MME
            raise ZeroDivisionError("no attention today")
        return real(backbone, pruner, questions, inputs, *more)

    monkeypatch.setattr(pruned_model, "answer", broken)
    assert app.run_all(command(tmp_path)) == 1
    out = capsys.readouterr().out
    assert "FAILED mme / fastv / 16: ZeroDivisionError: no attention today" in out
    done = cells(tmp_path)
    assert done["mme", "fastv"]["status"] == "failed" and "ZeroDivisionError" in done["mme", "fastv"]["error"]
    assert "metrics" not in done["mme", "fastv"]
    assert all(r["status"] == "done" for k, r in done.items() if k != ("mme", "fastv"))
    table = pd.read_csv(tmp_path / "leaderboard.csv").set_index("method")
    assert pd.isna(table.loc["fastv", "mme"])
    assert "failed" in (tmp_path / "leaderboard.md").read_text()
    # the next run tries the failed cell again, and only that one
    monkeypatch.setattr(pruned_model, "answer", real)
    assert app.run_all(command(tmp_path)) == 0
    assert "11 finished earlier" in capsys.readouterr().out
    assert cells(tmp_path)["mme", "fastv"]["status"] == "done"


def test_a_budget_that_a_method_cannot_do_is_left_out_and_nothing_else(command, tmp_path, capsys):
    """A mean of 16 over 6 layers, the first 2 of which see all 64."""
    methods = "prumerge_plus,prumerge_plus:schedule=released,fastv:schedule=average"
    arguments = command(tmp_path, "--tasks", "pope", "--methods", methods, "--budget", "32", "16")
    assert app.run_all(arguments) == 1
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("LEFT OUT")]
    assert len(lines) == 1 and "fastv:schedule=average at 16: fastv: a mean of 16" in lines[0]
    done = [records.read(p) for p in (tmp_path / "cells").rglob("*.json")]
    assert all(r["status"] == "done" for r in done)
    assert {(r["method"]["name"], r["method"]["budget"]) for r in done} == {
        ("vanilla", None), ("fastv", 32), ("prumerge_plus", 32), ("prumerge_plus", 16)
    }  # fmt: skip
    assert len(done) == 1 + 3 + 2
    caption, *blocks = (tmp_path / "leaderboard.md").read_text().split("## Budget")
    assert "- Left out: fastv:schedule=average at 16: " in caption
    assert ["fastv" in block for block in blocks] == [True, False]
    # the variant that no recording covers is marked in both tables of both blocks, the released form is not
    assert "- † prumerge_plus: this project's own variant" in caption
    assert all(
        b.count("| prumerge_plus † ") == 2 == b.count("| prumerge_plus:schedule=released ") for b in blocks
    )
    assert "†" not in (tmp_path / "leaderboard.csv").read_text()


def test_a_budget_that_no_method_can_do_is_bad_input(command, tmp_path, capsys):
    assert app.run_all(command(tmp_path, "--methods", "fastv:schedule=average")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: fastv: a mean of 16") and error.count("\n") == 1
    assert app.run_all(command(tmp_path, "--budget", "16", "65")) == 2
    assert "budget 65 must leave 1 to 64" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.json"))


def test_damaged_files_are_named_and_moved_aside(finished, command, tmp_path, capsys):
    """A cut record, a cut efficiency record and a damaged journal line: only what they held is computed."""
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    victims = [next((out / "cells" / "pope").glob("fastv*")), next((out / "efficiency").glob("random*"))]
    cut = {}
    for victim in victims:
        cut[victim] = victim.read_bytes()[:100]
        victim.write_bytes(cut[victim])
    (journal,) = (out / "journal" / "pope").glob("fastv*")
    lines = journal.read_bytes().split(b"\n")
    journal.write_bytes(b"\n".join([lines[0], lines[1][:20], *lines[2:-2], lines[-2][:30]]))
    assert app.run_all(command(out)) == 0
    said = " ".join(capsys.readouterr().out.split())  # lines are wrapped
    for victim in victims:
        assert f"DAMAGED record {victim}: moved to {victim.name}.broken; it is computed anew" in said
        assert victim.with_name(victim.name + ".broken").read_bytes() == cut[victim]
    assert f"DAMAGED journal {journal}, line 2, 12: moved to {journal.name}.broken" in said
    broken = journal.with_name(journal.name + ".broken")
    assert broken.read_bytes().split(b"\n") == [lines[1][:20], lines[-2][:30], b""]
    assert "11 finished earlier" in said and answers(out) == answers(finished)
    again = cells(out)["pope", "fastv"]
    assert again["metrics"] == cells(finished)["pope", "fastv"]["metrics"]
    assert again["run"]["answers_computed"] == 2 and again["run"]["answers_from_journal"] == 10


def test_fresh_computes_everything_again(command, tmp_path, monkeypatch):
    arguments = command(tmp_path, "--tasks", "mme", "--methods", "random")
    assert app.run_all(arguments) == 0
    real, computed = pruned_model.answer, []

    def counted(backbone, pruner, questions, inputs, *more):
        computed.extend(questions)
        return real(backbone, pruner, questions, inputs, *more)

    monkeypatch.setattr(pruned_model, "answer", counted)
    assert app.run_all([*arguments, "--fresh"]) == 0
    assert len(computed) == 20


def test_another_parameter_is_another_cell(command, tmp_path):
    assert app.run_all(command(tmp_path, "--tasks", "mme", "--methods", "fastv:k=2,fastv:k=3")) == 0
    layers = {k[1]: r["visual_tokens"]["per_layer"] for k, r in cells(tmp_path).items()}
    assert layers["fastv:k=2"] == [64] * 2 + [16] * 4 and layers["fastv:k=3"] == [64] * 3 + [16] * 3


def test_the_sweep_bench_compares_like_with_like(command, tmp_path, capsys):
    report = tmp_path / "bench.json"
    arguments = command(tmp_path / "out", "--tasks", "pope", "--methods", "random,fastv")
    assert app.main(["sweep-bench", *arguments, "--report", str(report)]) == 0
    result = json.loads(report.read_text())
    assert result["equal_answers"] == result["answers"] == 36
    assert result["speedup"] == pytest.approx(result["alone"]["seconds"] / result["sweep"]["seconds"])


def test_the_vision_tower_runs_once_an_image_for_all_methods(command, tmp_path, monkeypatch):
    from transformers import CLIPVisionModel

    images = []
    monkeypatch.setattr(
        "harness.costs.latency.compare", lambda b, pruners, *a: pytest.skip("only the sweep matters here")
    )
    real = CLIPVisionModel.forward

    def counted(self, pixel_values=None, **kwargs):
        images.append(len(pixel_values))
        return real(self, pixel_values=pixel_values, **kwargs)

    monkeypatch.setattr(CLIPVisionModel, "forward", counted)
    from harness.run.config import RunConfig
    from harness.run.local import LocalEngine
    from harness.tasks.suites import parse_tasks

    config = short_run.config(command(tmp_path, "--tasks", "gqa", "--methods", "random,uniform"))
    assert isinstance(config, RunConfig) and parse_tasks("gqa") == list(config.benchmarks)
    engine = LocalEngine(config)
    assert len(list(engine.compute(engine.session.cells))) == 3
    assert sum(images) == 5, "ten questions on five images, three methods: five tower runs"


def test_a_finished_run_agrees_with_itself(finished, tiny_checkpoint, monkeypatch):
    """Scores, intervals, the leaderboard and FLOPs by closed form: all recomputed by `harness check`."""
    from harness.check import expected, folder

    monkeypatch.setattr(expected, "CHECKPOINTS", tiny_checkpoint.parent)
    run = folder.read(finished)
    found = list(folder.integrity(run))
    assert not [f for f in found if f.status == "FAIL"]
    # of the four methods, in the table and on the page
    assert [f.status for f in found if f.what == "gflops"] == ["ok"] * 8
    assert len(run.answers) == len(run.cells) == 12
    again = [f.status for f in found if f.what == "scores of the documents, from answers"]
    assert again == ["ok"] * 12, "the answers are scored again from questions.parquet"


def test_a_bundle_of_a_finished_run_agrees_with_itself(finished, tmp_path):
    from harness.check import folder
    from harness.store import bundle

    run = bundle.read(finished)
    bundle.write(run, tmp_path / "bundle")
    again = bundle.read(tmp_path / "bundle")
    assert not [f for f in folder.integrity(again) if f.status == "FAIL"]
    for address, record in run.cells.items():
        assert {**again.cells[address], "path": 0} == {**record, "path": 0}
        assert list(again.answers[address]) == run.answers[address]


def test_a_killed_run_can_leave_nothing_that_the_next_does_not_remove(finished):
    """Half written files are told by the names of what a run writes."""
    there = {path.name for path in finished.iterdir() if path.is_file()} - {".lock"}
    assert {"leaderboard.md", "index.html", "questions.parquet"} <= there <= set(atomic.AT_THE_END)


def test_no_line_of_a_run_is_over_100_columns(finished, command, capsys):
    assert app.run_all(command(finished)) == 0
    lines = capsys.readouterr().out.splitlines()
    wide = [line for line in lines if len(line) > 100 and max(map(len, line.split())) <= 90]
    assert any("Budget 16" in line for line in lines) and not wide


def test_a_truncated_backbone_is_named(tiny_checkpoint, command, tmp_path, capsys):
    broken = shutil.copytree(tiny_checkpoint, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    assert app.run_all(command(tmp_path / "out", "--backbone", str(broken))) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: checkpoint ") and error.count("\n") == 1 and "broken" in error
