"""Files that are at every moment the old one or the whole new one, and what to do with files that are not."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def replace(path: Path, content: bytes) -> None:
    """Write `content` to disk beside `path`, then put it in `path`'s place in one step."""
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
        Path(temporary).unlink(missing_ok=True)
        raise


def remove_unfinished(folder: Path) -> list[Path]:
    """Remove what `replace` leaves below `folder` when the process is killed in the middle of it. Only safe
    while nobody else writes there. Returns the removed paths."""
    found = sorted(folder.rglob(".*.tmp"))
    for path in found:
        path.unlink()
    return found


def move_aside(path: Path) -> Path:
    """Rename a damaged file or folder to NAME.broken (.broken2, ... if there is one) and return that path."""
    number = 1
    while True:
        target = path.with_name(f"{path.name}.broken{number if number > 1 else ''}")
        if not target.exists():
            return path.rename(target)
        number += 1
