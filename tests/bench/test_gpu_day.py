"""`python -m harness gpu-day`: the rehearsal runs, finished pieces stay, what does not fit waits."""

import json
from types import SimpleNamespace

import pytest

from harness.bench import gpu_day
from harness.cli import app
from methods.errors import UserError


def in_this_process(command, **options):
    """A piece without a process of its own: what it computes, not that it is apart."""
    return SimpleNamespace(returncode=app.main(command[3:]))


@pytest.mark.slow
def test_a_rehearsal_runs_pieces_of_both_families_and_is_resumed(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(gpu_day.subprocess, "run", in_this_process)
    llava, qwen = gpu_day.tiny_shapes(tmp_path)
    steps = gpu_day.pieces(llava, qwen, "cpu", rehearsal=True)
    by_name = {p.name: p for p in steps}
    names = ("pointer-loop", "fastv-full-maps", "training-step", "qwen-batch-1")
    chosen = [by_name[name] for name in names]
    assert gpu_day.run(chosen, tmp_path, minutes=25) == 0, (tmp_path / "README.md").read_text()
    qwen_rows = json.loads((tmp_path / "qwen-batch-1.json").read_text())["results"]
    assert any(r["status"] == "done" for r in qwen_rows)
    maps = json.loads((tmp_path / "fastv-full-maps.json").read_text())
    assert maps["fastv_full_maps_ms"] > 0 and maps["fastv_fused_ms"] > 0
    steps = json.loads((tmp_path / "training-step.json").read_text())["methods"]
    assert {"stepprune", "diffprune"} <= set(steps)
    assert all(own["step_seconds"] > 0 and own["frozen_model_seconds"] > 0 for own in steps.values())
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.json")}
    assert gpu_day.run(chosen, tmp_path, minutes=25) == 0
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.json")}


def test_a_file_that_was_cut_off_is_no_finished_piece(tmp_path):
    path = tmp_path / "piece.json"
    for text in ("", "{", "[]", "{}", '{"schema_version": 2, "kind": '):
        path.write_text(text)
        assert not gpu_day._finished(path), text
    path.write_text('{"schema_version": 2, "kind": "full_maps"}')
    assert gpu_day._finished(path)


def test_what_does_not_fit_waits_and_what_fails_is_said(tmp_path):
    steps = [
        gpu_day.Piece("long", "takes long", 6.0, ("flops",)),
        gpu_day.Piece("bad", "is refused", 0.1, ("latency", "--backbone", "nonsense")),
    ]
    assert gpu_day.run(steps, tmp_path, minutes=1) == 1
    text = (tmp_path / "README.md").read_text()
    assert "left for the next call" in text and "FAILED with exit code 2" in text


def test_every_piece_takes_less_than_eight_minutes_and_all_fit_into_twenty_six():
    steps = gpu_day.pieces("llava-1.5-7b", "qwen2.5-vl-7b", "cuda")
    assert max(p.minutes for p in steps) < 8 and sum(p.minutes for p in steps) <= 26


def test_without_a_gpu_it_says_what_to_do(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="--rehearse"):
        gpu_day.check_device("cuda", rehearsal=False)
    assert app.main(["gpu-day", "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists() and "--rehearse" in capsys.readouterr().err
