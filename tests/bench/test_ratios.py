"""`python -m harness bench`: the rows, what they claim on a busy machine, and their files."""

import json
import re
from types import SimpleNamespace

import pytest

from harness.bench import ratios


@pytest.fixture(scope="module")
def measured(tiny_checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("bench")
    options = ratios.Options(
        backbone=str(tiny_checkpoint), methods=("vanilla", "fastv", "random"), rounds=2, questions=3,
        tokens=24, widths=(("tiny", 16, 32),), steps=6, max_new_tokens=2,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ratios, "BUDGET", 16)
        code = ratios.run(out, options)
    return code, json.loads((out / "bench.json").read_text()), (out / "bench.md").read_text()


def test_every_row_is_a_ratio_of_two_ways_with_equal_results(measured):
    code, record, table = measured
    names = [row["name"] for row in record["rows"]]
    assert names[0] == "sweep of 3 methods" and {"image prefix, vanilla", "image prefix, fastv"} <= {*names}
    assert sum("loop" in name for name in names) == 6, "three methods, batch 1 and 8"
    for row in record["rows"]:
        same, results = row["equal"]
        assert same == results > 0, row["name"]
        low, middle, high = (row["ratio"][k] for k in ("p10", "median", "p90"))
        assert 0 < low <= middle <= high
        assert row["name"] in table
    assert record["rows"][0]["equal"] == [18, 18], "three methods, two rounds, three questions"
    assert code == (0 if all(row["claims"] for row in record["rows"]) else 1)
    assert "/" not in record["backbone"]["name"] and "/" not in record["options"]["backbone"]


def test_a_busy_machine_claims_nothing(measured):
    _, record, _ = measured
    for cores, claims in ((0.0, True), (1.4, False), (None, False)):
        rows = [{**row, "others_cores": cores, "claims": claims} for row in record["rows"]]
        text = ratios.render({**record, "rows": rows})
        assert ("**No claim**" in text) is not claims
        assert len(re.findall(r"\[\d", text)) == (0 if claims else len(rows))


def test_bystanders_are_what_others_use(monkeypatch):
    spent = iter([100.0, 130.0])
    monkeypatch.setattr(ratios, "_machine_seconds", lambda: next(spent))
    now = iter([0.0, 20.0, 20.0, 40.0])
    monkeypatch.setattr(ratios, "time", SimpleNamespace(monotonic=lambda: next(now)))
    assert ratios.Bystanders().cores() == pytest.approx(1.5, abs=0.1)
    monkeypatch.setattr(ratios, "_machine_seconds", lambda: float("nan"))
    assert ratios.Bystanders().cores() is None
