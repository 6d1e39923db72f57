"""A run handed over as a bundle: nothing is lost in it, and whatever is falsified in it is found."""

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from harness import check
from harness.check import expected, folder, printed, scores
from harness.cli import app
from harness.report import figures, leaderboard, numbers
from harness.run.config import RunConfig
from harness.store import bundle, records
from harness.tasks.suites import BENCHMARKS

SOURCE = check.RESULTS / "pocket-llava" / "default"
TASKS = ("gqa", "pope", "mme", "mmbench_en", "textvqa")
METHODS = ("vanilla", "fastv", "random")


@dataclasses.dataclass
class Outcome:
    cells: list
    efficiency: list
    reused: int = 0
    kept: dict = dataclasses.field(default_factory=dict)
    failed: tuple = ()
    left_out: tuple = ()

    @property
    def computed(self):
        return len(self.cells)


class Counted:
    """FLOPs of the language model as the records' probes tell them."""

    def __init__(self, run):
        self.llm = expected.Expected(run)._llm


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A bundle of three methods on five tasks of the committed run, its tables written by the leaderboard."""
    whole = bundle.read(SOURCE)
    if len(whole.answers) < len(whole.cells):
        pytest.skip("the committed run has no answers")
    run = dataclasses.replace(
        whole,
        folder=tmp_path_factory.mktemp("run"),
        cells={a: r for a, r in whole.cells.items() if a[0] in TASKS and a[1] in METHODS},
        efficiency={k: r for k, r in whole.efficiency.items() if k[0] in METHODS},
        answers={a: g for a, g in whole.answers.items() if a[0] in TASKS and a[1] in METHODS},
        questions={t: q for t, q in whole.questions.items() if t in TASKS},
    )
    plain = [{k: v for k, v in r.items() if k != "path"} for r in run.cells.values()]
    costs = [{k: v for k, v in r.items() if k != "path"} for r in run.efficiency.values()]
    budgets = [b for _, b in run.efficiency if b is not None][:1]
    benchmarks = tuple(b for b in BENCHMARKS.values() if b.name in TASKS)
    config = RunConfig(budgets=tuple(budgets), benchmarks=benchmarks, out=run.folder, limit=40)
    length = numbers.common_text_length(plain)
    table = numbers.build(
        plain, costs, budgets=budgets, tasks=[b.name for b in benchmarks], seed=plain[0]["seed"],
        counter=Counted(run), text_tokens=length,
    ).table  # fmt: skip
    lines = leaderboard.caption(config, Outcome(plain, costs), table, length)
    leaderboard.write(table, config, lines, run.folder)
    out = tmp_path_factory.mktemp("bundle") / "small"
    bundle.write(run, out)
    return out


@pytest.fixture
def copied(small, tmp_path):
    return Path(shutil.copytree(small, tmp_path / "copy"))


def found(path):
    """What fails in a bundle; that its files are others than when it was made is left out."""
    return [f for f in folder.integrity(folder.read(path)) if f.status == "FAIL" and f.what != "file"]


def change(path, where, edit):
    """Edit the records that `where` holds for, and seal them as if they had been written so."""
    file = path / bundle.RECORDS
    head, *lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines = [json.loads(json.dumps(bundle._whole(line, head["shared"]))) for line in lines]
    columns = {row["key"]: row for row in bundle._answers_file(path)}
    kept = []
    for record in lines:
        if where(record):
            whole = bundle._together(record, columns.get(record.get("key"), {}))
            changed = edit(whole)
            if changed is None:
                continue
            if whole.get("checksum"):
                whole = records.sealed(whole)
                record = {**whole, **{p: record[p] for p in ("documents", "units") if p in record}}
            else:
                record = whole
        kept.append(record)
    file.write_text("".join(json.dumps(r) + "\n" for r in (head, *kept)))


def fastv_gqa(record):
    return record["kind"] == "cell" and record["task"] == "gqa" and record["method"]["spec"] == "fastv"


def fastv_cost(record):
    return record["kind"] == "efficiency" and record["method"]["spec"] == "fastv"


def anything(record):
    return True


def put(*path):
    """An edit: the last of `path` is the value, the others are where it goes."""

    def edit(record):
        *keys, last, value = path
        for key in keys:
            record = record[key]
        record[last] = value(record[last]) if callable(value) else value
        return True

    return edit


def test_a_bundle_is_whole_and_small(small):
    assert found(small) == []
    names = {path.name for path in small.iterdir()}
    assert names == {
        "records.jsonl", "answers.parquet", "questions.parquet", "leaderboard.md", "leaderboard.csv",
        *(f"{name}.{suffix}" for name in figures.NAMES for suffix in figures.FORMATS),
    }  # fmt: skip
    whole, part = bundle.read(SOURCE), bundle.read(small)
    for address, record in part.cells.items():
        assert {**record, "path": 0} == {**whole.cells[address], "path": 0}, "a record came back changed"
        assert list(part.answers[address]) == list(whole.answers[address])


def test_every_answer_is_scored_again(small):
    run = folder.read(small)
    checked = [f for f in folder.integrity(run) if f.what == "scores of the documents, from answers"]
    assert len(checked) == len(TASKS) * len(METHODS) and {f.status for f in checked} == {"ok"}
    assert set(scores.RULES) == set(BENCHMARKS), "a benchmark without a rule of its own is not checked"


@pytest.mark.parametrize(
    "where, edit, what",
    [
        (fastv_gqa, put("metrics", "score", 99.0), "score"),
        (fastv_gqa, put("metrics", "interval", [1.0, 2.0]), "interval, low"),
        (fastv_gqa, put("visual_tokens", "kept", 12.0), "visual tokens, kept"),
        (fastv_gqa, put("visual_tokens", "mean_over_layers", 12.0), "visual tokens, mean over layers"),
        (fastv_gqa, put("visual_tokens", "per_layer", lambda x: [1.0, *x[1:]]), "visual tokens, layer 1"),
        (fastv_gqa, put("visual_tokens", "text_tokens", 99.0), "text_tokens"),
        (fastv_gqa, put("visual_tokens", "output_tokens", 99.0), "output_tokens"),
        (fastv_gqa, put("dtype", "bfloat16"), "dtype"),
        (fastv_gqa, put("seed", 5), "seed"),
        (fastv_gqa, put("backbone", "weights", "other"), "backbone.weights"),
        (fastv_cost, put("latency_ms", "total", "median", 1.0), "prefill"),
        (fastv_cost, put("latency_ms", "llm", "median", 1.0), "llm"),
        (fastv_cost, put("latency_ms", "vanilla_total_median", 1.0), "speedup"),
        (fastv_cost, put("macs", "selection", 1.0), "gflops"),
        (fastv_cost, put("macs", "tower", 1.0), "gflops"),
    ],
)
def test_a_falsified_record_is_found(copied, where, edit, what):
    change(copied, where, edit)
    assert what in [f.what for f in found(copied)]


@pytest.mark.parametrize(
    "gone, what",
    [
        (lambda r: r["method"]["spec"] == "fastv", "row"),
        (lambda r: r["task"] == "pope", "pope"),
        (fastv_cost, "measurement"),
        (fastv_gqa, "cell"),
        (lambda r: r["method"]["spec"] == "vanilla", "cell"),
    ],
)
def test_what_is_missing_is_found(copied, gone, what):
    change(copied, gone, lambda record: None)
    assert what in [f.what for f in found(copied)]


@pytest.mark.parametrize(
    "gone, what",
    [
        (lambda r: r["method"]["spec"] == "fastv", "5 cells"),
        (lambda r: r["task"] == "pope", "3 cells"),
        (fastv_cost, "measurement"),
    ],
)
def test_what_the_baseline_has_and_the_run_lacks_is_found(small, copied, gone, what, capsys):
    """The tables are gone as well: only the baseline still knows."""
    change(copied, gone, lambda record: None)
    for name in ("leaderboard.csv", "leaderboard.md"):
        (copied / name).unlink()
    assert app.main(["check", str(copied), "--baseline", str(small)]) == 1
    out = capsys.readouterr().out
    (line,) = [x for x in out.splitlines() if x.startswith("| FAIL") and "--partial" in x]
    assert what in line and "missing" in line


@pytest.mark.parametrize("key, value", [("dtype", "bfloat16"), ("seed", 1)])
def test_another_setting_than_the_baselines_is_found(small, copied, key, value):
    from harness.check import against

    change(copied, anything, put(key, value))
    failed = [f for f in against.baseline(bundle.read(copied), bundle.read(small)) if f.status == "FAIL"]
    assert key in [f.what for f in failed]


def edit_answers(path, edit):
    file = path / bundle.ANSWERS
    rows = pyarrow.parquet.read_table(file).to_pylist()
    for row in rows:
        if (row["task"], row["method"]) == ("gqa", "fastv"):
            edit(row)
    bundle._write_parquet(file, rows)


def all_zero(row):
    row["documents_score"] = [0.0] * len(row["documents_score"])


@pytest.mark.parametrize(
    "edit, what",
    [
        (lambda row: row["answer_text"].__setitem__(0, "a zebra"), "scores of the documents, from answers"),
        (lambda row: row["answer_visual_tokens"].__setitem__(0, [9] * 12), "visual tokens of the answers"),
        (lambda row: row["answer_input_tokens"].__setitem__(0, 9999), "text_tokens"),
        (lambda row: row["answer_row"].reverse(), "answers"),
        (lambda row: row["units_counts"].reverse(), "resampled counts, from answers"),
        (all_zero, "scores of the documents"),
        (lambda row: row.update(units_counts=[[1.0]] * len(row["units_counts"])), "resampled counts"),
    ],
)
def test_falsified_answers_are_found(copied, edit, what):
    edit_answers(copied, edit if what != "scores of the documents, from answers" else _of_a_right_one)
    failed = {f.what: f.found for f in found(copied)}
    # a sealed record does not take other columns
    assert what in failed or "was changed after it was written" in failed["contents"]


def _of_a_right_one(row):
    row["answer_text"][row["documents_score"].index(1.0)] = "a zebra"


def test_a_falsified_question_is_found(copied):
    questions = bundle.read_questions(copied)
    for question in questions["gqa"].values():
        question["document"]["answer"] = "a zebra"
    bundle.write_questions(copied, questions)
    assert "score of the answers" in [f.what for f in found(copied)]


def test_every_number_of_the_csv_is_found_when_it_is_another(small, copied):
    """Each field in turn, by its own last digit but one."""
    run = bundle.read(small)
    must = expected.Expected(run)
    path = copied / "leaderboard.csv"
    rows = printed.read_csv(path)
    tried = 0
    for row in rows:
        for name, value in row.items():
            if name in ("kind", "other_code") or (isinstance(value, float) and math.isnan(value)):
                continue
            wrong = [{**r, name: _other(value)} if r is row else r for r in rows]
            bad = [f for f in printed._csv(run, must, path, wrong) if f.status == "FAIL"]
            assert bad, f"{name} of {row['method']} may be {_other(value)} instead of {value}"
            tried += 1
    assert tried > 60


def _other(value):
    return value * 1.001 + 0.01 if isinstance(value, float) else value + "b"


def test_every_number_of_the_markdown_is_found_when_it_is_another(small, tmp_path):
    """Each number below the budgets' titles, and those of the caption that say sizes, in turn."""
    run = bundle.read(small)
    must = expected.Expected(run)
    text = (small / "leaderboard.md").read_text()
    blocks = [r["block"] for r in printed.read_csv(small / "leaderboard.csv")][:1]
    body = text.index("## Budget")
    spans = [
        m.span() for m in re.finditer(r"(?<![\w.])\d+(?:\.\d+)?(?=x\)|[^\w.])", text) if m.start() > body
    ]
    spans += [m.span(1) for m in re.finditer(r"(\d+) text tokens| (\d+) of \d+", text) if m.group(1)]
    lines = {i for i, line in enumerate(text.splitlines()) if line.startswith("| ") and "Method" not in line}
    tried = 0
    path = tmp_path / "leaderboard.md"
    for start, end in spans:
        if start > body and text.count("\n", 0, start) not in lines:
            continue
        old = text[start:end]
        new = old[:-1] + str((int(old[-1]) + 5) % 10)
        path.write_text(text[:start] + new + text[end:])
        bad = [f for f in printed._markdown(run, must, path, blocks) if f.status == "FAIL"]
        assert bad, f"{text[start - 40 : end + 5]!r} may say {new}"
        tried += 1
    assert tried > 60


@pytest.mark.parametrize(
    "old, new, what",
    [
        (r"\| fastv .*\n", "", "row"),
        (r"\| fastv ", "| holov ", "row"),
        (r"(GQA \d+) of \d+", r"\1 of 9999", "documents of GQA"),
        (r"\d+ text tokens", "999 text tokens", "text tokens"),
        (r"\*\*, float32", "**, float16", "dtype"),
        (r"\d+ computed by", "999 computed by", "cells"),
        (r"## Budget \d+", "## Budget 65", "block"),
        (r"Avg\. %", "Average", "Avg. %"),
    ],
)
def test_what_else_is_falsified_in_the_markdown_is_found(copied, old, new, what):
    path = copied / "leaderboard.md"
    text, number = re.subn(old, new, path.read_text(), count=1)
    assert number
    path.write_text(text)
    assert what in [f.what for f in found(copied)]


def test_the_pages_numbers_are_checked(copied):
    rows = [{"method": "fastv", "budget": 64, "gqa": 99.0}]
    page = '<script type="application/json" id="data">%s</script>'
    (copied / "index.html").write_text(page % json.dumps({"rows": rows}))
    assert [f.what for f in found(copied)] == ["gqa"]
    (copied / "index.html").write_text("<p>nothing</p>")
    assert [f.what for f in found(copied)] == ["numbers"]


def test_the_pages_evidence_and_hard_questions_are_counted_anew():
    """By hand: of four questions `downsample` fails on three that vanilla answers; `a` is right on one of
    them, and on one of the two dense ones."""
    cells = {}
    for spec, budget, right in (("vanilla", None, "1111"), ("downsample", 64, "0001"), ("a", 64, "0101")):
        documents = {
            "row": [0, 1, 2, 3],
            "score": [float(s) for s in right],
            "kind": ["hop", "hop", "read", "read"],
        }
        documents |= {"regime": ["sparse", "sparse", "dense", "dense"], "recall": [0.5, None, 1.0, 0.0]}
        documents["recall_alone"] = [0.25, None, 0.5, 0.0]
        record = {"status": "done", "seed": 0, "documents": documents, "answers_at_cap": 2}
        cells["gqa", spec, budget] = record
    run = bundle.Run(Path("run"), cells, {})
    row = expected.Expected(run).on_page(("a", 64), 64)
    assert row["capped"] == 2
    assert row["recall"] == pytest.approx(50) and row["recall_alone"] == pytest.approx(25)
    for part in ("regime: sparse", "regime: dense", "kind: hop", "kind: read"):
        assert row[part] == 50
    assert row["hard"] == pytest.approx(100 / 3)


def test_a_changed_file_is_named(copied):
    with (copied / "accuracy_budget.png").open("ab") as file:
        file.write(b"x")
    (found_,) = [f for f in folder.integrity(folder.read(copied)) if f.status == "FAIL"]
    assert "accuracy_budget.png" in found_.where and "was changed" in found_.found


MALFORMED = [
    lambda r: r["metrics"].update(score="high"), lambda r: r["metrics"].update(interval=[1]),
    lambda r: r["metrics"].update(resamples=None), lambda r: r["visual_tokens"].update(rows=[["x", 1]]),
    lambda r: r["visual_tokens"].update(rows=[]), lambda r: r["visual_tokens"].update(rows=[[[], 240]]),
    lambda r: r["visual_tokens"].update(per_layer="x"), lambda r: r["data"].update(documents=0),
    lambda r: r["backbone"].update(layers=0), lambda r: r["method"].update(budget="x"),
    lambda r: r.update(written=5), lambda r: r.update(seed=-1), lambda r: r.update(metrics=None),
    lambda r: r["metrics"].update(resamples=0), lambda r: r["metrics"].update(interval_level=7.0),
    lambda r: r.update(method=[]),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(MALFORMED)))
def test_a_malformed_record_is_one_line(copied, number, capsys):
    change(copied, fastv_gqa, lambda record: (MALFORMED[number](record), True)[1])
    code = app.main(["check", str(copied), "--baseline", str(copied)])
    error = capsys.readouterr().err
    assert code == 1 or (code == 2 and error.startswith("error: ") and error.count("\n") == 1)


@pytest.mark.parametrize(
    "name, content",
    [
        ("answers.parquet", b"PAR1 and no more"), ("questions.parquet", b""), ("records.jsonl", b"{}\n"),
        ("records.jsonl", b""), ("records.jsonl", b"\xff\xfe"), ("leaderboard.csv", b"a,b\n1,2,3\n"),
        ("leaderboard.csv", b"\xff\xfe"), ("leaderboard.md", b"\xff\xfe"),
        ("index.html", b'<script type="application/json" id="data">{</script>'),
    ],
)  # fmt: skip
def test_a_damaged_file_is_one_line(copied, name, content, capsys):
    (copied / name).write_bytes(content)
    assert app.main(["check", str(copied), "--baseline", str(copied)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and name in error


def test_the_command_makes_a_bundle_of_a_run_folder(small, tmp_path, capsys):
    run = bundle.read(small)
    root = tmp_path / "run"
    for record in [*run.cells.values(), *run.efficiency.values()]:
        plain = {k: v for k, v in record.items() if k != "path"}
        slug = f"{record['method']['spec']}_{record['method']['budget']}_{record.get('key') or 'x'}"
        place = f"cells/{record['task']}" if record["kind"] == "cell" else "efficiency"
        records.write(root / place / f"{slug}.json", plain)
    shutil.copy(small / "leaderboard.csv", root)
    assert app.main(["bundle", str(root)]) == 0
    out = capsys.readouterr().out
    assert "run-bundle" in out and "records.jsonl" in out and "clean commit" in out
    made = bundle.read(tmp_path / "run-bundle")
    assert made.cells.keys() == run.cells.keys() and made.header["without_answers"]
    assert app.main(["bundle", str(root)]) == 2 and "not empty" in capsys.readouterr().err
    assert app.main(["bundle", str(tmp_path / "run-bundle")]) == 2
    assert "is a bundle already" in capsys.readouterr().err
