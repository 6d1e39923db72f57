"""kill -9 at random moments, 25 times: the same leaderboard, no answer lost or counted twice. Ctrl-C, two
runs on one folder, and the memory of a run of several budgets, by the same worker."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import short_run

HERE = Path(__file__).parent
KILLS = 25

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="names the killed write by /proc"),
]


@pytest.fixture(scope="module")
def folder(tiny_checkpoint, tiny_data, tmp_path_factory):
    """What tests/harness/kill_worker.py leaves behind."""
    folder = tmp_path_factory.mktemp("killed")
    run = short_run.arguments(tiny_checkpoint, tiny_data, folder / "{}")
    command = [sys.executable, HERE / "kill_worker.py", folder, KILLS, 7, *run]
    done = subprocess.run(list(map(str, command)), cwd=HERE.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:] + (folder / "log.txt").read_text()[-2000:]
    return folder


def finished(folder: Path) -> list[Path]:
    runs = sorted((p for p in folder.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    assert runs
    return runs


def test_it_was_killed_everywhere(folder):
    kills = [json.loads(line) for line in (folder / "kills.jsonl").read_text().splitlines()]
    assert len(kills) == KILLS
    assert {k["how"] for k in kills} == {"moment", "write", "rename", "record", "latency"}
    assert any(k["how"] == "write" and k["where"].endswith(".jsonl") for k in kills), "in a journal's write"
    assert any(k["how"] == "rename" and "/cells/" in k["where"] for k in kills), "in a record's write"


def test_leaderboard_and_answers_are_those_of_an_uninterrupted_run(folder):
    for run in finished(folder):
        short_run.assert_same(run, folder / "reference")


def test_nothing_unfinished_is_left_and_what_was_cut_is_named(folder):
    said = (folder / "log.txt").read_text()
    for run in finished(folder):
        assert not list(run.rglob("*.tmp")) and not list(run.rglob("*.rank*"))
        for path in run.rglob("*.broken"):
            assert path.suffixes[-2:] == [".jsonl", ".broken"], "a record is never half there"
            assert f"moved to {path.name}" in said
    kills = [json.loads(line) for line in (folder / "kills.jsonl").read_text().splitlines()]
    cut = [k for k in kills if k["how"] == "write" and k["where"].endswith(".jsonl")]
    assert said.count("DAMAGED journal") >= len(cut)


@pytest.fixture(scope="module")
def others(folder) -> dict:
    return json.loads((folder / "others.json").read_text())


def test_an_interrupted_run_says_so_in_one_line_and_goes_on(folder, others):
    codes = [code for code, _ in others["interrupted"]]
    assert set(codes) <= {130, 0} and 130 in codes
    for code, said in others["interrupted"]:
        assert "Traceback" not in said and "KeyboardInterrupt" not in said
        assert said.count("interrupted; the same command goes on from here") == (code == 130)
    short_run.assert_same(folder / "interrupted", folder / "reference")


def test_of_two_runs_on_one_folder_one_refuses(folder, others):
    codes = sorted(code for code, _ in others["together"])
    assert codes == [0, 2]
    (refusal,) = [said for code, said in others["together"] if code == 2]
    assert refusal.count("\n") == 1 and "another run is writing to" in refusal
    short_run.assert_same(folder / "together", folder / "reference")


def test_memory_does_not_grow_with_the_budgets(others):
    one, three = others["memory"]["1"], others["memory"]["3"]
    assert three < 1.2 * one, f"{three} KiB with three budgets, {one} with one"
