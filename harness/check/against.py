"""A run's scores against an earlier run of ours, and against what was published."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import numpy as np

from backbones import shapes
from harness.check.expected import done, units_of
from harness.check.findings import Finding
from harness.check.registry import label
from harness.published import Registry, row_for
from harness.published.arithmetic import half_unit
from harness.published.schema import Accuracy, ScoreRow
from harness.store.bundle import Run
from harness.tasks.bootstrap import resampled_sums
from harness.tasks.suites import BENCHMARKS

LEVEL, RESAMPLES = 0.95, 4000
#: with fewer resampled clusters a bootstrap says nothing
FEWEST = 10
#: what other versions of libraries, kernels and prompts may move, as a share of the scale
PUBLISHED_TOLERANCE = 0.005
SCALE = {"%": 100.0, "points": 2800.0}
#: visual tokens and MAC are counted, not sampled: any growth beyond rounding is real
COUNTED_TOLERANCE = 0.005


# ---- our own baseline


def baseline(run: Run, earlier: Run) -> Iterator[Finding]:
    """Each cell, and each method's mean over the tasks, against `earlier` on the same documents.

    The difference has a paired bootstrap interval: both runs share the resamples, so the luck of the
    documents cancels. A drop fails if the whole interval lies below zero. Growth of counted costs fails too;
    slower is a warning, on the same device alone. What the baseline has and the run lacks fails, and so do
    another data type and another seed.
    """
    yield from _lacking(run, earlier)
    yield from _other_settings(run, earlier)
    paired: dict[tuple, dict[str, tuple[dict, dict]]] = {}
    for address, record in run.cells.items():
        other = earlier.cells.get(address)
        where = f"{run.name(address)} / {earlier.folder.name}"
        if other is None:
            yield Finding("skipped", where, "score", note="not in the baseline")
        elif done(record) and done(other):
            reason = _not_paired(record, other)
            if reason:
                yield Finding("skipped", where, "score", note=reason)
                continue
            paired.setdefault(address[1:], {})[address[0]] = (record, other)
            yield _drop(where, record, other)
            yield _growth(where, record, other)
    for (spec, budget), tasks in paired.items():
        if len(tasks) > 1:
            where = f"{run.folder.name}: {spec}" + ("" if budget is None else f" at {budget}")
            yield _mean_drop(f"{where} / {earlier.folder.name}", tasks)
    for key, cost in run.efficiency.items():
        if key in earlier.efficiency and done(cost) and done(earlier.efficiency[key]):
            yield from _slower(run, earlier, key)


def _lacking(run: Run, earlier: Run) -> Iterator[Finding]:
    """A line for each task, and each method at a budget, that only the baseline has; single cells and
    measurements otherwise."""
    tasks, methods = ({a[i] for a in run.cells} for i in (0, slice(1, 3)))
    absent = [a for a in earlier.cells if a not in run.cells]
    lines: dict[str, int] = {}
    for task, spec, budget in absent:
        method = spec + ("" if budget is None else f" at {budget:g}")
        which = f"{task}, {method}"
        if task not in tasks:
            which = task
        elif (spec, budget) not in methods:
            which = method
        lines[which] = lines.get(which, 0) + 1
    for which, number in lines.items():
        yield _missing(run, earlier, which, f"{number} cells" if number > 1 else "cell")
    for spec, budget in earlier.efficiency:
        if (spec, budget) not in run.efficiency and (spec, budget) in methods:
            which = spec + ("" if budget is None else f" at {budget:g}")
            yield _missing(run, earlier, which, "measurement")


def _missing(run: Run, earlier: Run, which: str, what: str) -> Finding:
    return Finding(
        "FAIL", f"{run.folder.name}: {which} / {earlier.folder.name}", what, "missing", "there",
        "the baseline has it; --partial if the run was not meant to", run.folder,
    )  # fmt: skip


def is_lacking(finding: Finding) -> bool:
    """Whether a finding says that the baseline has something that the run lacks."""
    return finding.note.startswith("the baseline has it")


def _other_settings(run: Run, earlier: Run) -> Iterator[Finding]:
    for key in ("dtype", "seed"):
        new, old = (next(iter(r.cells.values())).get(key) for r in (run, earlier))
        where = f"{run.folder.name} / {earlier.folder.name}"
        note = "" if new == old else "runs compare at equal settings; name another run with --baseline"
        status = "ok" if new == old else "FAIL"
        yield Finding(status, where, key, f"{new}", f"{old}", note, run.folder)


def _not_paired(record: Mapping, other: Mapping) -> str | None:
    """Why two records of one cell cannot be compared document by document; None: they can."""
    if record["backbone"].get("weights") != other["backbone"].get("weights"):
        return "other weights; run the baseline anew"
    if bool(record["data"].get("blind")) != bool(other["data"].get("blind")):
        return "one of the two is blind"
    if record["data"]["digest"] != other["data"]["digest"]:
        return "other data"
    if record["documents"]["row"] != other["documents"]["row"]:
        return "other documents (--limit)"
    a, b = units_of(record), units_of(other)
    if a.keys != b.keys or a.strata != b.strata or a.counts.shape != b.counts.shape:
        return "other clusters"
    return None


def _draws(record: Mapping, seed: int) -> np.ndarray:
    """Scores of the resamples, [RESAMPLES]; equal seeds draw equal clusters."""
    function = BENCHMARKS[record["task"]].scoring.statistic
    return function(resampled_sums(units_of(record), RESAMPLES, seed))


def _bounds(draws: np.ndarray) -> tuple[float, float]:
    draws = draws[np.isfinite(draws)]
    if not len(draws):
        return float("nan"), float("nan")
    low, high = np.percentile(draws, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return float(low), float(high)


def _drop(where: str, record: Mapping, other: Mapping) -> Finding:
    new, old = record["metrics"]["score"], other["metrics"]["score"]
    if new == old:
        return Finding("ok", where, "score", f"{new:.1f}", f"{old:.1f}", path=record["path"])
    low, high = _bounds(_draws(record, 0) - _draws(other, 0))
    clusters = len(units_of(record).keys)
    status = "FAIL" if high < 0 and clusters >= FEWEST else "ok"
    note = f"difference {new - old:+.1f}, {100 * LEVEL:g} % interval {low:+.1f} to {high:+.1f}"
    if clusters < FEWEST:
        note += f"; {clusters} clusters are too few to judge"
    return Finding(status, where, "score", f"{new:.1f}", f"{old:.1f}", note, record["path"])


def _mean_drop(where: str, tasks: Mapping[str, tuple[dict, dict]]) -> Finding:
    """Mean over the tasks of score / the baseline's, in %: small drops everywhere add up."""
    points, draws, clusters = [], [], 0
    for seed, (_, (record, other)) in enumerate(sorted(tasks.items())):
        old = other["metrics"]["score"]
        if not old:
            continue
        points.append(record["metrics"]["score"] / old)
        # divided by the baseline's score itself: a resample of few documents may well score 0
        draws.append((_draws(record, seed) - _draws(other, seed)) / old)
        clusters += len(units_of(record).keys)
    if not points:
        return Finding("skipped", where, "mean of ratios %", note="the baseline scores 0 everywhere")
    value = 100 * float(np.mean(points))
    low, high = _bounds(100 * np.mean(draws, 0))
    status = "FAIL" if high < 0 and clusters >= FEWEST else "ok"
    note = f"difference {value - 100:+.1f}, {100 * LEVEL:g} % interval {low:+.1f} to {high:+.1f}"
    path = next(iter(tasks.values()))[0]["path"].parent.parent
    return Finding(status, where, "mean of ratios %", f"{value:.1f}", "100.0", note, path)


def _growth(where: str, record: Mapping, other: Mapping) -> Finding:
    key = "mean_over_layers"
    new, old = record["visual_tokens"][key], other["visual_tokens"][key]
    grown = new > old * (1 + COUNTED_TOLERANCE)
    return Finding(
        "FAIL" if grown else "ok", where, "visual tokens, mean over layers", f"{new:.1f}", f"{old:.1f}",
        "more than the baseline" if grown else "", record["path"],
    )  # fmt: skip


def _slower(run: Run, earlier: Run, key: tuple) -> Iterator[Finding]:
    record, other = run.efficiency[key], earlier.efficiency[key]
    where = f"{run.folder.name}: {key[0]}" + ("" if key[1] is None else f" at {key[1]}")
    where += f" / {earlier.folder.name}"
    new, old = record["macs"]["selection"], other["macs"]["selection"]
    same_model = record["backbone"].get("config") == other["backbone"].get("config")
    if same_model:
        grown = new > old * (1 + COUNTED_TOLERANCE)
        yield Finding(
            "warning" if grown else "ok", where, "own work, MMAC", f"{new / 1e6:.3f}", f"{old / 1e6:.3f}",
            "more than the baseline (the probe questions decide part of it)" if grown else "", record["path"],
        )  # fmt: skip
    if record["device"]["name"] != other["device"]["name"] or not same_model:
        yield Finding("skipped", where, "prefill ms", note="other device or model")
        return
    now, then = record["latency_ms"]["total"], other["latency_ms"]["total"]
    slower = now["p10"] > then["p90"]
    yield Finding(
        "warning" if slower else "ok", where, "prefill ms, median", f"{now['median']:.1f}",
        f"{then['median']:.1f}", "p10 above the baseline's p90" if slower else "", record["path"],
    )  # fmt: skip


# ---- published numbers


def published(run: Run, registry: Registry, own: Collection[str] = ()) -> Iterator[Finding]:
    """Each cell beside the published one of the same backbone, method and budget.

    They agree if the published score, to its last digit, lies in the cell's bootstrap interval widened by
    PUBLISHED_TOLERANCE of the scale. Below it fails, unless the row is known not to reproduce; above it
    warns. own: names of tables that the user brought: those are held against any run of a backbone of that
    name, whatever its data.
    """
    shape = shapes.named_like(run.backbone)
    names = {Path(run.backbone).name, *([shape.name] if shape is not None else [])}
    tables = [t for t in registry.accuracy.values() if t.backbone in names]
    mine = [t for t in tables if t.name in own]
    if own and not mine:
        asked = ", ".join(sorted(own))
        yield Finding(
            "FAIL", run.folder.name, "scores", Path(run.backbone).name, "a table of it",
            f"{asked} has no accuracy table of this backbone", run.folder,
        )  # fmt: skip
    if own:
        tables = mine
    elif shape is None:
        tables = []
    if not tables and not own:
        yield Finding(
            "skipped", run.folder.name, "scores", note=f"no published table is about {run.backbone}"
        )
        return
    for address, record in run.cells.items():
        if not done(record):
            continue
        for table in tables:
            row = row_for(table, *address[1:])
            if row is not None and address[0] in row.scores:
                layers = None if table.name in own else shape.layers
                yield _beside(run.name(address), record, table, row, layers)
    for table in mine:
        yield from _without_cells(run, table)


def _without_cells(run: Run, table: Accuracy) -> Iterator[Finding]:
    """Rows of a user's table that the run says nothing of."""
    for row in table.rows:
        tasks = [t for t in row.scores if any(a[0] == t and row_for(table, *a[1:]) is row for a in run.cells)]
        if lacking := [t for t in row.scores if t not in tasks]:
            note = f"the run has no cell of {', '.join(lacking)}"
            yield Finding("warning", label(table, row), "scores", "none", "a run's", note, table.path)


def _beside(where: str, record: Mapping, table: Accuracy, row: ScoreRow, layers: int | None) -> Finding:
    """layers: of the published backbone; None: the user says that it is the run's."""
    task, published = record["task"], row.scores[record["task"]]
    where, data = f"{where} / {label(table, row)}", record["data"]
    if layers is not None and record["backbone"]["layers"] != layers:
        return Finding(
            "skipped", where, "score", note="named like the published backbone, but of other depth"
        )
    if layers is not None and not data.get("comparable_to_paper"):
        return Finding("skipped", where, "score", note=data.get("comparability", "not comparable"))
    slack = PUBLISHED_TOLERANCE * SCALE[BENCHMARKS[task].unit] + half_unit(published)
    low, high = record["metrics"]["interval"]
    score, status, note = record["metrics"]["score"], "ok", ""
    if high + slack < published:
        status, note = ("FAIL", "below") if row.reproduces else ("warning", f"below; {row.note}")
    elif low - slack > published:
        status, note = "warning", "above" + (f"; {row.note}" if row.note else "")
    if note:
        note = f"{note} (interval {low:.1f} to {high:.1f}, tolerance {slack:.2f})"
    return Finding(status, where, "score", f"{score:.1f}", f"{published}", note, Path(record["path"]))
