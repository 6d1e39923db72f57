"""The answers of one cell, one JSON line each, on disk as soon as their batch is done.

A killed run loses at most the batch in flight: a cut last line (the process died while writing it) is left
out and replaced by the next append. Any other unreadable line means that something else damaged the file:
then UserError names it, and nothing is overwritten.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from harness.errors import UserError


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


class Journal:
    """Append-only JSONL of `Answer`s; `answers` maps (row, prompt) to what is there."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.answers: dict[tuple[int, str], Answer] = {}
        self._good_bytes = 0  # length of the file up to and with the last complete line
        if self.path.exists():
            self._load()

    def _load(self) -> None:
        *complete, _cut = self.path.read_bytes().split(b"\n")
        for number, line in enumerate(complete, 1):
            self._good_bytes += len(line) + 1
            try:
                fields = json.loads(line)
                answer = Answer(**{**fields, "visual_tokens": tuple(fields["visual_tokens"])})
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(
                    f"{self.path} line {number} is damaged; move it away or pass --fresh to answer again"
                ) from error
            self.answers[answer.row, answer.prompt] = answer

    def append(self, answers: Iterable[Answer]) -> None:
        """Write and flush to disk, and only then count the answers as there."""
        answers = list(answers)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(asdict(a), ensure_ascii=False) + "\n" for a in answers).encode()
        with open(self.path, "ab") as file:
            file.truncate(self._good_bytes)
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
        self._good_bytes += len(lines)
        self.answers.update({(a.row, a.prompt): a for a in answers})

    def clear(self) -> None:
        """Forget everything (`--fresh`)."""
        self.path.unlink(missing_ok=True)
        self.answers.clear()
        self._good_bytes = 0
