"""Result files: JSON objects with a schema version, written atomically, read with a clear error.

Records of cells and of efficiency measurements are sealed: their `key` is the digest of their `identity` (all
that they depend on), stands in the file's name, and a checksum covers the whole. `read(path, kind)` holds a
file against that, for the run and for `harness check` alike.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from harness.store import atomic
from methods.errors import UserError

LOG = logging.getLogger(__name__)
#: 2: records of cells and measurements are sealed
SCHEMA_VERSION = 2
READABLE = (1, 2)
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
Kind = Literal["cell", "efficiency"]


class _Part(BaseModel):
    """Further fields are allowed; numbers are finite, and no text stands for one."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class _Method(_Part):
    spec: str
    name: str
    budget: int | float | None


class _Backbone(_Part):
    name: str
    layers: int = Field(gt=0)


class _Device(_Part):
    kind: str
    name: str


class _Record(_Part):
    """What every record of a run has. key, identity, checksum: from schema version 2 on."""

    schema_version: int
    kind: Kind
    status: Literal["done", "failed"]
    task: str
    method: _Method
    written: str
    backbone: _Backbone
    device: _Device
    dtype: str
    seed: int = Field(ge=0)
    key: str | None = None
    identity: dict | None = None
    checksum: str | None = None


class _Failed(_Record):
    error: str


class _Data(_Part):
    documents: int = Field(gt=0)
    documents_in_file: int
    digest: str


class _Metrics(_Part):
    score: float
    interval: list[float] = Field(min_length=2, max_length=2)
    interval_level: float = Field(gt=0, lt=1)
    resamples: int = Field(gt=0)
    accuracy: float | None = None


class _Tokens(_Part):
    rows: list[list] = Field(min_length=1)
    kept: float
    mean_over_layers: float
    text_tokens: float
    per_layer: list[float] = []
    image_places: float | None = None
    output_tokens: float | None = None

    @field_validator("rows")
    @classmethod
    def _counts(cls, rows: list[list]) -> list[list]:
        for row in rows:
            layers, number = row if len(row) == 2 else (None, None)
            whole = isinstance(layers, list) and layers and all(type(n) is int and n >= 0 for n in layers)
            if not whole or type(number) is not int or number < 1 or len(layers) != len(rows[0][0]):
                raise ValueError("must be pairs of counts per layer and a number of documents")
        return rows


class _Documents(_Part):
    row: list[int]
    score: list[float]
    kept: list[int] | None = None  # records before schema version 2 may lack it


class _Units(_Part):
    cluster: list[str]
    stratum: list[str]
    counts: list[list[float]]


class _Cell(_Record):
    data: _Data
    metrics: _Metrics
    visual_tokens: _Tokens
    documents: _Documents
    units: _Units


class _Macs(_Part):
    tower: float
    projector: float
    selection: float
    probe_llm: float | None = None
    probe_text_tokens: list[int] | None = None
    probe_visual_tokens: list[list[int]] | None = None


class _Quantiles(_Part):
    p10: float
    median: float
    p90: float


class _Latency(_Part):
    total: _Quantiles
    vision: _Quantiles | None = None
    selection: _Quantiles | None = None
    llm: _Quantiles | None = None
    vanilla_total_median: float | None
    peak_bytes: float | None = None
    joules: float | None = None


class _Efficiency(_Record):
    macs: _Macs
    latency_ms: _Latency


_MODELS = {"cell": _Cell, "efficiency": _Efficiency}


def digest(body: object) -> str:
    """First 12 hex digits of the SHA-256 of canonical JSON: keys of cells and measurements."""
    return hashlib.sha256(json.dumps(body, sort_keys=True, default=str).encode()).hexdigest()[:12]


def sealed(record: Mapping[str, object]) -> dict:
    """The record with a checksum of all of it. Raises ValueError for a number that is not finite."""
    body = json.loads(json.dumps(record, allow_nan=False))
    body.pop("checksum", None)
    return {**body, "checksum": _checksum(body)}


def _checksum(body: Mapping[str, object]) -> str:
    rest = {k: v for k, v in body.items() if k != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:16]


def problem_with(record: object, kind: Kind, path: Path | None = None) -> str | None:
    """What is wrong with a record of that kind, in words; None if nothing is. path: of its file, whose name
    and folder must agree with it."""
    if not isinstance(record, Mapping) or record.get("schema_version") not in READABLE:
        return "is no result record of this program"
    if record.get("kind") != kind:
        return f"is no record of kind {kind!r}"
    model = _Failed if record.get("status") == "failed" else _MODELS[kind]
    try:
        found = model.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        return f"is no complete {kind} record ({'.'.join(map(str, first['loc']))}: {first['msg']})"
    if found.schema_version > 1:
        if None in (found.key, found.identity, found.checksum):
            return "lacks its key, identity or checksum"
        if found.checksum != _checksum(record):
            return "was changed after it was written (its checksum does not fit)"
        if found.key != digest(found.identity):
            return "has a key that is not the digest of its identity"
    if path is not None:
        of = f"{found.task}, {found.method.spec}, budget {found.method.budget}"
        if kind == "cell" and path.parent.name != found.task:
            return f"is the record of another task ({of})"
        if found.key is not None and not path.stem.endswith(f"_{found.key}"):
            return f"is the record of something else ({of}, key {found.key})"
    return _lengths(record) if isinstance(found, _Cell) else None


def _lengths(record: Mapping) -> str | None:
    documents, units = record["documents"], record["units"]
    if {len(column) for column in documents.values()} != {record["data"]["documents"]}:
        return "has columns of documents that are not as long as its number of documents"
    if len({len(units[name]) for name in ("cluster", "stratum", "counts")}) != 1:
        return "has columns of units of unequal length"
    return "has counts of unequal length" if len({len(row) for row in units["counts"]}) > 1 else None


def write(path: Path, record: dict) -> None:
    """Write `record` so that the file is at every moment the old one or the whole new one.

    One top-level key a line: readable, and small diffs.
    """
    body = ",\n".join(f" {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in record.items())
    atomic.replace(path, ("{\n" + body + "\n}\n").encode())


class Damaged(UserError):
    """A file that should be a record of this program and is none. reason: without path and fix."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{path} {reason}; {_FIX}")
        self.reason = reason


_FIX = "move it away (or pass --fresh) and run again"


def read(path: Path, kind: Kind | None = None) -> dict:
    """The record at `path`; of a kind: held against its schema, its checksum and the file's name.

    Raises Damaged if it is truncated, no record, or not what it should be; UserError if it cannot be read or
    is of another schema version.
    """
    try:
        record = parsed(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); move it away and run again") from error
    except (ValueError, RecursionError) as error:
        raise Damaged(path, f"is truncated or no JSON ({error})") from error
    if not isinstance(record, dict) or "schema_version" not in record:
        raise Damaged(path, "is no result record of this program")
    if record["schema_version"] not in READABLE:
        raise UserError(f"{path} has schema version {record['schema_version']}, not {SCHEMA_VERSION}; {_FIX}")
    if kind is not None and (problem := problem_with(record, kind, path)):
        raise Damaged(path, problem)
    return record


def parsed(text: str) -> object:
    """What a JSON text holds. Raises ValueError or RecursionError if it is none, and for NaN and Infinity."""
    return json.loads(text, parse_constant=_not_finite)


def _not_finite(name: str) -> float:
    raise ValueError(f"{name} is no number")


def read_or_move_aside(path: Path, kind: Kind | None = None) -> dict | None:
    """The record at `path`; None if there is none, or if it is damaged: then it is moved aside, and told.
    Raises UserError for a record of another schema version.
    """
    if not path.exists():
        return None
    try:
        return read(path, kind)
    except Damaged as error:
        aside = atomic.move_aside(path).name
        LOG.info(f"DAMAGED record {path}: moved to {aside}; it is computed anew (the file {error.reason})")
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
