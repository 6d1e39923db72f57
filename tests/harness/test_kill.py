"""kill -9 at random moments, twenty times: the same leaderboard, no answer lost or counted twice."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from harness import records

HERE = Path(__file__).parent
KILLS = 20
#: what may differ between two runs
TIMINGS = ["prefill", "prefill_p10", "prefill_p90", "vision", "selection", "llm", "speedup"]
ACCURACY = ["key", "data", "prompt", "metrics", "visual_tokens", "documents", "units", "method", "status"]

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="names the killed write by /proc")


@pytest.fixture(scope="module")
def folder(tiny_checkpoint, tiny_data, tmp_path_factory):
    """What tests/harness/kill_worker.py leaves behind."""
    folder = tmp_path_factory.mktemp("killed")
    arguments = ["--backbone", tiny_checkpoint, "--data", tiny_data, "--tasks", "mme,pope", "--budget", "16"]
    arguments += ["--methods", "random,fastv", "--max-new-tokens", "3", "--latency-repeats", "1"]
    arguments += ["--batch-size", "4", "--device", "cpu"]
    command = [sys.executable, HERE / "kill_worker.py", folder, KILLS, 7, *arguments]
    done = subprocess.run(list(map(str, command)), cwd=HERE.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:] + (folder / "log.txt").read_text()[-2000:]
    return folder


def finished(folder: Path) -> list[Path]:
    runs = sorted((p for p in folder.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    assert runs
    return runs


def table(run: Path) -> pd.DataFrame:
    whole = pd.read_csv(run / "leaderboard.csv")
    return whole.drop(columns=[c for c in TIMINGS if c in whole])


def cells(run: Path) -> dict:
    return {str(p.relative_to(run)): records.read(p) for p in sorted((run / "cells").rglob("*.json"))}


def journals(run: Path) -> dict[str, list[str]]:
    return {
        str(p.relative_to(run)): sorted(p.read_text().splitlines())
        for p in (run / "journal").rglob("*.jsonl")
    }


def test_it_was_killed_everywhere(folder):
    kills = [json.loads(line) for line in (folder / "kills.jsonl").read_text().splitlines()]
    assert len(kills) == KILLS
    assert {k["how"] for k in kills} == {"moment", "write", "rename"}
    assert any(k["how"] == "write" and k["where"].endswith(".jsonl") for k in kills), "in a journal's write"
    assert any(k["how"] == "rename" and "/cells/" in k["where"] for k in kills), "in a record's write"


def test_the_leaderboard_is_that_of_an_uninterrupted_run(folder):
    expected = table(folder / "reference")
    assert len(expected) == 3 and expected[["mme", "pope"]].notna().all().all()
    for run in finished(folder):
        pd.testing.assert_frame_equal(table(run), expected, check_exact=True)


def test_no_answer_is_lost_or_counted_twice(folder):
    expected, expected_lines = cells(folder / "reference"), journals(folder / "reference")
    assert len(expected) == 6 and sum(map(len, expected_lines.values())) == 3 * (10 + 12)
    for run in finished(folder):
        found = cells(run)
        assert found.keys() == expected.keys()
        for name, record in found.items():
            for part in ACCURACY:
                assert record[part] == expected[name][part], (run, name, part)
            counted = record["run"]["answers_computed"] + record["run"]["answers_from_journal"]
            assert counted == record["data"]["documents"]
        assert journals(run) == expected_lines


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
