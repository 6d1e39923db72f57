"""Two processes on the cells of one run, through the real launchers: the table of one process."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import short_run

from harness.cli import app
from harness.run import device, processes
from harness.store import journal, records
from methods.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
# --multi_gpu: else accelerate starts one process on a machine without GPUs
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
ACCELERATE += ["--num_machines", "1", "--mixed_precision", "no", "--main_process_port", "0"]


@pytest.fixture(scope="module")
def command(tiny_checkpoint, tiny_data):
    return functools.partial(short_run.arguments, tiny_checkpoint, tiny_data)


@pytest.fixture(scope="module")
def alone(command, tmp_path_factory):
    """The same run by one process."""
    out = tmp_path_factory.mktemp("alone")
    assert app.run_all(command(out)) == 0
    return out


def launch(launcher: list[str], arguments: list[str]) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *launcher, "run_all.py", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_two_processes_give_the_table_of_one(launcher, command, alone, tmp_path):
    done = launch(launcher, command(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Budget 16 visual tokens") == 1, "one process speaks"
    assert "6 to compute, by 2 processes" in done.stdout
    short_run.assert_same(tmp_path, alone)
    for path in (tmp_path / "cells").rglob("*.json"):
        run = records.read(path)["run"]
        assert run["processes"] == 2 and run["answers_from_journal"] == 0
    # one process finds everything done
    assert app.run_all(command(tmp_path)) == 0


@pytest.mark.slow
def test_a_run_of_one_goes_on_with_two(command, alone, tmp_path, capsys):
    """... and takes up what a further process of a killed run had journalled."""
    for path in (alone / "journal" / "pope").iterdir():
        target = tmp_path / "journal" / "pope" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines(keepends=True)
        target.write_text("".join(lines[:3]))
        journal.rank_path(target, 1).write_text("".join(lines[3:6]) + lines[6][:30])
    done = launch(TORCHRUN, command(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("DAMAGED journal") == 3
    short_run.assert_same(tmp_path, alone)
    for path in (tmp_path / "cells" / "pope").iterdir():
        run = records.read(path)["run"]
        assert run["answers_from_journal"] == 6 and run["answers_computed"] == 6


@pytest.mark.slow
def test_bad_input_is_one_line(command, tmp_path):
    done = launch(TORCHRUN, command(tmp_path, "--budget", "65"))
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "budget 65 must leave 1 to 64" in lines[0]


# ---- what the processes tell each other, without processes


def test_alone_nothing_is_exchanged():
    assert processes.ALONE.first and processes.ALONE.gather(3) == [3]
    with processes.joined() as team:
        assert team == processes.ALONE
    with pytest.raises(UserError, match="mine"):
        processes.ALONE.agreed(lambda: (_ for _ in ()).throw(UserError("mine")), by_first=True)


def test_a_process_without_a_gpu_is_bad_input(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.set_device", lambda number: None)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert device.resolve("auto") == device.resolve("cuda") == "cuda:1"
    assert device.resolve("cpu") == "cpu"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(UserError, match="process 2 on this machine has no GPU of its own"):
        device.resolve("auto")


def test_the_parts_of_a_benchmark_are_its_batches(backbone):
    """Every question in exactly one process, whatever their number."""
    from harness.tasks.answering import Question, batches

    questions = [Question(i, f"q{i}" * (i % 3), f"image{i // 2}", {"max_new_tokens": 3}) for i in range(23)]
    whole = batches(questions, 4)
    for size in (1, 2, 3, 10):
        parts = [whole[rank::size] for rank in range(size)]
        assert sorted(i for part in parts for batch in part for i in batch) == list(range(23))
