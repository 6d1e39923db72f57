"""One validator for records: each malformed value is named, in the run and in `harness check` alike."""

import json
import math

import pytest

from harness.store import records
from methods.errors import UserError


def record(**changes) -> dict:
    identity = {"answers": {"budget": 16}, "documents": "d"}
    body = {
        "schema_version": records.SCHEMA_VERSION, "written": "2026-01-01T00:00:00+00:00", "kind": "cell",
        "backbone": {"name": "x", "layers": 2}, "device": {"kind": "cpu", "name": "p"}, "dtype": "float32",
        "seed": 0, "status": "done", "key": records.digest(identity), "task": "pope",
        "method": {"spec": "fastv", "name": "fastv", "budget": 16},
        "data": {"documents": 2, "documents_in_file": 2, "digest": "d"},
        "metrics": {"score": 50.0, "interval": [0.0, 100.0], "interval_level": 0.95, "resamples": 9},
        "visual_tokens": {"rows": [[[4, 4], 2]], "kept": 4.0, "mean_over_layers": 4.0, "text_tokens": 9.0},
        "documents": {"row": [0, 1], "score": [0.0, 1.0], "kept": [4, 4]},
        "units": {"cluster": ["a", "b"], "stratum": ["0", "0"], "counts": [[1.0, 1.0], [0.0, 1.0]]},
        "identity": identity,
    }  # fmt: skip
    for path, value in changes.items():
        *parts, last = path.split("__")
        place = body
        for part in parts:
            place = place[part]
        place[last] = value
    return body


def path_of(folder, body) -> object:
    path = folder / "cells" / "pope" / f"fastv_16_{body['key']}.json"
    records.write(path, body)
    return path


def test_a_sealed_record_is_read_back(tmp_path):
    body = records.sealed(record())
    assert records.read(path_of(tmp_path, body), "cell") == body


@pytest.mark.parametrize(
    "place, value",
    [
        ("metrics__score", "50"), ("metrics__score", None), ("metrics__score", True),
        ("metrics__interval", [1.0]), ("metrics__interval", {}), ("metrics__resamples", 9.5),
        ("method", "fastv"), ("method__budget", "16"), ("documents__row", [0, "1"]), ("documents__row", [0]),
        ("units__counts", [[1.0, 1.0], [0.0]]), ("units__cluster", ["a"]), ("data", None),
        ("backbone", []), ("seed", "0"), ("status", "half"), ("kind", "efficiency"), ("task", "gqa"),
        ("key", "0123456789ab"), ("identity", {}), ("schema_version", "2"), ("visual_tokens__kept", [4]),
    ],
)  # fmt: skip
def test_a_malformed_value_is_damage_in_one_line(tmp_path, caplog, place, value):
    """Seven of them ended in tracebacks."""
    path = tmp_path / "cells" / "pope" / f"fastv_16_{record()['key']}.json"
    records.write(path, records.sealed(record(**{place: value})))
    with pytest.raises(UserError) as caught:
        records.read(path, "cell")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    if place != "schema_version":
        caplog.set_level("INFO", "harness")
        assert records.read_or_move_aside(path, "cell") is None and len(caplog.messages) == 1


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_never_written_nor_read(tmp_path, number):
    with pytest.raises(ValueError):
        records.sealed(record(metrics__score=number))
    path = path_of(tmp_path, record(metrics__score=number))
    with pytest.raises(records.Damaged, match="is no number"):
        records.read(path, "cell")


def test_an_edit_is_seen(tmp_path):
    """A score edited from 50 to 99 was printed."""
    path = path_of(tmp_path, records.sealed(record()))
    body = json.loads(path.read_text())
    body["metrics"]["score"] = 99.0
    records.write(path, body)
    with pytest.raises(records.Damaged, match="changed after it was written"):
        records.read(path, "cell")
    for part in ("checksum", "key", "identity"):
        records.write(path, {k: v for k, v in records.sealed(record()).items() if k != part})
        with pytest.raises(records.Damaged, match=r"lacks its key|changed after"):
            records.read(path, "cell")


def test_another_cells_record_is_seen(tmp_path):
    """A valid record copied over another cell's made that cell missing, exit 0."""
    body = records.sealed(record())
    path = path_of(tmp_path, body)
    other = path.with_name("random_16_ffffffffffff.json")
    path.rename(other)
    with pytest.raises(records.Damaged, match="the record of something else"):
        records.read(other, "cell")
    elsewhere = tmp_path / "cells" / "gqa" / path.name
    elsewhere.parent.mkdir()
    other.rename(elsewhere)
    with pytest.raises(records.Damaged, match="the record of another task"):
        records.read(elsewhere, "cell")


def test_records_of_earlier_versions_are_still_read(tmp_path):
    old = {k: v for k, v in record(schema_version=1).items() if k != "identity"}
    assert records.problem_with(old, "cell") is None
