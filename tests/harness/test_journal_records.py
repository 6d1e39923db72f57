"""Journal and records: nothing lost, nothing silently wrong."""

import json

import pytest

from harness import records
from harness.errors import UserError
from harness.journal import Answer, Journal


def answer(row: int) -> Answer:
    return Answer(row, "p", f"text 文 {row}", 70, 64, 3, (64, 64, 16))


def test_journal_round_trip(tmp_path):
    path = tmp_path / "a" / "j.jsonl"
    journal = Journal(path)
    journal.append([answer(0), answer(1)])
    journal.append([answer(2)])
    assert len(path.read_text().splitlines()) == 3
    assert Journal(path).answers == journal.answers == {(i, "p"): answer(i) for i in range(3)}


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_line_cut_off_by_a_kill_is_replaced(tmp_path, cut):
    path = tmp_path / "j.jsonl"
    Journal(path).append([answer(0), answer(1)])
    path.write_bytes(path.read_bytes()[:-cut])
    journal = Journal(path)
    assert set(journal.answers) == {(0, "p")}
    journal.append([answer(1)])
    assert set(Journal(path).answers) == {(0, "p"), (1, "p")}
    assert [json.loads(line)["row"] for line in path.read_text().splitlines()] == [0, 1]


@pytest.mark.parametrize("damage", ["{broken", "[]", '{"row": 1}', ""])
def test_a_damaged_line_is_named_and_left_alone(tmp_path, damage):
    path = tmp_path / "j.jsonl"
    Journal(path).append([answer(0), answer(1)])
    lines = path.read_text().splitlines()
    path.write_text("\n".join([damage, lines[1]]) + "\n")
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"j\.jsonl line 1 is damaged.*--fresh"):
        Journal(path)
    assert path.read_bytes() == before


def test_an_answer_to_another_prompt_is_another_answer(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    journal.append([answer(0)])
    assert (0, "other prompt") not in journal.answers


def test_record_round_trip(tmp_path):
    path = tmp_path / "deep" / "r.json"
    record = {"schema_version": records.SCHEMA_VERSION, "x": [1, 2.5, None], "text": "文"}
    records.write(path, record)
    assert records.read(path) == record
    assert [p.name for p in path.parent.iterdir()] == ["r.json"]


def test_a_failed_write_leaves_the_old_record(tmp_path):
    path = tmp_path / "r.json"
    records.write(path, {"schema_version": records.SCHEMA_VERSION})
    with pytest.raises(TypeError):
        records.write(path, {"schema_version": 1, "x": object()})
    assert records.read(path) == {"schema_version": records.SCHEMA_VERSION}
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


@pytest.mark.parametrize(
    "content, problem",
    [
        ('{"schema_version": 1, "x"', "truncated or no JSON"),
        ("[1]", "no result record"),
        ('{"a": 1}', "no result record"),
        ('{"schema_version": 99}', "schema version 99"),
    ],
)
def test_bad_records_are_named(tmp_path, content, problem):
    path = tmp_path / "r.json"
    path.write_text(content)
    with pytest.raises(UserError, match=problem) as caught:
        records.read(path)
    assert str(path) in str(caught.value) and "move it away" in str(caught.value)
    assert path.read_text() == content
