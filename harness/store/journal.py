"""The answers of one cell, one JSON line each, on disk as soon as their batch is done.

A killed run loses at most the batch in flight. Several processes that answer one cell together write a file
each, NAME.rank0.jsonl and so on beside NAME.jsonl, which none of them touches: their lines never interleave,
and all begin from the same answers, whenever they read them. `mend` brings the files together.

A line says which cell it is of (`Cell.answers_key`, which ends the file's name) and carries a checksum, so
that a line that was edited, or that comes from another cell's journal, is not taken for an answer.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from harness.store import atomic
from methods.errors import UserError


@dataclass(frozen=True)
class Answer:
    """One generated answer.

    `row` is the document's row number in the benchmark's file; `prompt` a digest of the prompt text and the
    generation settings, so that an answer to a changed prompt is not taken for this one; `input_tokens` the
    full-length prompt's tokens, of which `image_tokens` are image places; `visual_tokens` the visual tokens
    that entered each layer of the language model, as measured; `kept` which of the image's visual tokens were
    left in the last layer (below 0: made by the method), in the order of choice where the method has one, and
    only for the questions of the page's explorer and those with an answer key; `merged`, for methods that
    merge, which of `kept` (by place) took in each of the image's visual tokens (-1: none, or itself there).
    """

    row: int
    prompt: str
    text: str
    input_tokens: int
    image_tokens: int
    output_tokens: int
    visual_tokens: tuple[int, ...]
    kept: tuple[int, ...] | None = None
    merged: tuple[int, ...] | None = None

    @property
    def key(self) -> tuple[int, str]:
        """What it is the answer to."""
        return self.row, self.prompt


class Journal:
    """Append-only JSONL of `Answer`s; `answers` maps (row, prompt) to what is there.

    path: its name ends in _KEY.jsonl, with the `answers_key` of the cell. rank: of the process, where several
    answer the cell: each appends to a file of its own. A cut last line (the process died while writing it) is
    left out and replaced by the next append. Raises UserError for any other line that is not an answer of the
    cell; a run calls `mend` first, which sets both aside.
    """

    def __init__(self, path: Path, rank: int | None = None):
        self.path = Path(path)
        self.answers: dict[tuple[int, str], Answer] = {}
        self._key = _key(self.path)
        self._good_bytes = 0  # length of the file up to and with the last complete line
        if self.path.exists():
            self._load()
        if rank is not None:
            self.path, self._good_bytes = rank_path(self.path, rank), 0

    def _load(self) -> None:
        with atomic.reported(self.path, "read"):
            *complete, _cut = self.path.read_bytes().split(b"\n")
        for number, line in enumerate(complete, 1):
            self._good_bytes += len(line) + 1
            try:
                answer = _parse(line, self._key)
            except ValueError as error:
                raise UserError(
                    f"{self.path} line {number} is damaged ({error}); move it away or pass --fresh to answer "
                    "again"
                ) from error
            self.answers[answer.key] = answer

    def append(self, answers: Iterable[Answer]) -> None:
        """Write and flush to disk, and only then count the answers as there.

        Raises UserError if that cannot be done; nothing of these answers is in the file then.
        """
        answers = list(answers)
        lines = b"".join(_line(answer, self._key) for answer in answers)
        with atomic.reported(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab", buffering=0) as file:
                if os.fstat(file.fileno()).st_size < self._good_bytes:
                    raise UserError(
                        f"{self.path} was removed or cut while the run wrote to it; the same command "
                        "computes what it held"
                    )
                file.truncate(self._good_bytes)
                try:
                    _write(file, lines)
                    os.fsync(file.fileno())
                except OSError:
                    with contextlib.suppress(OSError):  # room for the next try, and no half line
                        file.truncate(self._good_bytes)
                    raise
        self._good_bytes += len(lines)
        self.answers.update({a.key: a for a in answers})


def _write(file, content: bytes) -> None:
    """All of it: on a full disk an unbuffered write may take a part only, before the next one fails."""
    view = memoryview(content)
    while len(view):
        view = view[file.write(view) :]


def rank_path(path: Path, rank: int) -> Path:
    """The file of one of several processes beside the journal at `path`."""
    return path.with_name(f"{path.stem}.rank{rank}{path.suffix}")


def remove(path: Path) -> None:
    """Forget the answers at `path`, those of single processes included (`--fresh`)."""
    for file in _files(path):
        file.unlink()


def mend(path: Path) -> Iterator[str]:
    """Make the journal at `path` one file of whole lines again; yields what had to be set aside.

    Lines that are unreadable, edited, another cell's, or there twice go to NAME.jsonl.broken, the files of
    single processes into the journal (of two processes' answers to one question the first stays). Killed at
    any moment, the next call does what is left. Only safe while nobody appends. Exhaust it: it works as it is
    read. Raises UserError if a file cannot be read or written.
    """
    files, key = _files(path), _key(path)
    answers: dict[tuple[int, str], Answer] = {}
    whole = files in ([], [path])
    for file in files:
        with atomic.reported(file, "read"):
            content = file.read_bytes()
        lines = content.removesuffix(b"\n").split(b"\n") if content else []
        broken: dict[int, bytes] = {}
        reasons: dict[str, None] = {}
        own: set[tuple[int, str]] = set()
        for number, line in enumerate(lines, 1):
            try:
                answer = _parse(line, key)
                if answer.key in own:
                    raise ValueError("there twice")
            except ValueError as error:
                broken[number] = line
                reasons[str(error)] = None
            else:
                own.add(answer.key)
                answers.setdefault(answer.key, answer)
        whole = whole and not broken and content[-1:] in (b"", b"\n")
        if broken:
            aside = path.with_name(path.name + ".broken")
            with atomic.reported(aside), open(aside, "ab") as out:
                out.writelines(line + b"\n" for line in broken.values())
                out.flush()
                os.fsync(out.fileno())
            numbers = ", ".join(map(str, broken))
            yield (
                f"DAMAGED journal {file}, line {numbers}: moved to {aside.name} ({', '.join(reasons)}); what "
                "it answered is computed anew"
            )
    if not whole:
        atomic.replace(path, b"".join(_line(answer, key) for answer in answers.values()))
    for file in files:
        if file != path:
            file.unlink()


def _files(path: Path) -> list[Path]:
    """The journal at `path`, if there, and those of single processes."""
    further = path.parent.glob(f"{glob.escape(path.stem)}.rank*{path.suffix}")
    return [p for p in (path, *sorted(further)) if p.exists()]


def _key(path: Path) -> str:
    """The cell that the journal at `path` is of."""
    return path.stem.rpartition("_")[2]


def _line(answer: Answer, key: str) -> bytes:
    body = {name: value for name, value in asdict(answer).items() if value is not None} | {"cell": key}
    return (json.dumps({**body, "check": _checksum(body)}, ensure_ascii=False) + "\n").encode()


def _checksum(body: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:8]


def _parse(line: bytes, key: str) -> Answer:
    """The answer that `line` holds; ValueError, in words, if it is none of the cell `key`."""
    try:
        fields = json.loads(line)
        check, cell = fields.pop("check"), fields.pop("cell")
        lists = {name: tuple(fields[name]) for name in ("visual_tokens", "kept", "merged") if name in fields}
        answer = Answer(**{**fields, **lists})
    except (AttributeError, TypeError, KeyError, ValueError, RecursionError) as error:
        raise ValueError("unreadable") from error
    if check != _checksum({**fields, "cell": cell}):
        raise ValueError("edited")
    if cell != key:
        raise ValueError("another cell's")
    return answer
