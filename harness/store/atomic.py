"""Files that are at every moment the old one or the whole new one, and what to do with files that are not."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from methods.errors import UserError

_ADVICE = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.ENAMETOOLONG: "choose a shorter --out",
    errno.EISDIR: "move that folder away",
    errno.ENOTDIR: "move what stands in the way",
    errno.EROFS: "make it writable",
    errno.EACCES: "make it writable",
    errno.EPERM: "make it writable",
    errno.ENOENT: "it was removed while the run wrote to it",
}
#: what a run writes into its --out itself
AT_THE_END = (
    "leaderboard.md", "leaderboard.csv", "questions.parquet", "accuracy_budget.png", "accuracy_latency.png",
    "accuracy_flops.png", "accuracy_tokens.png", "accuracy_budget.svg", "accuracy_latency.svg",
    "accuracy_flops.svg", "accuracy_tokens.svg",
    "evidence.md", "prediction.md", "equal_cost.md", "equal_cost.csv", "index.html",
)  # fmt: skip
#: names of what a killed run leaves below its --out (see `replace`), by the folder they are in
_UNFINISHED = {
    "cells/*": r"\..+_[0-9a-f]{12}\.json\.[a-z0-9_]{8}\.tmp",
    "efficiency": r"\..+_[0-9a-f]{12}\.json\.[a-z0-9_]{8}\.tmp",
    "journal/*": r"\..+_[0-9a-f]{12}\.jsonl\.[a-z0-9_]{8}\.tmp",
    ".": rf"\.({'|'.join(map(re.escape, AT_THE_END))})\.[a-z0-9_]{{8}}\.tmp",
}


@contextlib.contextmanager
def reported(path: Path, doing: str = "written") -> Iterator[None]:
    """Inside, an OSError becomes a UserError that names `path`, the reason, and what to do."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        advice = _ADVICE.get(error.errno, "put that right")
        raise UserError(
            f"{path} cannot be {doing} ({reason}); {advice}, then the same command goes on from here"
        ) from error


def replace(path: Path, content: bytes) -> None:
    """Write `content` to disk beside `path`, then put it in `path`'s place in one step. Raises UserError,
    naming the path and the reason, if that cannot be done; the old file is there then."""
    with reported(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise


def remove_unfinished(out: Path) -> list[Path]:
    """Remove what `replace` leaves below a run's folder when the process is killed in the middle of it: files
    of our own names in the folders that a run makes, nothing else. Only safe while nobody else writes there.
    Returns the removed paths."""
    found = [
        path
        for folder, name in _UNFINISHED.items()
        for path in sorted(out.glob(f"{folder}/.*.tmp"))
        if re.fullmatch(name, path.name) and path.is_file() and not path.is_symlink()
    ]
    for path in found:
        with reported(path, "removed"):
            path.unlink()
    return found


def move_aside(path: Path) -> Path:
    """Rename a damaged file or folder to NAME.broken (.broken2, ... if there is one) and return that path."""
    number = 1
    while True:
        target = path.with_name(f"{path.name}.broken{number if number > 1 else ''}")
        if not target.exists():
            with reported(path, "moved aside"):
                return path.rename(target)
        number += 1
