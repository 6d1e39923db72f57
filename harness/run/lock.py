"""One run at a time on an --out folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from harness.store import atomic
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
    except OSError as error:
        with atomic.reported(out / ".lock"):
            raise error
    try:
        yield
    finally:
        lock.release()


class Place:
    """The folder that a run began to write to, wherever its name may lead later."""

    def __init__(self, out: Path):
        self.out = out
        with atomic.reported(out, "opened"):
            self._handle = os.open(out, os.O_RDONLY)

    def check(self) -> None:
        """Raises UserError if the folder was deleted, or another one has its name."""
        try:
            if os.path.samestat(os.fstat(self._handle), os.stat(self.out)):
                return
        except OSError:
            pass
        raise UserError(
            f"{self.out} was removed or replaced while the run wrote to it; the same command begins again "
            "with what is there"
        )

    def close(self) -> None:
        os.close(self._handle)
