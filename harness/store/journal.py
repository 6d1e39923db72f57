"""The answers of one cell, one JSON line each, on disk as soon as their batch is done.

A killed run loses at most the batch in flight. Several processes that answer one cell together write a file
each, NAME.rank0.jsonl and so on beside NAME.jsonl, which none of them touches: their lines never interleave,
and all begin from the same answers, whenever they read them. `mend` brings the files together.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterable, Iterator
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
    that entered each layer of the language model, as measured.
    """

    row: int
    prompt: str
    text: str
    input_tokens: int
    image_tokens: int
    output_tokens: int
    visual_tokens: tuple[int, ...]

    @property
    def key(self) -> tuple[int, str]:
        """What it is the answer to."""
        return self.row, self.prompt


class Journal:
    """Append-only JSONL of `Answer`s; `answers` maps (row, prompt) to what is there.

    rank: of the process, where several answer the cell: each appends to a file of its own. A cut last line
    (the process died while writing it) is left out and replaced by the next append. Raises UserError for any
    other unreadable line; a run calls `mend` first, which sets both aside.
    """

    def __init__(self, path: Path, rank: int | None = None):
        self.path = Path(path)
        self.answers: dict[tuple[int, str], Answer] = {}
        self._good_bytes = 0  # length of the file up to and with the last complete line
        if self.path.exists():
            self._load()
        if rank is not None:
            self.path, self._good_bytes = rank_path(self.path, rank), 0

    def _load(self) -> None:
        *complete, _cut = self.path.read_bytes().split(b"\n")
        for number, line in enumerate(complete, 1):
            self._good_bytes += len(line) + 1
            try:
                answer = _parse(line)
            except ValueError as error:
                raise UserError(
                    f"{self.path} line {number} is damaged; move it away or pass --fresh to answer again"
                ) from error
            self.answers[answer.key] = answer

    def append(self, answers: Iterable[Answer]) -> None:
        """Write and flush to disk, and only then count the answers as there."""
        answers = list(answers)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = b"".join(map(_line, answers))
        with open(self.path, "ab") as file:
            file.truncate(self._good_bytes)
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
        self._good_bytes += len(lines)
        self.answers.update({a.key: a for a in answers})


def rank_path(path: Path, rank: int) -> Path:
    """The file of one of several processes beside the journal at `path`."""
    return path.with_name(f"{path.stem}.rank{rank}{path.suffix}")


def remove(path: Path) -> None:
    """Forget the answers at `path`, those of single processes included (`--fresh`)."""
    for file in _files(path):
        file.unlink()


def mend(path: Path) -> Iterator[str]:
    """Make the journal at `path` one file of whole lines again; yields what had to be set aside.

    Unreadable lines go to NAME.jsonl.broken, the files of single processes into the journal (of two answers
    to one question the first stays). Killed at any moment, the next call does what is left. Only safe
    while nobody appends. Exhaust it: it works as it is read.
    """
    files = _files(path)
    answers: dict[tuple[int, str], Answer] = {}
    whole = files in ([], [path])
    for file in files:
        content = file.read_bytes()
        lines = content.removesuffix(b"\n").split(b"\n") if content else []
        broken: dict[int, bytes] = {}
        for number, line in enumerate(lines, 1):
            try:
                answer = _parse(line)
            except ValueError:
                broken[number] = line
            else:
                answers.setdefault(answer.key, answer)
        whole = whole and not broken and content[-1:] in (b"", b"\n")
        if broken:
            aside = path.with_name(path.name + ".broken")
            with open(aside, "ab") as out:
                out.writelines(line + b"\n" for line in broken.values())
                out.flush()
                os.fsync(out.fileno())
            numbers = ", ".join(map(str, broken))
            yield (
                f"DAMAGED journal {file}, line {numbers}: moved to {aside.name}; what it answered is "
                "computed anew"
            )
    if not whole:
        atomic.replace(path, b"".join(map(_line, answers.values())))
    for file in files:
        if file != path:
            file.unlink()


def _files(path: Path) -> list[Path]:
    """The journal at `path`, if there, and those of single processes."""
    further = path.parent.glob(f"{glob.escape(path.stem)}.rank*{path.suffix}")
    return [p for p in (path, *sorted(further)) if p.exists()]


def _line(answer: Answer) -> bytes:
    return (json.dumps(asdict(answer), ensure_ascii=False) + "\n").encode()


def _parse(line: bytes) -> Answer:
    """ValueError if `line` is no answer."""
    try:
        fields = json.loads(line)
        return Answer(**{**fields, "visual_tokens": tuple(fields["visual_tokens"])})
    except (TypeError, KeyError) as error:
        raise ValueError(str(error)) from error
