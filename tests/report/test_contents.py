"""A run ends with its page: rows as in the table, what was kept of the questions; `check` reads it."""

import json

import pandas as pd
import pytest

from harness.cli import app
from harness.report.page import contents
from harness.store import records
from harness.store.journal import Answer, Journal


@pytest.fixture(scope="module")
def finished(tiny_checkpoint, tiny_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    arguments = ["--backbone", tiny_checkpoint, "--data", tiny_data, "--methods", "uniform,downsample,fastv"]
    arguments += ["--budget", "16", "--tasks", "gqa,mme", "--max-new-tokens", "2", "--latency-repeats", "1"]
    assert app.run_all([str(a) for a in (*arguments, "--explore", "6", "--device", "cpu", "--out", out)]) == 0
    return out


@pytest.fixture
def data(finished):
    text = (finished / "index.html").read_text(encoding="utf-8")
    return json.loads(text.split('<script type="application/json" id="data">')[1].split("</script>")[0])


def test_every_method_is_a_row_with_its_role(data):
    (block,) = data["blocks"]
    roles = {r["method"]: (r["role"], r["where"]) for r in block["rows"]}
    assert roles["vanilla"][0] == "reference" and roles["fastv"] == ("method", "inside")
    assert {role for role, _ in roles.values()} == {"reference", "method", "control"}


def test_the_explorer_has_the_questions_asked_for_with_what_was_kept(data):
    assert len(data["questions"]) == 6 and {q["task"] for q in data["questions"]} == {"gqa", "mme"}
    for question in data["questions"]:
        assert question["text"] and question["target"] and question["grid"] == [8, 8]
        kept = {m: a["kept"] for m, a in question["answers"].items()}
        assert kept["vanilla"] is None
        width, text = int(kept["fastv"][0]), kept["fastv"][1:]
        places = {int(text[i : i + width], 36) for i in range(0, len(text), width)}
        assert len(places) == 16 and max(places) < 64
        assert kept["downsample"] is None, "its tokens are no places of the picture"
        assert question["answers"]["downsample"]["tokens"] == 16
    assert data["asked"] >= 6


def test_recall_and_accuracy_by_part_are_columns_where_the_data_has_them():
    """Two methods on twelve images of two questions; by hand: 'a' is right on sparse scenes alone."""
    records = []
    for spec, budget in (("vanilla", None), ("a", 64.0)):
        regimes = ["sparse", "dense"] * 12
        documents = {"row": list(range(24)), "regime": regimes, "kind": ["hop"] * 24, "chance": [0.1] * 24}
        documents["score"] = [float(spec == "vanilla" or regime == "sparse") for regime in regimes]
        documents["recall"] = [1.0 if spec == "vanilla" else 0.75] * 24
        documents["recall_alone"] = [1.0 if spec == "vanilla" else 0.25] * 24
        method = {"spec": spec, "budget": budget}
        records.append({"status": "done", "task": "gqa", "method": method, "documents": documents,
                        "answers_at_cap": 0 if spec == "vanilla" else 3})  # fmt: skip
    table = pd.DataFrame({"spec": ["vanilla", "a"], "budget": [None, 64.0]}, index=[5, 9])
    images = {("gqa", row): str(row // 2) for row in range(24)}
    found, columns = contents.with_evidence(table, records, images)
    assert [c["name"] for c in columns] == ["regime: sparse", "regime: dense", "kind: hop"]
    row = found.loc[9]
    assert (row["recall"], row["recall_alone"], row["capped"]) == (75.0, 25.0, 3)
    assert (row["regime: sparse"], row["regime: dense"], row["kind: hop"]) == (100.0, 0.0, 50.0)
    assert row["kind: hop_low"] == row["kind: hop_high"] == 50.0, "one of two on every image"
    assert found.loc[5, "regime: dense"] == 100.0
    for record in records:
        record["answers_at_cap"], record["documents"] = 0, {"row": [0], "score": [1.0]}
    assert contents.with_evidence(table, records, images)[1] == []


def test_answers_that_were_kept_from_another_key_are_shown(tmp_path):
    """`--keep-results` keeps a record under the key it was answered by; the cell itself has another now."""
    record = {"identity": {"answers": {"code": "earlier"}}}
    key = records.digest(record["identity"]["answers"])
    given = Answer(4, "p", "blue", 9, 4, 1, (4,))
    Journal(tmp_path / f"fastv_{key}.jsonl").append([given])
    assert contents._answers(tmp_path / "fastv_0123.jsonl", record) == {4: given}
    assert contents._answers(tmp_path / "pdrop_0123.jsonl", record) == {}


def test_a_falsified_number_of_the_page_is_found(finished, data, capsys):
    page = finished / "index.html"
    text = page.read_text(encoding="utf-8")
    assert app.main(["check", str(finished)]) in (0, 1)
    before = capsys.readouterr().out
    row = next(r for r in data["blocks"][0]["rows"] if r["method"] == "fastv")
    value = json.dumps(row["gqa"])
    place = text.index('"method":"fastv"')
    at = text.index(f'"gqa":{value}', place)
    page.write_text(text[:at] + '"gqa":99.25' + text[at + len(f'"gqa":{value}') :], encoding="utf-8")
    try:
        assert app.main(["check", str(finished)]) == 1
        after = capsys.readouterr().out
    finally:
        page.write_text(text, encoding="utf-8")
    assert "99.25" not in before and "99.25" in after
