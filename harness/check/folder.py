"""Whether the files of a run, or of a bundle, agree with each other: every number from the answers, or from
what the records hold of each document, and nothing missing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from harness.check import printed, scores
from harness.check.expected import Expected, done, units_of
from harness.check.findings import Finding
from harness.check.printed import EXACT, RESAMPLED, agree
from harness.store import bundle
from harness.store.bundle import Run
from harness.store.journal import Answer
from harness.tasks.bootstrap import Statistic, Units, sums_of_many
from harness.tasks.suites import BENCHMARKS
from methods.errors import UserError

#: what all records of a run share
_SHARED = (
    "dtype",
    "seed",
    "backbone.name",
    "backbone.weights",
    "backbone.config",
    "data.blind",
    "data.suite",
)


def read(folder: Path, whole: bool = False) -> Run:
    """The run or bundle in `folder`. UserError if it is none, or holds records of unknown tasks; whole: also
    if a record or a journal is damaged."""
    run = bundle.read(folder, whole)
    for task, _, _ in run.cells:
        if task not in BENCHMARKS:
            raise UserError(f"{folder} holds a record of an unknown task {task!r}")
    return run


def integrity(run: Run) -> Iterator[Finding]:
    """Everything that can be computed anew from the run's own files."""
    for name, problem in bundle.changed_files(run):
        where = f"{run.folder.name}/{name}"
        yield Finding("FAIL", where, "file", problem, "as bundled", "", run.folder / name)
    for path, problem in run.damaged:
        where = f"{run.folder.name}/{path.relative_to(run.folder)}"
        yield Finding("FAIL", where, "contents", problem, "as written", "left out of all below", path)
    yield from _shared(run)
    yield from _complete(run)
    for address, record in run.cells.items():
        if not done(record):
            last = str(record.get("error", "")).strip().splitlines()[-1:] or [""]
            yield Finding("FAIL", run.name(address), "cell", "failed", "done", last[0], record["path"])
    yield from _intervals(run)
    for address, record in run.cells.items():
        if done(record):
            yield from _documents(run.name(address), record)
            answers = run.answers.get(address)
            if answers is None:
                yield Finding("skipped", run.name(address), "answers", note="the answers are not there")
            else:
                yield from _from_answers(run, run.name(address), record, answers)
    yield from _alike(run)
    for (spec, budget), record in run.efficiency.items():
        if not done(record):
            where = f"{run.folder.name}: efficiency, {spec} at {budget}"
            yield Finding("FAIL", where, "record", "failed", "done", "", record["path"])
    yield from printed.findings(run, Expected(run))


# ---- is it one run, and whole


def _shared(run: Run) -> Iterator[Finding]:
    """What must be the same in all records."""
    for key in _SHARED:
        part, _, name = key.partition(".")
        found: dict[object, list[dict]] = {}
        for record in (*run.cells.values(), *run.efficiency.values()):
            value = record.get(part)
            if name:
                if not isinstance(value, Mapping):
                    continue
                value = value.get(name)
            found.setdefault(repr(value), []).append(record)
        usual, *others = sorted(found.items(), key=lambda item: -len(item[1]))
        for value, records in others:
            where = f"{run.folder.name}: {records[0]['task']}, {records[0]['method']['spec']}"
            more = f" and {len(records) - 1} more" if len(records) > 1 else ""
            yield Finding(
                "FAIL", where + more, key, value, usual[0], "the run's other records have another",
                records[0]["path"],
            )  # fmt: skip


def _complete(run: Run) -> Iterator[Finding]:
    """Every method has every task, and a measurement of its costs, and vanilla is there."""
    tasks = list(dict.fromkeys(a[0] for a in run.cells))
    methods = dict.fromkeys([*(a[1:] for a in run.cells), *run.efficiency])
    if ("vanilla", None) not in methods:
        yield _lacks(run, "vanilla", "cell", "the reference of all ratios is not there")
    for spec, budget in methods:
        name = spec + ("" if budget is None else f" at {budget:g}")
        absent = [t for t in tasks if (t, spec, budget) not in run.cells]
        for task in absent:
            yield _lacks(run, f"{task}, {name}", "cell", "other methods have it")
        if run.efficiency and (spec, budget) not in run.efficiency:
            yield _lacks(run, name, "measurement", "its costs: other methods have them")


def _lacks(run: Run, which: str, what: str, note: str) -> Finding:
    return Finding("FAIL", f"{run.folder.name}: {which}", what, "missing", "there", note, run.folder)


# ---- cells


def _intervals(run: Run) -> Iterator[Finding]:
    """Scores and intervals from what is resampled; equal clusters are drawn once for all methods."""
    alike: dict[tuple, list[tuple[tuple, Units]]] = {}
    for address, record in run.cells.items():
        if done(record):
            units, metrics = units_of(record), record["metrics"]
            key = (address[0], units.keys, units.strata, metrics["resamples"], record["seed"])
            alike.setdefault(key, []).append((address, units))
    for (task, _, _, resamples, seed), members in alike.items():
        function = BENCHMARKS[task].scoring.statistic
        several = sums_of_many([units for _, units in members], resamples, seed)
        for (address, units), sums in zip(members, several):
            yield from _interval(run.name(address), run.cells[address], units, function, sums)


def _interval(
    where: str, record: Mapping, units: Units, function: Statistic, sums: np.ndarray
) -> Iterator[Finding]:
    metrics, path = record["metrics"], record["path"]
    try:
        with np.errstate(divide="ignore", invalid="ignore"):
            value = float(function(units.counts.sum(0, keepdims=True))[0])
            draws = function(sums)
    except (ValueError, IndexError) as error:
        problem = f"the benchmark's score cannot be made of them ({error})"
        yield _judged(where, "resampled counts", False, problem, path)
        return
    yield agree(where, "score", value, metrics["score"], path)
    level = metrics["interval_level"]
    bounds = np.percentile(draws, [50 * (1 - level), 50 * (1 + level)])
    for name, computed, stands in zip(("interval, low", "interval, high"), bounds, metrics["interval"]):
        yield agree(where, name, float(computed), stands, path, RESAMPLED)


def _documents(where: str, record: Mapping) -> Iterator[Finding]:
    """A record's parts against each other: documents, tokens, scores of single documents."""
    path, tokens, documents = record["path"], record["visual_tokens"], record["documents"]
    number = sum(n for _, n in tokens["rows"])
    yield agree(where, "documents", number, record["data"]["documents"], path)
    yield agree(where, "documents, rows", len(set(documents["row"])), record["data"]["documents"], path)
    layers = [row for row, _ in tokens["rows"]]
    if not number or any(len(row) != record["backbone"]["layers"] for row in layers):
        yield Finding("FAIL", where, "visual tokens", f"{len(layers)} rows", "one count per layer", "", path)
        return
    mean = sum(sum(row) / len(row) * n for row, n in tokens["rows"]) / number
    yield agree(where, "visual tokens, mean over layers", mean, tokens["mean_over_layers"], path)
    kept = sum(row[-1] * n for row, n in tokens["rows"]) / number
    yield agree(where, "visual tokens, kept", kept, tokens["kept"], path)
    for place, stands in enumerate(tokens.get("per_layer", ())):
        each = sum(row[place] * n for row, n in tokens["rows"]) / number
        yield agree(where, f"visual tokens, layer {place + 1}", each, stands, path)
    if "kept" in documents:
        same = Counter(documents["kept"]) == _last_layer(tokens["rows"])
        yield _judged(where, "visual tokens of each document", same, "their counts differ", path)
    low, high = _possible(record)
    total = sum(documents["score"])
    inside = low - 1e-6 <= total <= high + 1e-6 and all(0 <= s <= 1 for s in documents["score"])
    yield _judged(
        where, "scores of the documents", inside,
        f"they sum to {total:g}, the score asks for {low:g}" + (f" to {high:g}" if high > low else ""), path,
    )  # fmt: skip


def _last_layer(rows: Sequence) -> Counter:
    counted: Counter = Counter()
    for layers, n in rows:
        counted[layers[-1]] += n
    return counted


def _judged(where: str, what: str, right: bool, problem: str, path: Path) -> Finding:
    if right:
        return Finding("ok", where, what, path=path)
    return Finding("FAIL", where, what, "differ", "as the run", problem, path)


def _possible(record: Mapping) -> tuple[float, float]:
    """Lowest and highest sum of the documents' scores that the resampled counts allow."""
    benchmark, number = BENCHMARKS[record["task"]], len(record["documents"]["row"])
    counts = np.array(record["units"]["counts"], dtype=float)
    if benchmark.unit == "points":  # MME: a pair gives 0, 50 or 200 points for 0, 1 or 2 right answers
        right = (np.array(counts.reshape(len(counts), -1, 2)[:, :, 0].sum(1)) // 50).clip(0, 2)
        return float(right.sum()), float(right.sum())
    if benchmark.stratum and counts.shape[1] % 3 == 0:  # POPE: right are true positives and negatives
        accuracy = record["metrics"].get("accuracy")
        if accuracy is not None:
            return accuracy / 100 * number, accuracy / 100 * number
        wrong = max(counts[:, 1::3].sum(), counts[:, 2::3].sum())
        return float(counts[:, 0::3].sum()), float(number - wrong)
    if benchmark.group_by is not None:  # MMBench: a question and its rotations are right together
        hits, groups = counts[:, 0].sum(), len(counts)
        return float(hits), float(number - (groups - hits))
    return float(counts[:, 0].sum()), float(counts[:, 0].sum())


# ---- answers


def _from_answers(run: Run, where: str, record: Mapping, answers: Sequence[Answer]) -> Iterator[Finding]:
    """The record's counts and scores from the answers themselves."""
    path, tokens = record["path"], record["visual_tokens"]
    if [a.row for a in answers] != record["documents"]["row"]:
        yield _judged(where, "answers", False, "they answer other documents than the record names", path)
        return
    counted = Counter(tuple(a.visual_tokens) for a in answers)
    same = {tuple(layers): n for layers, n in tokens["rows"]} == dict(counted)
    yield _judged(where, "visual tokens of the answers", same, "the record has other counts", path)
    if "kept" in record["documents"]:
        same = [a.visual_tokens[-1] for a in answers] == record["documents"]["kept"]
        yield _judged(where, "visual tokens kept of each answer", same, "the record has others", path)
    for name, values in (
        ("text_tokens", [a.input_tokens - a.image_tokens for a in answers]),
        ("image_places", [a.image_tokens for a in answers]),
        ("output_tokens", [a.output_tokens for a in answers]),
    ):
        yield agree(where, name, sum(values) / len(values), tokens.get(name, math.nan), path)
    questions = run.questions.get(record["task"], {})
    if any(a.row not in questions for a in answers):
        yield Finding("skipped", where, "answers, scored again", note="the questions are not there")
        return
    yield from _rescored(where, record, [questions[a.row] for a in answers], [a.text for a in answers])


def _rescored(where: str, record: Mapping, questions: Sequence, texts: Sequence[str]) -> Iterator[Finding]:
    path = record["path"]
    try:
        again = scores.rescore(record["task"], questions, texts)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        yield _judged(where, "answers, scored again", False, f"a question lacks or garbles {error}", path)
        return
    if again is None:
        note = "no rule of this benchmark is written for the check"
        yield Finding("skipped", where, "answers, scored again", note=note)
        return
    yield agree(where, "score of the answers", again.value, record["metrics"]["score"], path)
    stands = record["documents"]["score"]
    wrong = [i for i, (a, b) in enumerate(zip(again.documents, stands)) if abs(a - b) > EXACT]
    problem = ""
    if wrong:
        first = wrong[0]
        problem = (
            f"{len(wrong)} differ; first row {record['documents']['row'][first]}: the answer "
            f"{texts[first][:30]!r} has {again.documents[first]:g}, the record {stands[first]:g}"
        )
    yield _judged(where, "scores of the documents, from answers", not wrong, problem, path)
    units = record["units"]
    held = dict(zip(units["cluster"], units["counts"]))
    same = held.keys() == again.clusters.keys() and all(
        np.allclose(held[key], again.clusters[key]) for key in held
    )
    yield _judged(where, "resampled counts, from answers", same, "the record has others", path)


def _alike(run: Run) -> Iterator[Finding]:
    """Without the questions: equal answers to one document must have equal scores, whoever gave them."""
    for task in dict.fromkeys(a[0] for a in run.answers):
        if run.questions.get(task) or (BENCHMARKS[task].group_by and not BENCHMARKS[task].group_size):
            continue
        known: dict[tuple, tuple[float, str]] = {}
        for address, answers in run.answers.items():
            if address[0] != task:
                continue
            given = run.cells[address]["documents"]["score"]
            for answer, score in zip(answers, given):
                other = known.setdefault((answer.row, answer.text), (score, run.name(address)))
                if other[0] != score:
                    path = run.cells[address]["path"]
                    problem = f"row {answer.row}: the same answer has {other[0]:g} in {other[1]}"
                    yield _judged(run.name(address), "scores of equal answers", False, problem, path)
                    break
