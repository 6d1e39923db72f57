"""Whatever happens to the output folder: one line that names it, exit code 2, nothing lost, and the same
command goes on."""

import ctypes
import errno
import json
import os
import re
import resource
import shutil
import signal
from pathlib import Path

import pandas as pd
import pytest
import short_run

from harness.cli import app
from harness.report import figures
from harness.store import journal, records
from harness.tasks import pruned_model


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """A second per run, and not looked at."""
    monkeypatch.setattr(figures, "draw", lambda *arguments: None)


@pytest.fixture(scope="module")
def reference(tiny_checkpoint, tiny_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("reference")
    assert app.run_all(short_run.arguments(tiny_checkpoint, tiny_data, out)) == 0
    return out


@pytest.fixture
def run(tiny_checkpoint, tiny_data, capsys):
    """run(out, *more) -> (exit code, standard output, standard error) of the command in this process."""

    def call(out, *more):
        code = app.run_all(short_run.arguments(tiny_checkpoint, tiny_data, out, *more))
        said = capsys.readouterr()
        return code, " ".join(said.out.split()), said.err  # lines are wrapped

    return call


def one_line(error: str, *words: str) -> None:
    assert error.startswith("error: ") and error.count("\n") == 1 and "Traceback" not in error, error
    for word in words:
        assert word in error


def at_answer(monkeypatch, number: int, action) -> None:
    """Do something to the disk before the answers of the `number`-th batch are journalled."""
    real, calls = pruned_model.answer, []

    def answer(*arguments):
        calls.append(1)
        if len(calls) == number:
            action()
        return real(*arguments)

    monkeypatch.setattr(pruned_model, "answer", answer)


# ---- the disk


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of 64 KiB and a function that makes it larger."""
    libc = ctypes.CDLL(None, use_errno=True)
    place = tmp_path / "small"
    place.mkdir()

    def mount(flags: int, size: str) -> int:
        return libc.mount(b"none", str(place).encode(), b"tmpfs", flags, f"size={size}".encode())

    if mount(0, "64k"):
        pytest.skip(f"mounting a tmpfs is not allowed here: {os.strerror(ctypes.get_errno())}")
    yield place, lambda: mount(32, "16m")  # MS_REMOUNT
    libc.umount2(str(place).encode(), 2)


def test_a_full_disk(small_disk, run, reference):
    place, enlarge = small_disk
    code, _, error = run(place)
    assert code == 2
    one_line(error, str(place), "No space left on device", "make room")
    enlarge()
    code, said, error = run(place)
    assert code == 0 and "DAMAGED" not in said, "a half line was left"
    short_run.assert_same(place, reference)


def test_a_limit_on_the_size_of_files(run, reference, tmp_path, monkeypatch):
    """`ulimit -f`: the limit is met in a journal; then, with room again, the run goes on."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, old[1]))
        code, _, error = run(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert code == 2
    one_line(error, "File too large", "ulimit -f")
    code, said, _ = run(tmp_path / "out")
    assert code == 0 and "DAMAGED" not in said
    short_run.assert_same(tmp_path / "out", reference)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_an_append_that_fails_leaves_whole_lines(tmp_path, monkeypatch, number):
    """Fault injection: half of the bytes reach the disk, then the device says no."""
    path = tmp_path / "fastv_16_0123456789ab.jsonl"
    first = journal.Journal(path)
    answer = journal.Answer(0, "p", "red", 9, 4, 1, (4, 4))
    first.append([answer])
    before, real = path.read_bytes(), journal._write

    def half(file, content):
        real(file, content[: len(content) // 2])
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(journal, "_write", half)
    with pytest.raises(Exception, match=os.strerror(number)) as caught:
        first.append([answer])
    assert str(path) in str(caught.value) and path.read_bytes() == before
    monkeypatch.undo()
    first.append([journal.Answer(1, "p", "red", 9, 4, 1, (4, 4))])
    assert list(journal.mend(path)) == [] and len(journal.Journal(path).answers) == 2


def test_the_folder_is_deleted_in_mid_run(run, reference, tmp_path, monkeypatch):
    out = tmp_path / "out"
    at_answer(monkeypatch, 5, lambda: shutil.rmtree(out))
    code, _, error = run(out)
    assert code == 2
    one_line(error, str(out), "removed")
    monkeypatch.undo()
    monkeypatch.setattr(figures, "draw", lambda *arguments: None)
    code, said, _ = run(out)
    assert code == 0 and "DAMAGED" not in said
    short_run.assert_same(out, reference)


def test_the_folder_is_another_one_in_mid_run(run, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def swap():
        out.rename(tmp_path / "moved")
        out.mkdir()

    at_answer(monkeypatch, 2, swap)
    code, _, error = run(out)
    assert code == 2
    one_line(error, str(out), "removed")
    assert not list(out.rglob("leaderboard*"))


def test_the_folder_is_read_only_in_mid_run(run, reference, tmp_path, monkeypatch):
    """Root may write everywhere, so that the system's answer is put in its place there."""
    out = tmp_path / "out"

    def close():
        if os.geteuid():
            for path in (out, *out.rglob("*")):
                path.chmod(0o555 if path.is_dir() else 0o444)
            return
        real = open

        def refused(path, *arguments, **named):
            if str(path).startswith(str(out)) and arguments[:1] == ("ab",):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return real(path, *arguments, **named)

        monkeypatch.setattr(journal, "open", refused, raising=False)

    at_answer(monkeypatch, 4, close)
    code, _, error = run(out)
    for path in (out, *out.rglob("*")):
        path.chmod(0o755)
    assert code == 2
    one_line(error, str(out), "Permission denied", "make it writable")
    monkeypatch.undo()
    monkeypatch.setattr(figures, "draw", lambda *arguments: None)
    assert run(out)[0] == 0
    short_run.assert_same(out, reference)


@pytest.mark.parametrize("name", ["leaderboard.md", "accuracy_budget.png", ".lock", "cells/mme/RECORD"])
def test_a_folder_where_a_file_belongs(run, reference, tmp_path, name):
    out = tmp_path / "out"
    shutil.copytree(reference, out)
    if name.endswith("RECORD"):
        name = f"cells/mme/{next((out / 'cells' / 'mme').iterdir()).name}"
    (out / name).unlink(missing_ok=True)
    (out / name).mkdir(parents=True)
    (out / name / "mine.txt").write_text("mine")
    code, _, error = run(out)
    assert code == 2
    one_line(error, name, "move")
    assert (out / name / "mine.txt").read_text() == "mine"


def test_a_long_spec_has_files_with_short_names(run, tmp_path):
    """A checkpoint's path of 250 characters made names too long for the disk, after all answers were
    computed."""
    from harness.run.config import Method

    spec = f"stepprune:checkpoint=/{'x' * 250}.safetensors"
    method = Method(spec, "stepprune", 64, {}, {})
    assert len(method.slug) < 100 and method.slug.endswith("_64")
    records.write(tmp_path / "cells" / f"{method.slug}_0123456789ab.json", {"schema_version": 2})
    code, _, error = run(tmp_path / ("y" * 300))
    assert code == 2
    one_line(error, "File name too long")


# ---- records and journals that are not what they should be


def cell_files(out: Path, task: str) -> list[Path]:
    return sorted((out / "cells" / task).glob("*.json"))


def test_swapped_and_edited_records_are_computed_anew(run, reference, tmp_path):
    """Another cell's valid record, records of two cells or two measurements exchanged, a score edited."""
    out = tmp_path / "out"
    shutil.copytree(reference, out)
    first, second, third = cell_files(out, "mme")
    (copied, *_) = cell_files(out, "pope")
    one, other, *_ = sorted((out / "efficiency").glob("*.json"))
    contents = [path.read_bytes() for path in (first, second, one, other)]
    for path, content in zip((second, first, other, one), contents):
        path.write_bytes(content)
    record = json.loads(third.read_text())
    record["metrics"]["score"] = 99.0
    third.write_text(json.dumps(record))
    copied.write_bytes(cell_files(reference, "pope")[1].read_bytes())
    code, said, _ = run(out)
    assert code == 0 and "2 finished earlier" in said
    for path in (first, second, third, copied, one, other):
        assert f"DAMAGED record {path}: moved to {path.name}.broken; it is computed anew" in said
    assert said.count("the record of something else") == 5 and said.count("its checksum does not fit") == 1
    short_run.assert_same(out, reference)


def test_foreign_edited_and_doubled_lines_are_computed_anew(run, reference, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(reference, out)
    shutil.rmtree(out / "cells")
    first, second, third = sorted((out / "journal" / "pope").glob("*.jsonl"))
    lines = {path: path.read_bytes().splitlines(keepends=True) for path in (first, second, third)}
    first.write_bytes(b"".join([*lines[first][:3], lines[second][3], *lines[first][4:]]))
    answer = json.loads(lines[second][2])
    edited = json.dumps({**answer, "text": answer["text"] + "!"}).encode() + b"\n"
    second.write_bytes(b"".join([*lines[second][:2], edited, *lines[second][3:]]))
    third.write_bytes(b"".join([*lines[third], lines[third][0]]))
    code, said, _ = run(out)
    assert code == 0
    bad = ((first, 4, "another cell's"), (second, 3, "edited"), (third, 13, "there twice"))
    for path, number, reason in bad:
        assert f"DAMAGED journal {path}, line {number}: moved to {path.name}.broken ({reason})" in said
    short_run.assert_same(out, reference)


# ---- what a run says


def test_all_cells_fail(run, tmp_path, monkeypatch):
    """A KeyError from the figures hid every FAILED line."""
    monkeypatch.undo()

    def broken(*arguments):
        raise ZeroDivisionError("no answer today")

    monkeypatch.setattr(pruned_model, "answer", broken)
    code, said, error = run(tmp_path / "out")
    assert code == 1 and "Traceback" not in error and "KeyError" not in said
    assert said.count("ZeroDivisionError: no answer today") == 6
    table = pd.read_csv(tmp_path / "out" / "leaderboard.csv")
    assert len(table) == 3 and (tmp_path / "out" / "leaderboard.md").read_text().count("failed") >= 6
    assert not list((tmp_path / "out").glob("*.png")), "empty figures"


def test_a_line_per_task_with_its_scores(reference, run, tmp_path):
    _, said, _ = run(tmp_path / "out")
    scores = r"after \d+ s; vanilla [\d.]+; pruned [\d.]+"
    assert re.search(rf"MME: 3 cells; 1 of 2 tasks {scores}", said)
    assert re.search(rf"POPE: 3 cells; 2 of 2 tasks {scores}", said)
    assert "timing the prefill of 3 methods" in said
