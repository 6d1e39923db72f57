"""A finished run as one reads it, from its folder or from a bundle: a handful of files to be handed over.

A bundle holds what a run folder holds, in few files:

    records.jsonl      a header, then one record per line (cells, then efficiency measurements)
    answers.parquet    one row per cell: what it answered to each document, and the long columns of its record
    questions.parquet  the documents without their images, so that answers can be scored again
    leaderboard.md, leaderboard.csv, figures, index.html: as the run wrote them

`read` gives both the same form. Records come back exactly as they were written, checksums included.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path

from harness.store import atomic, records
from harness.store.journal import Answer, Journal
from methods.errors import UserError

#: a cell by (task, method spec, budget)
Address = tuple[str, str, "int | float | None"]
RECORDS, ANSWERS, QUESTIONS = "records.jsonl", "answers.parquet", "questions.parquet"
#: what else of a run goes into its bundle, by pattern
_FURTHER = (
    QUESTIONS, "leaderboard.md", "leaderboard.csv", "evidence.md", "prediction.md", "equal_cost.md",
    "equal_cost.csv", "*.png", "*.svg",
    "adaptive_*.json", "adaptive_*.md", "index.html",
)  # fmt: skip
#: columns of a record that are as long as its documents or clusters: (part, column)
_LONG = (
    ("documents", "row"), ("documents", "score"), ("documents", "kept"),
    ("units", "cluster"), ("units", "stratum"), ("units", "counts"),
)  # fmt: skip
#: stands for a value in the header's list of that name; texts up to so many characters stay where they are
_SHARED, _SHORT = "$shared", 60
_QUESTION = ("image", "group", "document")
_ANSWER = (
    "row", "prompt", "text", "input_tokens", "image_tokens", "output_tokens", "visual_tokens", "kept",
    "merged",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A run's files, read.

    Attributes:
        folder: where they are.
        cells: records of finished and failed cells by address. Of several records of one cell (other
            documents, an edited method) the latest counts.
        efficiency: records of measurements by (spec, budget).
        repeated: (spec, budget) of those that have several records.
        answers: by address, the answers to the record's documents, in their order; not there for cells whose
            answers are not in the files.
        questions: by task and row number: "document" as its data set has it, but for the image; "image", its
            identity; "group", the key of the documents that are scored together with it.
        header: of a bundle; None for a run folder.
        damaged: (file, what is wrong) of records and journals that are left out.

    Every record carries its file under the key "path".
    """

    folder: Path
    cells: Mapping[Address, dict]
    efficiency: Mapping[tuple, dict]
    repeated: frozenset[tuple] = frozenset()
    answers: Mapping[Address, Sequence[Answer]] = field(default_factory=dict)
    questions: Mapping[str, Mapping[int, dict]] = field(default_factory=dict)
    header: Mapping | None = None
    damaged: Sequence[tuple[Path, str]] = ()

    @property
    def backbone(self) -> str:
        return next(iter(self.cells.values()))["backbone"]["name"]

    def name(self, address: Address) -> str:
        task, spec, budget = address
        return f"{self.folder.name}: {task}, {spec}" + ("" if budget is None else f" at {budget}")


def is_run(folder: Path) -> bool:
    """Whether `folder` looks like a run folder or a bundle."""
    return (folder / RECORDS).is_file() or (folder / "cells").is_dir()


def backbone_of(folder: Path) -> str | None:
    """The backbone's name that a bundle begins with, without reading all of it; None for anything else."""
    try:
        with (folder / RECORDS).open(encoding="utf-8") as file:
            return json.loads(file.readline())["backbone"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read(folder: Path, whole: bool = True) -> Run:
    """The run in `folder`, a run folder or a bundle.

    whole: False leaves records and journals out that are not what they should be (`Run.damaged`).
    Raises UserError, one line, if it is neither, and for any other file in it that is not what it should be.
    """
    damage = _Damage(whole)
    if (folder / RECORDS).is_file():
        return _read_bundle(folder, damage)
    if not (folder / "cells").is_dir():
        raise UserError(
            f"{folder} is no run folder and no bundle: it has neither cells/ nor {RECORDS}; name one that "
            "run_all.py (--out) or `harness bundle` wrote"
        )
    found: list[dict] = []
    for kind, pattern in (("cell", "cells/*/*.json"), ("efficiency", "efficiency/*.json")):
        for path in sorted(folder.glob(pattern)):
            with damage.noted(path):
                found.append({**records.read(path, kind), "path": path})
    run = _gathered(folder, found, damage)
    answers: dict[Address, list[Answer]] = {}
    for address, record in run.cells.items():
        if (path := _journal_of(folder, record)) is not None:
            with damage.noted(path):
                if (given := _journalled(path, record)) is not None:
                    answers[address] = given
    return replace(run, answers=answers, questions=read_questions(folder), damaged=tuple(damage.found))


class _Damage:
    """Collects what is wrong with single files; the first ends the reading if all must be whole."""

    def __init__(self, whole: bool):
        self._whole, self.found = whole, []

    @contextlib.contextmanager
    def noted(self, path: Path) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            if self._whole:
                raise
            reason = error.reason if isinstance(error, records.Damaged) else str(error)
            self.found.append((path, reason.removeprefix(f"{path} ")))


def _gathered(folder: Path, found: Sequence[dict], damage: _Damage) -> Run:
    cells: dict[Address, dict] = {}
    costs: dict[tuple, dict] = {}
    repeated = set()
    for record in found:
        own = (record["method"]["spec"], record["method"]["budget"])
        table, address = (cells, (record["task"], *own)) if record["kind"] == "cell" else (costs, own)
        other = table.get(address)
        if other is not None:
            repeated.add(own)
        if other is None or other["written"] < record["written"]:
            table[address] = record
    if not cells:
        if damage.found:
            path, problem = damage.found[0]
            raise UserError(f"{folder} holds no cell record that is whole: {path} {problem}")
        raise UserError(f"{folder} holds no cell records (cells/TASK/*.json)")
    return Run(folder, cells, costs, frozenset(repeated))


# ---- answers of a run folder


def _journal_of(folder: Path, record: Mapping) -> Path | None:
    """The file of the answers behind a cell's record, if it is there. Lines of schema version 1 say of no
    cell that they are its answers, so those do not count."""
    if record["status"] != "done" or not record.get("identity"):
        return None
    slug = record["path"].stem.rpartition("_")[0]
    key = records.digest(record["identity"].get("answers"))
    path = folder / "journal" / record["task"] / f"{slug}_{key}.jsonl"
    return path if path.exists() else None


def _journalled(path: Path, record: Mapping) -> list[Answer] | None:
    """The answers behind a cell's record, in the order of its documents; None if they are not all there."""
    by_row = {a.row: a for a in Journal(path).answers.values()}
    rows = record["documents"]["row"]
    return [by_row[row] for row in rows] if all(row in by_row for row in rows) else None


# ---- questions


def write_questions(folder: Path, questions: Mapping[str, Mapping[int, Mapping]]) -> None:
    """Write `questions.parquet`: by task and row number the document without its image, the identity of its
    image, and the key of the documents that are scored together with it."""
    rows = [
        {"task": task, "row": row, **{name: _as_json(question[name]) for name in _QUESTION}}
        for task, own in questions.items()
        for row, question in own.items()
    ]
    _write_parquet(folder / QUESTIONS, rows)


def _as_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def read_questions(folder: Path) -> dict[str, dict[int, dict]]:
    """What `write_questions` wrote; {} if there is none. Raises UserError if it is damaged."""
    found: dict[str, dict[int, dict]] = {}
    path = folder / QUESTIONS
    for entry in _read_parquet(path, ("task", "row", *_QUESTION)) if path.exists() else ():
        try:
            question = {name: json.loads(entry[name]) for name in _QUESTION}
            if not isinstance(question["document"], dict) or not isinstance(entry["row"], int):
                raise ValueError
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: row {entry['row']} of {entry['task']} is no question") from error
        found.setdefault(str(entry["task"]), {})[entry["row"]] = question
    return found


# ---- bundles


def run(folder: Path, out: Path | None) -> int:
    """`harness bundle`: make a bundle of a run folder and say what is in it."""
    found = read(folder)
    if found.header is not None:
        raise UserError(f"{folder} is a bundle already")
    out = out or folder.with_name(folder.resolve().name + "-bundle")
    written = write(found, out)
    for path in written:
        print(f"{path.stat().st_size / 1024:9,.0f} KiB  {path}")
    header = json.loads((out / RECORDS).read_text(encoding="utf-8").partition("\n")[0])
    print(f"\n{provenance(header)}\npython -m harness check {out} computes all of it anew")
    return 0


def write(run: Run, out: Path, without_answers: str = "") -> list[Path]:
    """Make a bundle of `run` in `out` (made if missing); the files written.

    without_answers: why answers are not there, if that is known. Raises UserError if `out` is not empty or
    cannot be written.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; name another folder with --out, or remove it")
    out.mkdir(parents=True, exist_ok=True)
    lines, rows = [], []
    for address, record in run.cells.items():
        light, long = _apart({k: v for k, v in record.items() if k != "path"})
        lines.append(light)
        answers = run.answers.get(address)
        given = {
            f"answer_{c}": [_plain(getattr(a, c)) for a in answers] if answers else None for c in _ANSWER
        }
        if long or answers:
            budget = None if address[2] is None else str(address[2])
            named = {"key": record.get("key"), "task": address[0], "method": address[1], "budget": budget}
            rows.append({**named, **long, **given})
    lines += [{k: v for k, v in record.items() if k != "path"} for record in run.efficiency.values()]
    columns = [f"{part}_{name}" for part, name in _LONG] + [f"answer_{c}" for c in _ANSWER]
    _write_parquet(out / ANSWERS, [{**dict.fromkeys(columns), **row} for row in rows])
    for pattern in _FURTHER:
        for path in sorted(run.folder.glob(pattern)):
            shutil.copyfile(path, out / path.name)
    if run.questions and not (out / QUESTIONS).exists():
        write_questions(out, run.questions)
    header = _header(run, out, without_answers)
    header["shared"], lines = _interned(lines)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in (header, *lines))
    atomic.replace(out / RECORDS, text.encode())
    return sorted(out.iterdir())


def _header(run: Run, out: Path, without_answers: str) -> dict:
    commits = Counter(r.get("git_commit") for r in (*run.cells.values(), *run.efficiency.values()))
    done = sum(r["status"] == "done" for r in run.cells.values())
    why = "" if len(run.answers) == done else without_answers or "the run folder has no journals of them"
    return {
        "schema_version": records.SCHEMA_VERSION,
        "kind": "bundle",
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "backbone": Path(run.backbone).name,
        "cells": len(run.cells),
        "cells_with_answers": len(run.answers),
        "without_answers": why,
        # whether every record was made from a clean commit that is known, and how many from which
        "clean": all(commit and not commit.endswith("+changes") for commit in commits),
        "commits": {commit or "unknown": number for commit, number in commits.items()},
        "files": {path.name: _sha256(path) for path in sorted(out.iterdir())},
    }


def provenance(header: Mapping) -> str:
    """What a bundle's header says of where it comes from, in a line."""
    commits = header["commits"]
    source = "a clean commit" if len(commits) == 1 else f"{len(commits)} clean commits"
    if not header["clean"]:
        changed = sum(n for c, n in commits.items() if c.endswith("+changes"))
        parts = [f"{changed} with uncommitted changes"] if changed else []
        if unknown := commits.get("unknown"):
            parts.append(f"{unknown} from an unknown commit")
        source = f"not from one clean commit ({', '.join(parts)}, of {sum(commits.values())} records)"
    answers = f"answers of {header['cells_with_answers']} of {header['cells']} cells"
    return f"{source}; {answers}" + (f" ({header['without_answers']})" if header["without_answers"] else "")


def _interned(lines: Sequence[dict]) -> tuple[list, list[dict]]:
    """What several records have in common (packages, backbone, code) written once, and the records with
    {"$shared": NUMBER} in its place."""
    counted: Counter[str] = Counter()

    def count(value: object) -> None:
        if isinstance(value, dict | list):
            counted[json.dumps(value)] += 1
            for inner in value.values() if isinstance(value, dict) else value:
                count(inner)

    def replaced(value: object) -> object:
        if not isinstance(value, dict | list):
            return value
        text = json.dumps(value)
        if counted[text] > 1 and len(text) > _SHORT:
            return {_SHARED: numbers.setdefault(text, len(numbers))}
        if isinstance(value, list):
            return [replaced(inner) for inner in value]
        return {name: replaced(inner) for name, inner in value.items()}

    for line in lines:
        count(line)
    numbers: dict[str, int] = {}
    light = [{name: replaced(value) for name, value in line.items()} for line in lines]
    return [json.loads(text) for text in numbers], light


def _whole(value: object, shared: Sequence) -> object:
    """The inverse of `_interned`. Raises IndexError or TypeError for a number that is none."""
    if isinstance(value, list):
        return [_whole(inner, shared) for inner in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {_SHARED}:
        if value[_SHARED] < 0:
            raise IndexError
        return shared[value[_SHARED]]
    return {name: _whole(inner, shared) for name, inner in value.items()}


def _apart(record: dict) -> tuple[dict, dict]:
    """A record without its long columns, and those by name of their parquet column. A column that would not
    come back exactly as it was (numbers of mixed kinds) stays in the record."""
    light, long = dict(record), {}
    for part, name in _LONG:
        column = light.get(part, {}).get(name) if isinstance(light.get(part), dict) else None
        if isinstance(column, list) and column and _uniform(column, name):
            long[f"{part}_{name}"] = column
            light[part] = {k: v for k, v in light[part].items() if k != name}
    return light, long


def _uniform(column: Sequence, name: str) -> bool:
    kind = {"row": int, "kept": int, "score": float, "counts": float}.get(name, str)
    if name == "counts":
        return all(isinstance(row, list) and all(type(v) is float for v in row) for row in column)
    return all(type(value) is kind for value in column)


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


def _read_bundle(folder: Path, damage: _Damage) -> Run:
    path = folder / RECORDS
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    header = _parsed(path, 1, lines[0]) if lines else {}
    _check_header(path, header)
    columns = {row["key"]: row for row in _answers_file(folder)}
    found = []
    for number, line in enumerate(lines[1:], 2):
        with damage.noted(path):
            found.append({**_record(path, number, line, header, columns), "path": path})
    run = _gathered(folder, found, damage)
    answers: dict[Address, list[Answer]] = {}
    for address, record in run.cells.items():
        with damage.noted(folder / ANSWERS):
            if (given := _bundled(folder, columns.get(record.get("key")))) is not None:
                answers[address] = given
    questions = read_questions(folder)
    return replace(run, answers=answers, questions=questions, header=header, damaged=tuple(damage.found))


def _record(path: Path, number: int, line: str, header: Mapping, columns: Mapping[str, Mapping]) -> dict:
    """The record that a line of a bundle holds. Raises UserError if it holds none that is whole."""
    record = _parsed(path, number, line)
    try:
        record = _whole(record, header.get("shared", []))
    except (IndexError, TypeError) as error:
        raise UserError(f"{path} line {number} names a shared part that the header lacks") from error
    kind = record.get("kind")
    if kind not in ("cell", "efficiency"):
        raise UserError(f"{path} line {number} is of kind {kind!r}, neither cell nor efficiency")
    if kind == "cell":
        record = _together(record, columns.get(record.get("key"), {}))
    if problem := records.problem_with(record, kind):
        raise UserError(f"{path} line {number} {problem}; restore the bundle")
    return record


def _parsed(path: Path, number: int, line: str) -> dict:
    try:
        body = records.parsed(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} line {number} is truncated or no JSON ({error})") from error
    if not isinstance(body, dict):
        raise UserError(f"{path} line {number} is no record")
    return body


_HEADER = {"commits": dict, "clean": bool, "files": dict, "cells": int, "cells_with_answers": int,
           "without_answers": str}  # fmt: skip


def _check_header(path: Path, header: Mapping) -> None:
    if header.get("kind") != "bundle":
        raise UserError(f"{path} does not begin with a bundle's header; make it with `harness bundle`")
    for name, kind in _HEADER.items():
        if not isinstance(header.get(name), kind):
            raise UserError(f"{path}: its header has no proper {name!r}; make it anew with `harness bundle`")
    if not all(type(n) is int for n in header["commits"].values()):
        raise UserError(f"{path}: its header has no proper 'commits'; make it anew with `harness bundle`")


def _answers_file(folder: Path) -> Iterator[dict]:
    if (folder / ANSWERS).exists():
        yield from _read_parquet(folder / ANSWERS, ("key",))


def _together(light: dict, columns: Mapping) -> dict:
    record = dict(light)
    for part in dict.fromkeys(part for part, _ in _LONG):
        if isinstance(own := record.get(part), dict):
            names = [name for other, name in _LONG if other == part]
            long = {name: columns.get(f"{part}_{name}") for name in names}
            own = own | {name: column for name, column in long.items() if column is not None}
            # in the order in which the run writes them
            record[part] = {name: own[name] for name in [*names, *own] if name in own}
    return record


def _bundled(folder: Path, columns: Mapping | None) -> list[Answer] | None:
    if columns is None or columns.get("answer_row") is None:
        return None
    lists = {name: columns.get(f"answer_{name}") for name in _ANSWER}
    for name in ("kept", "merged"):  # only some answers have them
        lists[name] = lists[name] or [None] * len(lists["row"])
    if None in lists.values() or len(set(map(len, lists.values()))) != 1:
        raise UserError(f"{folder / ANSWERS}: cell {columns['key']} has answers of unequal length")
    answers = [
        Answer(**{name: tuple(v) if isinstance(v, list) else v for name, v in zip(lists, values)})
        for values in zip(*lists.values())
    ]
    if any(None in (a.row, a.text, a.visual_tokens) for a in answers):
        raise UserError(f"{folder / ANSWERS}: cell {columns['key']} has answers that lack something")
    return answers


def _write_parquet(path: Path, rows: Sequence[Mapping]) -> None:
    import io

    import pyarrow
    import pyarrow.parquet

    content = io.BytesIO()
    table = pyarrow.Table.from_pylist(list(rows), schema=_schema(path.name))
    pyarrow.parquet.write_table(table, content, compression="zstd", compression_level=12)
    atomic.replace(path, content.getvalue())


def _schema(name: str):
    import pyarrow as pa

    if name == QUESTIONS:
        parts = [(part, pa.string()) for part in _QUESTION]
        return pa.schema([("task", pa.string()), ("row", pa.int64()), *parts])
    text, whole, real = pa.list_(pa.string()), pa.list_(pa.int64()), pa.list_(pa.float64())
    long = {"row": whole, "kept": whole, "score": real, "counts": pa.list_(real)}
    answer = {"prompt": text, "text": text, "visual_tokens": pa.list_(whole), "kept": pa.list_(whole),
              "merged": pa.list_(whole)}  # fmt: skip
    return pa.schema(
        [(name, pa.string()) for name in ("key", "task", "method", "budget")]
        + [(f"{part}_{name}", long.get(name, text)) for part, name in _LONG]
        + [(f"answer_{name}", answer.get(name, whole)) for name in _ANSWER]
    )


def _read_parquet(path: Path, needed: Sequence[str]) -> list[dict]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:  # read_table would import pyarrow.dataset first
            table = file.read()
        table = table.cast(pyarrow.schema([f for f in _schema(path.name) if f.name in table.column_names]))
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is damaged, or no file of a bundle ({reason})") from error
    if lacking := [name for name in needed if name not in table.column_names]:
        raise UserError(f"{path} lacks the column {lacking[0]}")
    return table.to_pylist()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def changed_files(run: Run) -> Iterator[tuple[str, str]]:
    """Files of a bundle that are not as its header says: (name, what is wrong)."""
    for name, digest in (run.header or {}).get("files", {}).items():
        path = run.folder / str(name)
        if path.parent != run.folder or not path.is_file():
            yield str(name), "is missing"
        elif _sha256(path) != digest:
            yield str(name), "was changed after the bundle was made"
