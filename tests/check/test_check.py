"""`harness check` on run folders: planted drops, noise, files that lie, published scores."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from made_up_run import DOCUMENTS, LAYERS, cell, cost, hits, of, run_of, save, write

from harness import check, published
from harness.check import against, expected, findings, folder
from harness.cli import app
from harness.store import bundle, records
from methods.errors import UserError


def failures(found):
    return [f for f in found if f.status == "FAIL"]


def compare(tmp_path, old, new, task="gqa"):
    before = run_of(tmp_path, "before", cell(task, "fastv", 16, old))
    after = run_of(tmp_path, "after", cell(task, "fastv", 16, new))
    assert not failures(folder.integrity(after)), "the planted file must be whole"
    return of(against.baseline(after, before), "fastv")


# ---- our own baseline


def right_ones(answers, number):
    """Where the first `number` right answers stand, far apart."""
    places = [i for i, h in enumerate(answers) if h]
    return places[:: max(1, len(places) // number)][:number]


@pytest.mark.parametrize("task", ["gqa", "pope"])
def test_a_planted_drop_of_three_points_fails(tmp_path, task):
    """7 of 240 answers turned wrong, and the record rewritten as a run would have written it."""
    good = hits(180)
    found = compare(tmp_path, good, hits(180, flip=right_ones(good, 7)), task)
    (drop,) = failures(found)
    assert drop.what == "score" and "-" in drop.note
    assert float(drop.expected) - float(drop.found) >= 1.5


def test_a_change_inside_the_noise_passes(tmp_path):
    """Twenty answers come out differently, eleven of them worse: less than a point."""
    good = hits(180)
    worse, better = right_ones(good, 11), [i for i, h in enumerate(good) if not h][:9]
    found = compare(tmp_path, good, hits(180, flip=(*worse, *better)))
    assert not failures(found)
    (score,) = [f for f in found if f.what == "score"]
    assert score.status == "ok" and score.found != score.expected


def test_an_improvement_passes(tmp_path):
    good = hits(180)
    assert not failures(
        compare(tmp_path, good, hits(180, flip=[i for i, h in enumerate(good) if not h][:20]))
    )


def test_the_interval_of_the_difference_is_that_of_paired_answers(tmp_path):
    """7 answers of 240 lost, none gained: the loss is binomial with rate 7 / 240."""
    good = hits(180)
    (drop,) = failures(compare(tmp_path, good, hits(180, flip=right_ones(good, 7))))
    low, high = map(float, re.search(r"interval (\S+) to (\S+)$", drop.note).groups())
    half = 100 * 1.96 * np.sqrt(7 / 240 * 233 / 240 / 240)
    assert low == pytest.approx(-700 / 240 - half, abs=0.5) and high == pytest.approx(
        -700 / 240 + half, abs=0.5
    )


def test_small_drops_everywhere_fail_together(tmp_path):
    """Two answers of 60 lost in each of four tasks: noise in each, not in their mean."""
    good = hits(40, 60)
    bad = hits(40, 60, flip=right_ones(good, 2))
    tasks = ("gqa", "scienceqa", "vqav2", "textvqa")
    before = run_of(tmp_path, "before", *(cell(t, "fastv", 16, good) for t in tasks))
    after = run_of(tmp_path, "after", *(cell(t, "fastv", 16, bad) for t in tasks))
    (only,) = failures(against.baseline(after, before))
    assert only.what == "mean of ratios %" and float(only.found) == pytest.approx(95.0)


def test_too_few_documents_cannot_fail(tmp_path):
    assert not failures(compare(tmp_path, [1] * 4, [0, 0, 0, 1]))


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda r: r["backbone"].update(weights="other"), "other weights"),
        (lambda r: r["data"].update(digest="other"), "other data"),
        (lambda r: r["data"].update(blind=True), "blind"),
        (lambda r: r["documents"].update(row=list(range(1, 241))), "other documents"),
    ],
)
def test_what_cannot_be_paired_is_skipped_with_its_reason(tmp_path, change, reason):
    other = cell("gqa", "fastv", 16, hits(60))
    change(other)
    before = run_of(tmp_path, "before", cell("gqa", "fastv", 16, hits(180)))
    (found,) = of(against.baseline(run_of(tmp_path, "after", other), before), "fastv")
    assert found.status == "skipped" and reason in found.note


def test_more_visual_tokens_than_the_baseline_fail(tmp_path):
    more = cell("gqa", "fastv", 16, hits(180))
    more["visual_tokens"].update(kept=18, mean_over_layers=18, rows=[[[18] * LAYERS, DOCUMENTS]])
    before = run_of(tmp_path, "before", cell("gqa", "fastv", 16, hits(180)))
    (found,) = failures(against.baseline(run_of(tmp_path, "after", more), before))
    assert found.what.startswith("visual tokens")


@pytest.mark.parametrize("device, status", [("a processor", "warning"), ("another", "skipped")])
def test_slower_is_a_warning_on_the_same_device_alone(tmp_path, device, status):
    one = cell("gqa", "fastv", 16, hits(180))
    before = run_of(tmp_path, "before", one, cost("fastv", 16))
    after = run_of(tmp_path, "after", one, cost("fastv", 16, total=40.0, device=device))
    (found,) = [f for f in of(against.baseline(after, before), "fastv") if f.what.startswith("prefill")]
    assert found.status == status and not failures(against.baseline(after, before))


# ---- files that contradict themselves


@pytest.mark.parametrize(
    "change, what",
    [
        (lambda r: r["metrics"].update(score=r["metrics"]["score"] - 3), "score"),
        (lambda r: r["metrics"].update(interval=[0.0, 100.0]), "interval, low"),
        (lambda r: r["visual_tokens"].update(mean_over_layers=12), "visual tokens, mean over layers"),
        (lambda r: r["visual_tokens"].update(rows=[[[16] * LAYERS, 10]]), "documents"),
        (lambda r: r["documents"].update(score=[0.0] * DOCUMENTS), "scores of the documents"),
        (lambda r: r.update(status="failed", error="Traceback\nBoom: it broke"), "cell"),
    ],
)
def test_a_record_is_recomputed_from_its_own_parts(tmp_path, change, what):
    record = cell("gqa", "fastv", 16, hits(180))
    change(record)
    assert what in [f.what for f in failures(folder.integrity(run_of(tmp_path, "run", record)))]


def leaderboard(run, **changes):
    """leaderboard.csv as the run writes it, but for `changes` in fastv's row."""
    must = expected.Expected(run)
    rows = []
    for spec, budget in (("vanilla", None), ("fastv", 16)):
        row = {"block": 16, "method": spec, "budget": budget, **must.row((spec, budget))}
        row = {k: "" if v is None else v for k, v in row.items()}
        rows.append(row | (changes if spec == "fastv" else {}))
    heads = list(dict.fromkeys(k for row in rows for k in row))
    lines = [heads, *([str(row.get(h, "")) for h in heads] for row in rows)]
    text = "\n".join(",".join(line) for line in lines) + "\n"
    (run.folder / "leaderboard.csv").write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    "column, value, what",
    [
        ("gqa", 72.0, "gqa"), ("gqa_low", 1.0, "gqa_low"), ("average", 97.0, "average"),
        ("average_high", 97.0, "average_high"), ("kept", 15, "kept"), ("kept_std", 1, "kept_std"),
        ("mean_over_layers", 12, "mean_over_layers"), ("prefill", 14.0, "prefill"),
        ("prefill_p10", 13.0, "prefill_p10"), ("speedup", 2.2, "speedup"), ("block", 64, "block"),
        ("method", "pdrop", "row"), ("gqa", "", "gqa"), ("new_column", 3, "new_column"),
    ],
)  # fmt: skip
def test_every_column_of_the_leaderboard_is_recomputed(tmp_path, column, value, what):
    made = cell("gqa", "fastv", 16, hits(180)), cell("gqa", "vanilla", None, hits(200))
    run = run_of(tmp_path, "run", *made, cost("fastv", 16, total=15.0))
    leaderboard(run)
    assert not failures(folder.integrity(run)), "as the run writes it"
    leaderboard(run, **{column: value})
    assert what in [f.what for f in failures(folder.integrity(run))]


# ---- the command


def test_a_run_passes_and_fails_with_three_points_less(tmp_path, capsys):
    root = run_of(tmp_path, "run", cell("gqa", "fastv", 16, hits(180))).folder
    assert app.main(["check", str(root)]) == 0
    path = next((root / "cells").rglob("fastv*.json"))
    record = records.read(path)
    record["metrics"]["score"] -= 3
    write(path.parent, record)
    capsys.readouterr()
    assert app.main(["check", str(root), "--github"]) == 1
    out = capsys.readouterr().out
    assert "FAIL" in out and re.search(rf"^::error file=[^,]*{path.name},title=", out, re.M)
    assert "1 failures" in out


def test_without_folders_the_committed_runs_are_checked(tmp_path, caplog):
    caplog.set_level("INFO", "harness")
    good = hits(30, 40)
    run_of(tmp_path, "results/pocket-x/default", cell("gqa", "fastv", 16, good))
    save(tmp_path / "results" / "runs" / "pocket-x", cell("gqa", "fastv", 16, good))
    assert check.run([], results=tmp_path / "results") == 0
    out = "\n".join(caplog.messages)
    assert "it is the committed baseline" in out and "runs/pocket-x" not in out
    flagged = sum("| average %" in line and line.startswith("| known") for line in out.splitlines())
    assert f"\n{flagged} printed averages do not follow" in out, "one count, of what is listed"


def test_a_run_finds_its_committed_baseline(tmp_path, caplog):
    caplog.set_level("INFO", "harness")
    good = hits(180)
    run_of(tmp_path, "results/pocket-x/default", cell("gqa", "fastv", 16, good))
    new = run_of(tmp_path, "new", cell("gqa", "fastv", 16, hits(180, flip=right_ones(good, 12)))).folder
    assert check.run([new], results=tmp_path / "results") == 1
    out = "\n".join(caplog.messages)
    assert "against" in out and "1 failures" in out


def test_bad_folders_and_files_are_one_line_and_exit_code_2(tmp_path, capsys):
    def refused(path):
        assert app.main(["check", str(path)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        return error

    assert "no run folder" in refused(tmp_path / "nowhere")
    (tmp_path / "empty" / "cells").mkdir(parents=True)
    assert "no cell records" in refused(tmp_path / "empty")
    root = save(tmp_path / "run", cell("gqa", "fastv", 16, hits(180)))
    path = next(root.rglob("*.json"))
    whole = path.read_text(encoding="utf-8")
    for spoilt, says in (
        (whole[: len(whole) // 2], "truncated"),
        (json.dumps([1]), "no result record"),
        (json.dumps({**json.loads(whole), "schema_version": 99}), "schema version 99"),
        (json.dumps({**json.loads(whole), "kind": "recipe"}), "no record of kind"),
        (json.dumps({**json.loads(whole), "task": "chess"}), "changed after it was written"),
        (json.dumps({**json.loads(whole), "metrics": {}}), "score"),
        (
            json.dumps({**json.loads(whole), "units": {"cluster": [], "counts": [[1]], "stratum": []}}),
            "changed after",
        ),
    ):
        path.write_text(spoilt, encoding="utf-8")
        assert says in refused(root)
        assert path.read_text(encoding="utf-8") == spoilt, "nothing is overwritten"
    path.write_text(whole, encoding="utf-8")
    (root / "leaderboard.csv").write_text("block,method,budget,gqa\n16,fastv,16,high\n", encoding="utf-8")
    assert "leaderboard.csv" in refused(root)


def test_every_damaged_record_is_named_and_the_rest_is_checked(tmp_path, capsys):
    """A run of four cells, two of them damaged, one with a wrong score under a checksum that fits."""
    wrong = cell("gqa", "fastv", 16, hits(180))
    wrong["metrics"]["score"] -= 3
    made = [cell("gqa", "random", 16, hits(100)), cell("vqav2", "random", 16, hits(90)), wrong]
    root = save(tmp_path / "run", *made, cell("gqa", "vanilla", None, hits(200)))
    edited, cut = sorted(root.glob("cells/*/random_16_*.json"))
    edited.write_text(edited.read_text().replace('"seed": 0', '"seed": 3'))
    cut.write_text(cut.read_text()[:500])
    assert app.main(["check", str(root)]) == 1
    said = {
        line.split("|")[2].strip(): line for line in capsys.readouterr().out.splitlines() if "FAIL " in line
    }
    assert "its checksum does not fit" in " ".join(said[f"run/cells/gqa/{edited.name}"].split())
    assert "is truncated or no JSON" in said[f"run/cells/vqav2/{cut.name}"]
    assert "score" in said["run: gqa, fastv at 16"]
    with pytest.raises(UserError, match=re.escape(edited.name)):
        bundle.read(root)


def test_a_broken_baseline_is_named(tmp_path):
    root = save(tmp_path / "results" / "pocket-x" / "default", cell("gqa", "fastv", 16, hits(180)))
    next(root.rglob("*.json")).write_text("{", encoding="utf-8")
    new = save(tmp_path / "new", cell("gqa", "fastv", 16, hits(180)))
    with pytest.raises(UserError, match="committed baseline is broken"):
        check.run([new], results=tmp_path / "results")


# ---- published scores


def beside(
    tmp_path, right, method="visionzip", budget=64, name="models/llava-1.5-7b-hf", task="pope", **data
):
    """Findings of a 7B cell against Table 1."""
    record = cell(task, method, budget, hits(right, 1000), name, **{"comparable_to_paper": True, **data})
    record["backbone"]["layers"] = 32
    found = against.published(run_of(tmp_path, "run", record), published.load())
    return [f for f in found if "vanilla" not in f.where]


def test_a_score_near_the_published_one_agrees(tmp_path):
    (found,) = beside(tmp_path, 620, task="scienceqa", method="visionzip", budget=64)
    assert found.status == "FAIL" and found.expected == "69.0" and "below" in found.note
    (found,) = beside(tmp_path / "2", 685, task="scienceqa")
    assert found.status == "ok"
    (found,) = beside(tmp_path / "3", 800, task="scienceqa")
    assert found.status == "warning" and "above" in found.note


def test_a_row_that_is_known_not_to_reproduce_only_warns(tmp_path):
    (found,) = beside(tmp_path, 300, method="fastv", task="gqa")
    assert found.status == "warning" and "SparseVLM" in found.note


@pytest.mark.parametrize(
    "change",
    [
        {"name": "pocket-llava"},
        {"comparable_to_paper": False, "comparability": "drawn images"},
    ],
)
def test_what_is_not_comparable_is_not_compared(tmp_path, change):
    (found,) = beside(tmp_path, 100, task="scienceqa", **change)
    assert found.status == "skipped"


def test_other_settings_and_budgets_have_no_published_row(tmp_path):
    assert beside(tmp_path, 100, method="fastv:k=3", task="gqa") == []
    assert beside(tmp_path / "2", 100, budget=100, task="gqa") == []


# ---- printing


def test_annotations_are_escaped():
    bad = findings.Finding("FAIL", "a, b: c", "average %", "1", "2", "two\nlines", Path("x,y.json"))
    assert findings.annotation(bad) == (
        "::error file=x%2Cy.json,title=harness check::a, b: c, average %25: 1, not 2 (two%0Alines)"
    )
    assert findings.annotation(findings.Finding("ok", "a", "b")) is None
