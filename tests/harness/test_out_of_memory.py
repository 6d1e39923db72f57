"""When memory runs out, batches halve; a cell that does not fit at all fails, and only that one."""

import pytest
import torch

from harness.cli import app
from harness.run import out_of_memory
from harness.store import records
from harness.store.journal import Journal
from harness.tasks import pruned_model

CPU = (
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
    "allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"
)
GPU = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB"


@pytest.mark.parametrize(
    "error, expected",
    [
        (torch.cuda.OutOfMemoryError(GPU), True),
        (torch.cuda.OutOfMemoryError("anything"), True),
        (RuntimeError(CPU), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("CUDA out of memory."), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_what_counts_as_out_of_memory(error, expected):
    assert out_of_memory.is_out_of_memory(error) is expected


def test_what_torch_really_raises_counts():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert out_of_memory.is_out_of_memory(caught.value)


@pytest.fixture
def command(tiny_checkpoint, tiny_data):
    def arguments(out, *more: str) -> list[str]:
        base = ["--backbone", tiny_checkpoint, "--data", tiny_data, "--methods", "random,fastv", "--out", out]
        rest = ["--budget", "16", "--tasks", "pope", "--max-new-tokens", "3", "--latency-repeats", "1"]
        return [str(a) for a in (*base, *rest, "--device", "cpu", *more)]

    return arguments


def limited(monkeypatch, error: Exception, most: int) -> list[int]:
    """FastV fits at most `most` questions; returns the sizes of the batches that it was tried with."""
    real, tried = pruned_model.answer, []

    def answer(backbone, pruner, questions, inputs, *more):
        if "fastv" in type(pruner).__module__:
            tried.append(len(questions))
            if len(questions) > most:
                raise error
        return real(backbone, pruner, questions, inputs, *more)

    monkeypatch.setattr(pruned_model, "answer", answer)
    return tried


def outcome(out):
    found = {r["method"]["spec"]: r for r in map(records.read, (out / "cells" / "pope").glob("*.json"))}
    texts = {p.name: {a.row: a.text for a in Journal(p).answers.values()} for p in out.rglob("*.jsonl")}
    return found, texts


def test_batches_halve_and_the_record_says_so(command, tmp_path, monkeypatch, capsys):
    assert app.run_all(command(tmp_path / "ample")) == 0
    plain, plain_texts = outcome(tmp_path / "ample")
    assert plain["fastv"]["run"]["batch_size_reduced_to"] is None
    tried = limited(monkeypatch, torch.cuda.OutOfMemoryError(GPU), 2)
    assert app.run_all(command(tmp_path / "short")) == 0
    assert tried == [8, 4, 2, 2, 2, 2, 2, 2]
    assert "memory ran out: pope / fastv / 16 was answered in batches of 2" in capsys.readouterr().out
    found, texts = outcome(tmp_path / "short")
    assert found["fastv"]["run"]["batch_size_reduced_to"] == 2 and found["fastv"]["run"]["batch_size"] == 8
    assert found["random"]["run"]["batch_size_reduced_to"] is None
    assert texts == plain_texts
    for method, record in found.items():
        assert record["metrics"] == plain[method]["metrics"]
        assert record["run"]["answers_computed"] == 12


def test_a_cell_that_does_not_fit_at_all_fails_alone(command, tmp_path, monkeypatch, capsys):
    tried = limited(monkeypatch, RuntimeError(CPU), 0)
    assert app.run_all(command(tmp_path)) == 1
    assert tried == [8, 4, 2, 1]
    assert "FAILED pope / fastv / 16: RuntimeError: " in capsys.readouterr().out
    found, _ = outcome(tmp_path)
    assert {m: r["status"] for m, r in found.items()} == {
        "vanilla": "done", "random": "done", "fastv": "failed"
    }  # fmt: skip
    assert "can't allocate memory" in found["fastv"]["error"]
    assert "failed" in (tmp_path / "leaderboard.md").read_text()
