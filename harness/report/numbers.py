"""From a run's records to its numbers: the only place that computes what tables, figures and pages print.

(`harness.check` computes the same from the answers, by a path of its own, on purpose.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from harness.costs import macs
from harness.report import tables
from harness.run import measure_costs
from harness.store.bundle import Address
from harness.tasks.bootstrap import FEWEST_CLUSTERS, Units, groups, stream, sums_of_many
from harness.tasks.suites import BENCHMARKS, averaged

#: what a method must beat to be one: no knowledge of image or question goes into what they keep
CONTROLS = ("random", "uniform", "downsample", "oracle", "things")
#: those of them that know where the answer is; they bound what a method could reach
ANSWER_KEYS = ("oracle", "things")
#: columns of the table that are words for its readers, and in no file
NOT_IN_FILES = ("spec", "failed", "no_average", "equal_cost", "equal_cost_budget")


def common_text_length(records: Sequence[Mapping]) -> int:
    """The number of text tokens that FLOPs are counted at, the same for all methods: mean over the run's
    prompts, rounded; 0 when no cell is done.

    Args:
        records: of the run's cells.
    """
    lengths = {
        r["task"]: (r["visual_tokens"]["text_tokens"], r["data"]["documents"])
        for r in records
        if r["status"] == "done"
    }
    total = sum(n for _, n in lengths.values())
    return round(sum(length * n for length, n in lengths.values()) / total) if total else 0


@dataclass(frozen=True)
class Average:
    """The paper's "Avg.": the mean over the tasks of score / vanilla's, in %.

    Attributes:
        point: of the scores themselves; None if a ratio does not exist.
        draws: of the resamples, [R] float64.
        missing: why there is none, in words.
    """

    point: float | None
    draws: np.ndarray
    missing: str = ""

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, percentile bootstrap."""
        finite = self.draws[np.isfinite(self.draws)]
        if not len(finite):
            return math.nan, math.nan
        low, high = np.percentile(finite, [2.5, 97.5])
        return float(low), float(high)


def averages(cells: Mapping[Address, Mapping], tasks: Sequence[str], seed: int) -> dict[tuple, Average]:
    """Each method's average by (spec, budget), paired: on each task all methods share the resamples of the
    documents, so that their luck cancels in every ratio and difference.

    Args:
        cells: records by (task, spec, budget).
        tasks: names of the run's benchmarks; those that `averaged` leaves of them count.
        seed: of the resamples.
    """
    counted = averaged(tasks)
    ratios: dict[tuple, list[tuple[float, np.ndarray]]] = {}
    missing: dict[tuple, str] = {}
    for task in counted:
        own = {a[1:]: r for a, r in cells.items() if a[0] == task}
        base = own.get(("vanilla", None))
        for method, record in own.items():
            if reason := _no_ratio(task, record, base):
                missing.setdefault(method, reason)
        able = {method: r for method, r in own.items() if method not in missing}
        if not able:
            continue
        sampled = _draws(task, {("vanilla", None): base, **able}, seed)
        for method, record in able.items():
            with np.errstate(divide="ignore", invalid="ignore"):
                draws = sampled[method] / sampled["vanilla", None]
            point = record["metrics"]["score"] / base["metrics"]["score"]
            ratios.setdefault(method, []).append((point, draws))
    found = {}
    for method in dict.fromkeys(a[1:] for a in cells):
        own = ratios.get(method, [])
        if method not in missing and len(own) < len(counted):
            missing[method] = "not every task has a record"
        if method in missing:
            found[method] = Average(None, np.empty(0), missing[method])
        else:
            points, draws = zip(*own)
            found[method] = Average(100 * float(np.mean(points)), 100 * np.mean(draws, 0))
    return found


def _no_ratio(task: str, record: Mapping, base: Mapping | None) -> str:
    title = BENCHMARKS[task].title
    if record["status"] != "done":
        return f"failed on {title}"
    if base is None or base["status"] != "done":
        return f"vanilla has no score on {title}"
    if base["metrics"]["score"] == 0:
        return f"vanilla scores 0 on {title}, so there is no ratio to it"
    if base["units"]["cluster"] != record["units"]["cluster"]:
        return f"vanilla was asked other questions of {title}"
    return ""


def _draws(task: str, records: Mapping[tuple, Mapping], seed: int) -> dict[tuple, np.ndarray]:
    """Scores of the resamples by method, [R] each, from one set of resampled documents."""
    function = BENCHMARKS[task].scoring.statistic
    units = {method: units_of(record) for method, record in records.items()}
    resamples = next(iter(records.values()))["metrics"]["resamples"]
    first = next(iter(units.values()))
    sums = sums_of_many(list(units.values()), resamples, stream(first, seed))
    with np.errstate(divide="ignore", invalid="ignore"):
        return {method: function(own) for method, own in zip(units, sums)}


def units_of(record: Mapping) -> Units:
    """What a cell's record was resampled over: n clusters of documents, with counts float64 [n, c]."""
    u = record["units"]
    return Units(tuple(u["cluster"]), np.array(u["counts"], dtype=float), tuple(u["stratum"]))


class Numbers(NamedTuple):
    """What a run's reports are made of.

    Attributes:
        table: one row per (block, method), see `build`.
        averages: by (spec, budget), see `averages`.
    """

    table: pd.DataFrame
    averages: Mapping[tuple, Average]


def build(
    records: Sequence[Mapping],
    measured: Sequence[Mapping],
    *,
    budgets: Sequence[float],
    tasks: Sequence[str],
    seed: int,
    counter: macs.ModelCounter,
    text_tokens: int,
    at: Mapping[tuple, float | None] | None = None,
) -> Numbers:
    """The averages, and a table with one row per (block, method): vanilla first, then methods and after them
    controls, best average first.

    Args:
        records: of the run's cells.
        measured: records of FLOPs and latency, one per (spec, budget).
        budgets: a block each.
        tasks: names of the run's benchmarks, in the order of their columns.
        seed: of the bootstrap.
        counter: of the backbone's multiply-accumulates.
        text_tokens: that FLOPs are counted at, see `common_text_length`.
        at: the methods' budgets in each block, by (block, spec); None: the block's own.

    Returns:
        The table's columns, nan where there is nothing:
            block: its budget.
            method: see `tables.labels`.
            kind: reference, method or control.
            budget: the method's own; nan for vanilla.
            average, average_low, average_high: in % of vanilla's, and its 95 % interval.
            group: letters; methods of a block that share one cannot be told apart.
            TASK, TASK_low, TASK_high: score in the benchmark's unit, and its 95 % interval.
            kept, kept_std: visual tokens left in the last layer, mean and standard deviation over documents.
            mean_over_layers: visual tokens, mean over layers and documents.
            gflops, gflops_ratio: of a prefill (10^9; 2 a MAC), and its share of vanilla's.
            selection_gflops: those of the method's own work.
            prefill, prefill_p10, prefill_p90: ms; median and percentiles.
            vision, selection, llm: ms of its parts, medians.
            speedup: vanilla's median over the method's.
            peak_gb: 10^9 bytes allocated at most during a prefill, weights included; GPUs only.
            joules: energy of a prefill, per image.
            spec, failed, no_average: not in files: the method's spec, names of the cells that failed, why
                there is no average.
    """
    cells = {(r["task"], r["method"]["spec"], r["method"]["budget"]): r for r in records}
    means = averages(cells, tasks, seed)
    enough = all(
        len(cells[t, "vanilla", None]["units"]["cluster"]) >= FEWEST_CLUSTERS
        for t in averaged(tasks)
        if cells.get((t, "vanilla", None), {}).get("status") == "done"
    )
    names = tables.labels(entry["method"]["spec"] for entry in measured)
    rows = []
    for block in sorted(budgets, reverse=True):
        own_rows = []
        for entry in measured:
            spec, budget = entry["method"]["spec"], entry["method"]["budget"]
            if budget not in (None, block if at is None else at.get((block, spec))):
                continue
            mine = {t: cells[t, spec, budget] for t in tasks if (t, spec, budget) in cells}
            done = {name: r for name, r in mine.items() if r["status"] == "done"}
            row = {"block": block, "method": names[spec], "kind": _kind(spec), "budget": budget}
            row.update(_scores(done))
            mean = means.get((spec, budget)) or Average(None, np.empty(0), "no task has a record")
            if mean.point is not None:
                low, high = mean.interval
                row.update(average=mean.point, average_low=low, average_high=high)
            row.update(_tokens(done))
            row.update(_cost(entry, done, counter, text_tokens))
            failed = [n for n in mine if n not in done]
            failed += ["efficiency"] if entry["status"] == "failed" else []
            row.update(spec=spec, failed=failed, no_average=mean.missing)
            own_rows.append(row)
        own_rows.sort(key=_place)
        if enough:
            _mark_groups(own_rows, means)
        rows += own_rows
    table = pd.DataFrame(rows)
    for column in ("average", "average_low", "average_high", "kept", "gflops", "prefill"):
        if column not in table:
            table[column] = math.nan
    if "group" not in table:
        table["group"] = ""
    reference = table.loc[table["budget"].isna() & table["gflops"].notna(), "gflops"]
    table["gflops_ratio"] = table["gflops"] / reference.iloc[0] if len(reference) else math.nan
    order = ["block", "method", "kind", "budget", "average", "average_low", "average_high", "group"]
    return Numbers(table[order + [c for c in table.columns if c not in order]], means)


def budget_of(row: Mapping) -> float | None:
    """The budget of a row of the table, None for vanilla's."""
    return None if pd.isna(row["budget"]) else row["budget"]


def _kind(spec: str) -> str:
    name = spec.partition(":")[0]
    return "reference" if name == "vanilla" else "control" if name in CONTROLS else "method"


def _place(row: Mapping) -> tuple:
    """Where a row stands in its block."""
    return ("reference", "method", "control").index(row["kind"]), -row.get("average", -math.inf)


def _mark_groups(rows: Sequence[dict], means: Mapping[tuple, Average]) -> None:
    """Letters by the paired bootstrap with Holm's correction over all pairs of the block."""
    able = [row for row in rows if "average" in row]
    if len(able) < 2:
        return
    own = [means[row["spec"], row["budget"]] for row in able]
    letters = groups(np.array([m.point for m in own]), np.stack([m.draws for m in own]))
    for row, text in zip(able, letters):
        row["group"] = text


def _scores(done: Mapping[str, Mapping]) -> dict:
    row = {}
    for name, record in done.items():
        row[name] = record["metrics"]["score"]
        row[f"{name}_low"], row[f"{name}_high"] = record["metrics"]["interval"]
    return row


def _weighted(done: Mapping[str, Mapping], key: str) -> float:
    weights = [r["data"]["documents"] for r in done.values()]
    return float(np.average([r["visual_tokens"][key] for r in done.values()], weights=weights))


def _tokens(done: Mapping[str, Mapping]) -> dict:
    """Visual tokens by both conventions, mean over all documents of all tasks, and the standard deviation
    of those kept from document to document."""
    if not done:
        return {}
    means = {key: _weighted(done, key) for key in ("kept", "mean_over_layers")}
    rows = [row for r in done.values() for row in r["visual_tokens"]["rows"]]
    squares = np.average([layers[-1] ** 2 for layers, _ in rows], weights=[n for _, n in rows])
    return {**means, "kept_std": math.sqrt(max(0.0, squares - means["kept"] ** 2))}


def _cost(entry: Mapping, done: Mapping[str, Mapping], counter: macs.ModelCounter, text_tokens: int) -> dict:
    if entry["status"] == "failed" or not done:
        return {}
    rows = [row for r in done.values() for row in r["visual_tokens"]["rows"]]
    total = measure_costs.total_macs(counter, entry, rows, text_tokens)
    times = entry["latency_ms"]
    reference = times["vanilla_total_median"]
    return {
        "gflops": 2 * total / 1e9,
        "selection_gflops": 2 * entry["macs"]["selection"] / 1e9,
        "prefill": times["total"]["median"],
        "prefill_p10": times["total"]["p10"],
        "prefill_p90": times["total"]["p90"],
        **{part: times[part]["median"] for part in ("vision", "selection", "llm")},
        "speedup": reference / times["total"]["median"] if reference else math.nan,
        "peak_gb": times["peak_bytes"] / 1e9 if times.get("peak_bytes") else math.nan,
        "joules": times["joules"] if times.get("joules") is not None else math.nan,
    }
