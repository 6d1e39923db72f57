"""SHA-256 of large files, in full, each computed once: weights and data sets are told apart by it.

A digest is remembered in the user's cache by the file's path, size, times of change and inode. The Hugging
Face cache names its large files by their SHA-256 already; there the name is taken.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

#: smaller files are read every time
REMEMBERED_FROM = 32 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
#: a file changed so lately may change again without a new time
_SETTLED_NS = 3_000_000_000


def of_files(files: Iterable[tuple[str, Path]]) -> str:
    """16 hex digits over the names and the whole contents of the files, in order. Raises OSError if one
    cannot be read."""
    files = list(files)
    memory = _load()
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:
        digests = list(threads.map(lambda named: _of_file(named[1], memory), files))
    new = {path: entry for _, entries in digests for path, entry in entries.items()}
    if new:
        _remember(new)
    total = hashlib.sha256()
    for (name, _), (digest, _) in zip(files, digests):
        total.update(f"{name}:{digest};".encode())
    return total.hexdigest()[:16]


def _of_file(path: Path, memory: dict[str, list]) -> tuple[str, dict[str, list]]:
    """The file's SHA-256, and what is to be remembered of it."""
    target = path.resolve()
    if path.is_symlink() and target.parent.name == "blobs" and _SHA256.fullmatch(target.name):
        return target.name, {}
    before = _state(target)
    known = memory.get(str(target))
    if known is not None and known[:-1] == before:
        return known[-1], {}
    with target.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else _read(file)
    size, *times, _ = before
    settled = max(times) < time.time_ns() - _SETTLED_NS and _state(target) == before
    entry = {str(target): [*before, digest.hexdigest()]}
    return digest.hexdigest(), entry if settled and size >= REMEMBERED_FROM else {}


def _read(file):
    total = hashlib.sha256()
    while block := file.read(1 << 20):
        total.update(block)
    return total


def _state(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def cache_file() -> Path:
    """Where digests are remembered."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "visual-token-pruning-bench" / "digests.json"


def _load() -> dict[str, list]:
    """What is remembered; nothing where the file is missing, unreadable or damaged."""
    try:
        body = json.loads(cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError, RecursionError):
        return {}
    if not isinstance(body, dict):
        return {}
    return {path: entry for path, entry in body.items() if _well_formed(entry)}


def _well_formed(entry: object) -> bool:
    return (
        isinstance(entry, list)
        and len(entry) == 5
        and all(type(number) is int for number in entry[:-1])
        and isinstance(entry[-1], str)
        and _SHA256.fullmatch(entry[-1]) is not None
    )


def _remember(new: dict[str, list]) -> None:
    """Add to the cache file in one step, without files that are gone. Where that cannot be done nothing is
    remembered."""
    with contextlib.suppress(OSError, RuntimeError):
        target = cache_file()
        target.parent.mkdir(parents=True, exist_ok=True)
        kept = {path: entry for path, entry in {**_load(), **new}.items() if os.path.exists(path)}
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".digests.", suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(kept, file)
            os.replace(temporary, target)
        except BaseException:
            os.unlink(temporary)
            raise
