"""Result files: JSON objects with a schema version, written atomically, read with a clear error."""

from __future__ import annotations

import functools
import json
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from harness.store import atomic
from methods.errors import UserError

SCHEMA_VERSION = 1
_PACKAGES = (
    "torch",
    "transformers",
    "lmms-eval",
    "datasets",
    "tokenizers",
    "torchvision",
    "pillow",
    "fvcore",
)


def write(path: Path, record: dict) -> None:
    """Write `record` so that the file is at every moment the old one or the whole new one.

    One top-level key a line: readable, and small diffs.
    """
    body = ",\n".join(f" {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in record.items())
    atomic.replace(path, ("{\n" + body + "\n}\n").encode())


class Damaged(UserError):
    """A file that should be a record of this program and is none."""


def read(path: Path) -> dict:
    """The record at `path`. Damaged if it is truncated or no record; UserError if it cannot be read or is of
    another schema version."""
    fix = "move it away (or pass --fresh) and run again"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {fix}") from error
    except ValueError as error:
        raise Damaged(f"{path} is truncated or no JSON ({error}); {fix}") from error
    if not isinstance(record, dict) or "schema_version" not in record:
        raise Damaged(f"{path} is no result record of this program; {fix}")
    if record["schema_version"] != SCHEMA_VERSION:
        raise UserError(f"{path} has schema version {record['schema_version']}, not {SCHEMA_VERSION}; {fix}")
    return record


def read_or_move_aside(path: Path, say: Callable[[str], None]) -> dict | None:
    """The record at `path`; None if there is none, or if it is damaged: then it is moved aside, and `say`
    told. Raises UserError for a record of another schema version.
    """
    if not path.exists():
        return None
    try:
        return read(path)
    except Damaged:
        say(f"DAMAGED record {path}: moved to {atomic.move_aside(path).name}; it is computed anew")
        return None


@functools.cache
def package_versions() -> dict[str, str]:
    """Installed versions of what determines answers and counts."""
    return {name: metadata.version(name) for name in _PACKAGES}


@functools.cache
def git_commit() -> str | None:
    """The commit of the source tree, with "+changes" if it has uncommitted ones; None outside of a
    repository.
    """
    root = Path(__file__).resolve().parents[2]
    try:
        run = functools.partial(subprocess.run, cwd=root, capture_output=True, text=True, timeout=10)
        commit = run(["git", "rev-parse", "HEAD"])
        if commit.returncode:
            return None
        changed = run(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return commit.stdout.strip() + ("+changes" if changed else "")
