"""A run ends with its page: rows as in the table, what was kept of the questions; `check` reads it."""

import json

import pytest

from harness.cli import app


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
        assert len(kept["fastv"]) == 16 and max(kept["fastv"]) < 64


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
