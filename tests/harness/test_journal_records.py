"""Journal and records: nothing lost, nothing silently wrong."""

import json

import pytest

from harness.store import atomic, records
from harness.store.journal import Answer, Journal, mend, remove
from methods.errors import UserError


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


@pytest.mark.parametrize(
    "damage", [b"{broken", b"[]", b'{"row": 1}', b"", b"\xff\xfe", b'{"row": 1, "visual_']
)
@pytest.mark.parametrize("last", [False, True])
def test_mending_sets_unreadable_lines_aside(tmp_path, damage, last):
    path = tmp_path / "j.jsonl"
    Journal(path).append([answer(0), answer(1)])
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], lines[1], damage] if last else [damage, *lines, b""]))
    (said,) = mend(path) if damage or not last else ["j.jsonl, line 3: j.jsonl.broken"]
    assert f"{path.name}, line {3 if last else 1}: " in said and "j.jsonl.broken" in said
    assert path.read_bytes().splitlines() == lines and path.read_bytes().endswith(b"\n")
    if damage or not last:
        assert (tmp_path / "j.jsonl.broken").read_bytes() == damage + b"\n"
    assert list(mend(path)) == [] and set(Journal(path).answers) == {(0, "p"), (1, "p")}


def test_mending_keeps_a_whole_last_line_without_its_newline(tmp_path):
    path = tmp_path / "j.jsonl"
    Journal(path).append([answer(0), answer(1)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert list(mend(path)) == [] and path.read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == ["j.jsonl"]


def test_several_processes_write_files_of_their_own(tmp_path):
    path = tmp_path / "a.b" / "j.jsonl"
    Journal(path).append([answer(0)])
    first, second = Journal(path, rank=0), Journal(path, rank=1)
    first.append([answer(1)])
    second.append([answer(2)])
    second.append([answer(3), answer(1)])
    assert list(Journal(path, rank=2).answers) == [(0, "p")], "all begin from the same answers"
    assert list(mend(path)) == [] and [p.name for p in path.parent.iterdir()] == ["j.jsonl"]
    assert [json.loads(line)["row"] for line in path.read_text().splitlines()] == [0, 1, 2, 3]
    Journal(path, rank=2).append([answer(4)])
    remove(path)
    assert list(path.parent.iterdir()) == [] and list(mend(path)) == []


def test_a_damaged_record_is_moved_aside_under_a_free_name(tmp_path, caplog):
    caplog.set_level("INFO", "harness")
    path = tmp_path / "r.json"
    assert records.read_or_move_aside(path) is None and not caplog.messages
    for name in ("r.json.broken", "r.json.broken2"):
        path.write_text('{"schema_ver' + name)
        assert records.read_or_move_aside(path) is None
        start = f"DAMAGED record {path}: moved to {name}; it is computed anew (the file is truncated"
        assert caplog.messages[-1].startswith(start)
        assert (tmp_path / name).read_text().endswith(name) and not path.exists()
    path.write_text('{"schema_version": 99}')
    with pytest.raises(UserError, match="schema version 99"):
        records.read_or_move_aside(path)
    assert path.exists()


def test_unfinished_writes_are_removed_and_nothing_else(tmp_path):
    """Every `.*.tmp` anywhere below --out was removed, a user's own files too."""
    cell = "fastv_16_0123456789ab.json"
    kept = [
        tmp_path / name
        for name in (
            ".lock", ".notes.tmp", ".report.abcdefgh.tmp", f"cells/pope/{cell}", "cells/pope/.mine.tmp",
            f"thesis/.{cell}.abcdefgh.tmp", f".{cell}.abcdefgh.tmp", f"cells/pope/deep/.{cell}.abcdefgh.tmp",
            f"cells/pope/.{cell}.tmp", "efficiency/.x_16.json.abcdefgh.tmp",
        )
    ]  # fmt: skip
    cut = [
        tmp_path / "cells" / "pope" / f".{cell}.a_cdefg1.tmp",
        tmp_path / "efficiency" / f".{cell}.abcdefgh.tmp",
        tmp_path / "journal" / "pope" / f".{cell}l.abcdefgh.tmp",
        *(tmp_path / f".{name}.abcdefgh.tmp" for name in atomic.AT_THE_END),
    ]
    for path in (*kept, *cut):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert sorted(atomic.remove_unfinished(tmp_path)) == sorted(cut)
    assert all(p.exists() for p in kept) and not any(p.exists() for p in cut)


def test_a_killed_write_is_recognised(tmp_path, monkeypatch):
    """What `replace` leaves behind has one of the names that `remove_unfinished` looks for."""
    path = tmp_path / "journal" / "pope" / "a-k-3_16_0123456789ab.jsonl"
    monkeypatch.setattr(atomic.os, "replace", lambda *names: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr(atomic.os, "unlink", lambda name: None)
    with pytest.raises(KeyboardInterrupt):
        atomic.replace(path, b"")
    monkeypatch.undo()
    assert len(atomic.remove_unfinished(tmp_path)) == 1 and not list(path.parent.iterdir())


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
