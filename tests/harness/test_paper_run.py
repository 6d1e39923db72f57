"""`--tasks paper` from the command to the leaderboard, on tiny random checkpoints and a drawn mirror."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import short_run

from backbones import families
from backbones.families.llava import SYSTEM_SENTENCE
from harness.cli import app
from harness.store import records
from harness.tasks import comparability
from harness.tasks.suites import (
    BENCHMARKS,
    EIGHT,
    PAPER,
    POCKET8,
    averaged,
    paper_columns,
    parse_suite,
    pocket_columns,
)
from harness.tasks.synthetic_mirror import COLORS
from methods.errors import UserError

FEW = ["--max-new-tokens", "2", "--latency-repeats", "1", "--device", "cpu"]
TABLE2 = ("mmbench_en", "mme", "pope", "scienceqa", "textvqa")


def command(checkpoint: Path, mirror: Path, out: Path, *more: str) -> list[str]:
    arguments = ["--backbone", checkpoint, "--data", mirror, "--out", out, *FEW, *more]
    return [str(a) for a in arguments]


def cells(out: Path) -> dict[tuple[str, str], dict]:
    found = [records.read(p) for p in sorted((out / "cells").rglob("*.json"))]
    return {(r["task"], r["method"]["spec"]): r for r in found}


@pytest.fixture(scope="module")
def llava(hub_checkpoints, mirror, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("llava")
    more = ("--tasks", "paper", "--methods", "uniform", "--budget", "16")
    assert app.run_all(command(hub_checkpoints["llava"], mirror, out, *more)) == 0
    return out


@pytest.fixture(scope="module")
def qwen(hub_checkpoints, mirror, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("qwen")
    more = ("--tasks", "paper", "--methods", "uniform", "--budget", "0.333", "--max-pixels", str(48 * 784))
    more += ("--min-pixels", str(4 * 784))
    assert app.run_all(command(hub_checkpoints["qwen2_5_vl"], mirror, out, *more)) == 0
    return out


def test_table_1_is_one_command(llava):
    done = cells(llava)
    assert {task for task, _ in done} == set(BENCHMARKS) and len(done) == 18
    for (task, method), record in done.items():
        assert record["status"] == "done", record.get("error")
        data, backbone = record["data"], record["backbone"]
        assert data["suite"] == "paper" and data["split"] == BENCHMARKS[task].upstream_split
        assert data["source"]["repository"] == f"lmms-lab-encoder/{BENCHMARKS[task].repository}"
        assert data["documents"] == data["documents_in_file"] == len(record["documents"]["row"])
        assert data["comparable_to_paper"] is False
        assert "no row of tiny-llava" in data["comparability"], "a random model is none of the paper's"
        assert backbone["image_padding"] == "square" and backbone["system_sentence"] == SYSTEM_SENTENCE
        assert record["visual_tokens"]["kept"] == (64 if method == "vanilla" else 16)
    assert "test-dev" in done["vqav2", "vanilla"]["data"]["comparability"]
    assert done["textvqa_ocr", "vanilla"]["data"]["overrides"]["lmms_eval_specific_kwargs"]["default"]["ocr"]
    words = {t: done[t, "vanilla"]["visual_tokens"]["text_tokens"] for t in ("textvqa", "textvqa_ocr")}
    assert words["textvqa"] < words["textvqa_ocr"]
    caption = (llava / "leaderboard.md").read_text()
    assert "Avg. does not count TextVQA, which" in caption and "VQAv2 (validation split" in caption
    assert "TextVQA+OCR" in caption


def test_table_2_is_one_command(qwen):
    done = cells(qwen)
    assert {task for task, _ in done} == set(TABLE2)
    for (_, method), record in done.items():
        assert record["status"] == "done", record.get("error")
        backbone = record["backbone"]
        assert (backbone["min_pixels"], backbone["max_pixels"]) == (4 * 784, 48 * 784)
        places, kept = (record["visual_tokens"][k] for k in ("image_places", "kept"))
        share = 1 if method == "vanilla" else 0.333
        assert 4 <= places <= 48 and kept == pytest.approx(share * places, abs=0.5)
    table = pd.read_csv(qwen / "leaderboard.csv")
    assert (table["gflops"] > 0).all() and (table["prefill"] > 0).all()


def test_the_same_command_computes_nothing(llava, hub_checkpoints, mirror, capsys):
    more = ("--tasks", "paper", "--methods", "uniform", "--budget", "16")
    assert app.run_all(command(hub_checkpoints["llava"], mirror, llava, *more)) == 0
    assert "18 finished earlier" in capsys.readouterr().out


def test_damaged_data_are_refused_before_the_model_is_read(
    hub_checkpoints, mirror, tmp_path, capsys, monkeypatch
):
    copy = shutil.copytree(mirror, tmp_path / "copy")
    (copy / "lmms-lab-encoder/MME/data/test-00000-of-00002.parquet").unlink()
    monkeypatch.setattr("backbones.hub.load.load", lambda *a, **k: pytest.fail("read the model"))
    arguments = command(hub_checkpoints["llava"], copy, tmp_path / "out", "--tasks", "paper")
    assert app.run_all(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "hf download lmms-lab-encoder/MME --repo-type dataset" in error


def truths(mirror: Path) -> dict[str, str]:
    """The right (for VQA: the intended) answer to every prompt of the mirror."""
    from harness.tasks.environment import silenced
    from harness.tasks.lmms import Documents, build
    from harness.tasks.sources import hub

    found = {}
    for benchmark in BENCHMARKS.values():
        task = build(Documents(benchmark, hub(benchmark, mirror)))
        with silenced():
            task.build_all_requests()
        for request in task.instances:
            doc = task.dataset[task.config.test_split][request.args[3]]
            answer = doc.get("answer")
            if benchmark.name == "scienceqa":
                answer = "ABCDE"[answer]
            found[request.args[0]] = answer or COLORS[request.args[3]]
    return found


def test_known_answers_have_known_scores(hub_checkpoints, mirror, tmp_path, monkeypatch):
    """Vanilla says the truth, the other method the truth and a full stop."""
    from harness.tasks import pruned_model

    real, known = pruned_model.answer, truths(mirror)

    def told(backbone, pruner, questions, inputs, *more):
        answers = real(backbone, pruner, questions, inputs, *more)
        stop = "." if pruner.acts else ""
        return [replace(a, text=known[q.text] + stop) for a, q in zip(answers, questions)]

    monkeypatch.setattr(pruned_model, "answer", told)
    more = ("--tasks", "paper", "--methods", "uniform", "--budget", "16")
    assert app.run_all(command(hub_checkpoints["llava"], mirror, tmp_path, *more)) == 0
    done = cells(tmp_path)
    scores = {task: r["metrics"]["score"] for (task, method), r in done.items() if method == "vanilla"}
    # VQA accuracy where 9, 6, 3, 0 and 10, 3, 2, 1 of ten people agree
    vqa = {"vqav2": 72.5, "textvqa": 70.0, "textvqa_ocr": 70.0}
    percent = dict.fromkeys(("gqa", "mmbench_en", "mmbench_cn", "pope", "scienceqa"), 100.0)
    assert scores == pytest.approx({**percent, **vqa, "mme": 600.0})
    pope = done["pope", "uniform"]["metrics"]
    assert (pope["score"], pope["f1_normalised"]) == (0.0, 100.0), "upstream reads a full stop as wrong"
    assert done["mme", "uniform"]["metrics"]["score"] == 600.0
    table = pd.read_csv(tmp_path / "leaderboard.csv").set_index("method")
    ratios = [done[t, "uniform"]["metrics"]["score"] / scores[t] for t in BENCHMARKS if t != "textvqa"]
    assert table.loc["uniform", "average"] == pytest.approx(100 * sum(ratios) / 8)


def test_suites_and_columns():
    assert parse_suite("paper") == (PAPER, "paper") and parse_suite("paper:gqa,pope") == (PAPER, "gqa,pope")
    assert parse_suite("gqa,pope") == (POCKET8, "gqa,pope")
    assert [b.name for b in paper_columns(families.of_type("qwen2_5_vl"))] == list(TABLE2)
    with pytest.raises(UserError, match="no table of Qwen2-VL"):
        paper_columns(families.of_type("qwen2_vl"))
    assert [b.name for b in pocket_columns(families.of_type("qwen2_vl"))] == list(EIGHT)
    with pytest.raises(UserError, match="family 'llama' is unknown; known: llava"):
        families.of_type("llama")
    assert [b.name for b in pocket_columns(families.of_type("qwen2_5_vl"))] == list(TABLE2)
    assert [b.name for b in pocket_columns(families.of_type("llava"))] == list(EIGHT)
    assert averaged([*BENCHMARKS]) == [n for n in BENCHMARKS if n != "textvqa"]
    assert averaged(EIGHT) == list(EIGHT)


def options(*arguments: str):
    return short_run.config([*arguments, "--device", "cpu"])


def test_what_the_paper_suite_brings():
    config = options("--backbone", "qwen2.5-vl-7b", "--tasks", "paper", "--revision", "abc")
    assert (config.load.min_pixels, config.load.max_pixels) == (200_704, 1_605_632)
    assert config.load.revision == "abc" and str(config.out) == "results/runs/qwen2.5-vl-7b-paper"
    config = options("--backbone", "llava-1.5-13b", "--tasks", "paper")
    assert (
        config.load.llava_inputs == "original" and config.token_cap == 128 and config.load.min_pixels is None
    )
    limits = {b.name: config.limit_of(b) for b in config.benchmarks}
    assert limits.pop("vqav2") == 10_000 and set(limits.values()) == {None}
    assert {options("--tasks", "paper:vqav2", "--limit", "all").limit_of(BENCHMARKS["vqav2"])} == {None}
    config = options("--backbone", "llava-1.5-13b")
    assert [b.name for b in config.benchmarks] == list(EIGHT)
    assert config.load.llava_inputs == "checkpoint" and config.suite is POCKET8 and config.dtype == "float32"
    config = options("--backbone", "qwen2.5-vl-7b")
    assert config.suite is POCKET8 and [b.name for b in config.benchmarks] == list(TABLE2)
    assert len(options("--backbone", "qwen2.5-vl-7b", "--tasks", "all").benchmarks) == 8


def test_reasons_against_comparison():
    described = {"name": "llava-1.5-7b", "family": "llava", "image_padding": "square", "system_sentence": "A"}
    whole = {"documents": 10, "total": 10}

    def of(task: str, suite=PAPER, **changes) -> list[str]:
        arguments = {**whole, **{k: changes.pop(k) for k in ("documents", "blind") if k in changes}}
        return comparability.reasons(BENCHMARKS[task], suite, {**described, **changes}, **arguments)

    assert of("gqa") == of("textvqa_ocr") == of("pope") == []
    assert "test-dev" in of("vqav2")[0] and "GPT" in of("mmbench_en")[0] and "OCR" in of("textvqa")[0]
    assert of("gqa", suite=POCKET8) == ["drawn images, not the benchmark's"]
    assert of("gqa", documents=5) == ["a slice of 5 of 10 documents"]
    assert "cropped" in of("gqa", image_padding="centre crop")[0]
    assert "4bit" in of("gqa", quantized="4bit")[0] and "grey" in of("gqa", blind=True)[0]
    assert "no row of llava-1.5-13b" in of("gqa", name="llava-1.5-13b")[0]
    (doubt,) = of("textvqa", name="qwen2.5-vl-7b", family="qwen2_5_vl")
    assert "does not tell whether its column VQA is VQAv2 or TextVQA" in doubt
    assert of("mme", name="qwen2.5-vl-7b", family="qwen2_5_vl") == []


def test_records_agree_with_themselves(llava, hub_checkpoints, monkeypatch):
    from harness.check import expected, folder

    monkeypatch.setattr(expected, "CHECKPOINTS", hub_checkpoints["llava"].parent)
    failed = [f for f in folder.integrity(folder.read(llava)) if f.status == "FAIL"]
    assert not failed
    assert all(math.isfinite(r["metrics"]["score"]) for r in cells(llava).values())
