"""One run at a time on an --out folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from methods.errors import UserError


@contextlib.contextmanager
def only_run(out: Path) -> Iterator[None]:
    """Inside, no other run writes to `out`: the second raises UserError at once.

    The operating system holds the lock for the process (flock), so a killed run leaves none behind; the file
    `.lock` stays, and means nothing by itself.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(out / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise UserError(
            f"another run is writing to {out}; wait until it is done, or choose another folder with --out"
        ) from error
    try:
        yield
    finally:
        lock.release()
