"""A run folder as `run_all.py` leaves it, and whether its files agree with each other."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from backbones import shapes
from harness.check.findings import Finding
from harness.costs.closed_form import closed_form_head, closed_form_layer
from harness.store import records
from harness.tasks.bootstrap import Units, interval
from harness.tasks.suites import BENCHMARKS, averaged
from methods.errors import UserError

#: a cell by (task, method spec, budget)
Address = tuple[str, str, "int | float | None"]
CHECKPOINTS = Path(__file__).resolve().parents[2] / "backbones" / "pocket" / "checkpoints"
#: the columns of leaderboard.csv that are recomputed
_NUMBERS = {
    *BENCHMARKS, "budget", "average", "gflops", "gflops_ratio", "prefill", "speedup",
}  # fmt: skip
#: numbers that were written down and read again
EXACT = 1e-9


@dataclass(frozen=True)
class Run:
    """cells: finished and failed ones by address; efficiency: by (spec, budget); table: leaderboard.csv, None
    if there is none. Every record carries its file under the key "path". Of several records of a cell (other
    documents, an edited method) the latest counts; `repeated` are their (spec, budget).
    """

    folder: Path
    cells: Mapping[Address, dict]
    efficiency: Mapping[tuple, dict]
    table: list[dict] | None
    repeated: frozenset[tuple] = frozenset()

    @property
    def backbone(self) -> str:
        return next(iter(self.cells.values()))["backbone"]["name"]

    def name(self, address: Address) -> str:
        task, spec, budget = address
        return f"{self.folder.name}: {task}, {spec}" + ("" if budget is None else f" at {budget}")


def read(folder: Path) -> Run:
    """Raises UserError for a folder that is no run, and for a file in it that is no such record."""
    if not (folder / "cells").is_dir():
        raise UserError(
            f"{folder} is no run folder: it has no cells/; name one that run_all.py wrote (--out)"
        )
    cells: dict[Address, dict] = {}
    repeated = set()
    for path in sorted(folder.glob("cells/*/*.json")):
        record = _read(path, "cell")
        if record["task"] not in BENCHMARKS:
            raise UserError(f"{path} is of an unknown task {record['task']!r}")
        address = (record["task"], record["method"]["spec"], record["method"]["budget"])
        other = cells.get(address)
        if other is not None:
            repeated.add(address[1:])
        if other is None or other["written"] < record["written"]:
            cells[address] = record
    if not cells:
        raise UserError(f"{folder} holds no cell records (cells/TASK/*.json)")
    costs: dict[tuple, dict] = {}
    for path in sorted(folder.glob("efficiency/*.json")):
        record = _read(path, "efficiency")
        key = (record["method"]["spec"], record["method"]["budget"])
        if key in costs:
            repeated.add(key)
        if key not in costs or costs[key]["written"] < record["written"]:
            costs[key] = record
    return Run(folder, cells, costs, _table(folder / "leaderboard.csv"), frozenset(repeated))


def _read(path: Path, kind: str) -> dict:
    record = records.read(path)
    if record.get("kind") != kind:
        raise UserError(f"{path} is a record of kind {record.get('kind')!r}, not {kind!r}; move it away")
    try:
        _ = record["method"]["spec"], record["method"]["budget"], record["written"], record["task"]
        _ = record["backbone"]["name"], record["backbone"]["layers"], record["device"]["name"]
        if record["status"] == "done" and kind == "cell":
            _ = record["metrics"]["score"], record["metrics"]["interval"], record["visual_tokens"]["rows"]
            _ = record["metrics"]["resamples"], record["metrics"]["interval_level"], record["seed"]
            _ = record["data"]["documents"], record["data"]["digest"], record["documents"]["row"]
            _ = record["visual_tokens"]["kept"], record["visual_tokens"]["mean_over_layers"]
            _ = record["visual_tokens"]["text_tokens"]
            units_of(record)
        if record["status"] == "done" and kind == "efficiency":
            _ = record["macs"]["tower"], record["macs"]["projector"], record["macs"]["selection"]
            _ = record["latency_ms"]["total"]["median"], record["latency_ms"]["vanilla_total_median"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} lacks or garbles {error}; it is no complete {kind} record, move it away"
        ) from error
    return {**record, "path": path}


def units_of(record: Mapping) -> Units:
    """What the cell's score is resampled from. Raises ValueError if its columns are of unequal length."""
    u = record["units"]
    units = Units(tuple(u["cluster"]), np.array(u["counts"], dtype=float), tuple(u["stratum"]))
    if not len(units.keys) == len(units.counts) == len(units.strata) or units.counts.ndim != 2:
        raise ValueError("units")
    return units


def _table(path: Path) -> list[dict] | None:
    import csv

    if not path.exists():
        return None
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        if any(not row.get("method") for row in rows):
            raise ValueError("a row has no method")
        return [{k: _number(v) if k in _NUMBERS else v for k, v in row.items()} for row in rows]
    except (OSError, ValueError, TypeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no leaderboard of this program ({error})") from error


def _number(text: str) -> float:
    return float(text) if text else math.nan


def done(record: Mapping) -> bool:
    return record["status"] == "done"


# ---- do the files agree


def integrity(run: Run) -> Iterator[Finding]:
    """Scores and intervals recomputed from what is resampled, token means from their rows, and every number
    of leaderboard.csv from the records."""
    for address, record in run.cells.items():
        where = run.name(address)
        if not done(record):
            last = str(record.get("error", "")).strip().splitlines()[-1:] or [""]
            yield Finding("FAIL", where, "cell", "failed", "done", last[0], record["path"])
            continue
        yield from _cell(where, record)
    for (spec, budget), record in run.efficiency.items():
        if not done(record):
            where = f"{run.folder.name}: efficiency, {spec} at {budget}"
            yield Finding("FAIL", where, "record", "failed", "done", "", record["path"])
    if run.table is not None:
        yield from _leaderboard(run)


def _agree(
    where: str, what: str, computed: float, stands: float, path: Path, tolerance: float = EXACT
) -> Finding:
    close = math.isclose(computed, stands, rel_tol=tolerance, abs_tol=tolerance)
    both_missing = math.isnan(computed) and math.isnan(stands)
    status = "ok" if close or both_missing else "FAIL"
    note = "" if status == "ok" else "the file contradicts itself or its run"
    return Finding(status, where, what, f"{computed:.6g}", f"{stands:.6g}", note, path)


def _cell(where: str, record: Mapping) -> Iterator[Finding]:
    path, metrics, tokens = record["path"], record["metrics"], record["visual_tokens"]
    units, function = units_of(record), BENCHMARKS[record["task"]].scoring.statistic
    value = float(function(units.counts.sum(0, keepdims=True))[0])
    yield _agree(where, "score", value, metrics["score"], path)
    bounds = interval(units, function, metrics["interval_level"], metrics["resamples"], record["seed"])
    for name, computed, stands in zip(("interval, low", "interval, high"), bounds, metrics["interval"]):
        # percentiles of resamples: a library's other order of summation may move them in the last digits
        yield _agree(where, name, computed, stands, path, 1e-6)
    number = sum(n for _, n in tokens["rows"])
    yield _agree(where, "documents", number, record["data"]["documents"], path)
    mean = sum(sum(layers) / len(layers) * n for layers, n in tokens["rows"]) / number
    yield _agree(where, "visual tokens, mean over layers", mean, tokens["mean_over_layers"], path)


def _leaderboard(run: Run) -> Iterator[Finding]:
    path = run.folder / "leaderboard.csv"
    text_tokens = common_text_length(run)
    flops = _flops(run, text_tokens)
    vanilla = {a[0]: r for a, r in run.cells.items() if a[2] is None and a[1] == "vanilla" and done(r)}
    for row in run.table:
        budget = None if math.isnan(row.get("budget", math.nan)) else row["budget"]
        mine = {a[0]: r for a, r in run.cells.items() if a[1] == row["method"] and a[2] == budget and done(r)}
        where = f"{run.folder.name}/leaderboard.csv: {row['method']}" + (f" at {budget:g}" if budget else "")
        if {(row["method"], budget), ("vanilla", None)} & run.repeated:
            yield Finding(
                "skipped", where, "row", note="several records of its cells: which one it shows is open"
            )
            continue
        if not mine:
            yield Finding("FAIL", where, "row", "no record", "a row", "no cell record has this method", path)
            continue
        for task, record in mine.items():
            yield _agree(where, task, record["metrics"]["score"], row.get(task, math.nan), path)
        if not math.isnan(row.get("average", math.nan)):
            ratios = [
                r["metrics"]["score"] / vanilla[t]["metrics"]["score"]
                for t, r in mine.items()
                if t in vanilla and t in averaged(mine)
            ]
            yield _agree(where, "average %", 100 * float(np.mean(ratios)), row["average"], path)
        cost = run.efficiency.get((row["method"], budget))
        if cost is None or not done(cost) or math.isnan(row.get("gflops", math.nan)):
            continue
        times = cost["latency_ms"]
        yield _agree(where, "prefill ms", times["total"]["median"], row.get("prefill", math.nan), path)
        if times["vanilla_total_median"]:
            speed = times["vanilla_total_median"] / times["total"]["median"]
            yield _agree(where, "speed-up", speed, row.get("speedup", math.nan), path)
        computed = flops(cost, mine.values())
        if computed is None:
            yield Finding("skipped", where, "GFLOPs", note="the backbone's configuration is not at hand")
        else:
            yield _agree(where, "GFLOPs", computed, row["gflops"], path)
    rows = {row["method"]: row for row in run.table}
    if "vanilla" in rows:
        for row in run.table:
            ratio = row.get("gflops", math.nan) / rows["vanilla"].get("gflops", math.nan)
            where = f"{run.folder.name}/leaderboard.csv: {row['method']}"
            yield _agree(where, "GFLOPs, ratio", ratio, row.get("gflops_ratio", math.nan), path)


def common_text_length(run: Run) -> int:
    """The text length that the run's FLOPs are counted at: see harness.report.leaderboard."""
    from harness.report.leaderboard import common_text_length

    return common_text_length(list(run.cells.values()))


def _flops(run: Run, text_tokens: int):
    """A function from (efficiency record, cell records) to GFLOPs by closed form; None where the backbone's
    configuration is not at hand, or is not the one that the records were made with."""
    config = _text_config(run.backbone)
    vanilla = run.efficiency.get(("vanilla", None))
    if config is None or vanilla is None or not done(vanilla):
        return lambda cost, cells: None
    probe = vanilla["macs"]
    try:
        pairs = list(zip(probe["probe_visual_tokens"], probe["probe_text_tokens"]))
        again = sum(_llm(config, layers, text) for layers, text in pairs) / len(pairs)
        same = math.isclose(again, probe["probe_llm"], rel_tol=EXACT)
    except (KeyError, AttributeError, ZeroDivisionError):
        same = False
    if not same:
        return lambda cost, cells: None

    def gflops(cost: Mapping, cells) -> float:
        rows = [row for record in cells for row in record["visual_tokens"]["rows"]]
        documents = sum(n for _, n in rows)
        llm = sum(_llm(config, layers, text_tokens) * n for layers, n in rows) / documents
        parts = cost["macs"]
        return 2 * (parts["tower"] + parts["projector"] + parts["selection"] + llm) / 1e9

    return gflops


def _llm(config, layers, text_tokens: int) -> int:
    return sum(closed_form_layer(config, v + text_tokens) for v in layers) + closed_form_head(config)


def _text_config(backbone: str):
    shape = shapes.named_like(backbone)
    if shape is not None:
        return shape.config.text_config
    for folder in (Path(backbone), CHECKPOINTS / backbone):
        try:
            body = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            return SimpleNamespace(**body["text_config"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None
