"""The leaderboard: one row a method, one block a budget, from the run's records alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from tabulate import tabulate

from harness.costs import macs
from harness.report import figures
from harness.run import measure_costs, reuse
from harness.run.config import RunConfig
from harness.run.session import Session
from harness.store import atomic
from harness.tasks.bootstrap import Units, resampled_sums
from harness.tasks.suites import BENCHMARKS, averaged

MISSING = "–"
#: behind a method's name in the tables: the caption has a footnote on it
FOOTNOTE = "†"
#: the same for what `--keep-results` re-uses
KEPT = "‡"


def publish(session: Session, outcome) -> str:
    """Write leaderboard.md, leaderboard.csv and the figures into `config.out`; returns the Markdown."""
    config, counter = session.config, macs.ModelCounter(session.backbone.model)
    text_tokens = common_text_length(outcome.cells)
    table = build(config, outcome.cells, outcome.efficiency, counter, text_tokens)
    if outcome.kept:
        table["other_code"] = [", ".join(outcome.kept.get(_address(row), ())) for _, row in table.iterrows()]
    text = render(config, table, caption(config, outcome, text_tokens))
    atomic.replace(config.out / "leaderboard.md", (text + "\n").encode())
    csv = table.drop(columns="failed").to_csv(index=False, lineterminator="\n")
    atomic.replace(config.out / "leaderboard.csv", csv.encode())
    figures.draw(table, config.out)
    return text


def common_text_length(records: Sequence[Mapping]) -> int:
    """The number of text tokens that FLOPs are counted at, the same for all methods: mean over the run's
    prompts.

    Raises nothing: 0 when no cell is done.
    """
    lengths = {
        r["task"]: (r["visual_tokens"]["text_tokens"], r["data"]["documents"])
        for r in records
        if r["status"] == "done"
    }
    total = sum(n for _, n in lengths.values())
    return round(sum(length * n for length, n in lengths.values()) / total) if total else 0


def build(
    config: RunConfig,
    records: Sequence[Mapping],
    measured: Sequence[Mapping],
    counter: macs.ModelCounter,
    text_tokens: int,
) -> pd.DataFrame:
    """One row a (block, method). Columns: block, method, budget; score, low, high a task; average and its
    interval; kept, kept_std, mean_over_layers; gflops and gflops_ratio; prefill, vision, selection, llm (ms,
    median), prefill_p10/p90, speedup; failed (names of the cells that failed).
    """
    cells = {(r["method"]["spec"], r["method"]["budget"], r["task"]): r for r in records}
    vanilla = {task: r for (_, budget, task), r in cells.items() if budget is None}
    rows = []
    for block in sorted(config.budgets, reverse=True):
        for entry in measured:
            method = entry["method"]
            if method["budget"] not in (None, block):
                continue
            mine = {
                b.name: cells[method["spec"], method["budget"], b.name]
                for b in config.benchmarks
                if (method["spec"], method["budget"], b.name) in cells
            }
            done = {name: r for name, r in mine.items() if r["status"] == "done"}
            row = {"block": block, "method": method["spec"], "budget": method["budget"]}
            for name, record in done.items():
                row[name] = record["metrics"]["score"]
                row[f"{name}_low"], row[f"{name}_high"] = record["metrics"]["interval"]
            row.update(average(done, vanilla, config) if len(done) == len(mine) else {})
            row.update(_tokens(done))
            row.update(_cost(entry, done, counter, text_tokens))
            row["failed"] = [n for n in mine if n not in done] + (
                ["efficiency"] if entry["status"] == "failed" else []
            )
            rows.append(row)
    table = pd.DataFrame(rows)
    for column in ("gflops", "prefill"):
        if column not in table:
            table[column] = math.nan
    reference = table.loc[table["budget"].isna() & table["gflops"].notna(), "gflops"]
    table["gflops_ratio"] = table["gflops"] / reference.iloc[0] if len(reference) else math.nan
    return table


def average(done: Mapping[str, Mapping], vanilla: Mapping[str, Mapping], config: RunConfig) -> dict:
    """The paper's "Avg.": mean over the tasks of score / vanilla's score, in %, with a paired bootstrap
    interval.

    Paired: method and vanilla share the resamples of a task (same clusters, same seed), so that the luck of
    the documents cancels. {} when a ratio does not exist (vanilla failed or scored 0).
    """
    points, draws = [], []
    for name in averaged(done):
        record, base = done[name], vanilla.get(name)
        if base is None or base["status"] != "done" or base["metrics"]["score"] == 0:
            return {}
        points.append(record["metrics"]["score"] / base["metrics"]["score"])
        function = BENCHMARKS[name].scoring.statistic
        size, seed = record["metrics"]["resamples"], config.seed
        ours, theirs = (function(resampled_sums(_units(r), size, seed)) for r in (record, base))
        with np.errstate(divide="ignore", invalid="ignore"):
            draws.append(ours / theirs)
    spread = np.mean(draws, 0)
    spread = spread[np.isfinite(spread)]
    low, high = np.percentile(spread, [2.5, 97.5]) if len(spread) else (math.nan, math.nan)
    return {"average": 100 * float(np.mean(points)), "average_low": 100 * low, "average_high": 100 * high}


def _units(record: Mapping) -> Units:
    u = record["units"]
    return Units(tuple(u["cluster"]), np.array(u["counts"], dtype=float), tuple(u["stratum"]))


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
    macs = measure_costs.total_macs(counter, entry, rows, text_tokens)
    times = entry["latency_ms"]
    reference = times["vanilla_total_median"]
    return {
        "gflops": 2 * macs / 1e9,
        "selection_gflops": 2 * entry["macs"]["selection"] / 1e9,
        "prefill": times["total"]["median"],
        "prefill_p10": times["total"]["p10"],
        "prefill_p90": times["total"]["p90"],
        **{part: times[part]["median"] for part in ("vision", "selection", "llm")},
        "speedup": reference / times["total"]["median"] if reference else math.nan,
        "peak_gb": times["peak_bytes"] / 1e9 if times["peak_bytes"] else math.nan,
        "joules": times["joules"] if times["joules"] is not None else math.nan,
    }


def render(config: RunConfig, table: pd.DataFrame, caption: str) -> str:
    """Markdown: the caption, then for each budget the leaderboard and what its costs are made of."""
    parts = [f"# Leaderboard: {Path(config.backbone).name}", "", caption]
    unit = ("TFLOPs", 1e-3) if table["gflops"].max() >= 1000 else ("GFLOPs", 1.0)
    for block, rows in table.groupby("block", sort=False):
        parts += ["", f"## Budget {_budget(block)}"]
        for body in (_scores(config, rows, unit), _costs(rows, unit)):
            align = ["left"] + ["right"] * (len(body) - 1)
            parts += [
                "",
                tabulate(body, headers="keys", tablefmt="github", disable_numparse=True, colalign=align),
            ]
    return "\n".join(parts)


def _budget(budget: float) -> str:
    if isinstance(budget, float) and budget < 1:
        return f"{100 * budget:g} % of an image's visual tokens ({100 - 100 * budget:g} % pruned)"
    return f"{budget:.0f} visual tokens"


def _column(rows: pd.DataFrame, name: str, form: str, scale: float = 1.0) -> list[str]:
    values = rows[name] if name in rows else [math.nan] * len(rows)
    return [MISSING if pd.isna(v) else format(v * scale, form) for v in values]


def _joined(pattern: str, *columns: list[str]) -> list[str]:
    return [MISSING if MISSING in values else pattern.format(*values) for values in zip(*columns)]


def notes(specs: Iterable[str]) -> dict[str, str]:
    """The footnotes of those methods that have one, by spec (`Pruner.note`)."""
    from methods import registry

    return {spec: note for spec in specs if (note := registry.build(spec).note)}


def _labels(rows: pd.DataFrame) -> list[str]:
    noted = notes(rows["method"])
    kept = rows["other_code"] if "other_code" in rows else [""] * len(rows)
    return [
        spec + f" {FOOTNOTE}" * (spec in noted) + f" {KEPT}" * bool(files)
        for spec, files in zip(rows["method"], kept)
    ]


def _address(row: Mapping) -> tuple:
    """(spec, budget) of a row of the table."""
    return row["method"], None if pd.isna(row["budget"]) else row["budget"]


def _scores(config: RunConfig, rows: pd.DataFrame, unit: tuple[str, float]) -> dict[str, list[str]]:
    body = {"Method": _labels(rows)}
    for b in config.benchmarks:
        scores = _column(rows, b.name, ".0f" if b.unit == "points" else ".1f")
        body[b.title] = ["failed" if b.name in failed else s for failed, s in zip(rows["failed"], scores)]
    body["Avg. %"] = _column(rows, "average", ".1f")
    body["95 % interval"] = _joined(
        "{}–{}", _column(rows, "average_low", ".1f"), _column(rows, "average_high", ".1f")
    )
    kept = _joined("{} ± {}", _column(rows, "kept", ".1f"), _column(rows, "kept_std", ".1f"))
    body["tokens: kept / mean"] = _joined(
        "{} / {}", [k.removesuffix(" ± 0.0") for k in kept], _column(rows, "mean_over_layers", ".1f")
    )
    body[f"{unit[0]} (ratio)"] = _joined(
        "{} ({})", _column(rows, "gflops", ".2f", unit[1]), _column(rows, "gflops_ratio", ".2f")
    )
    body["prefill ms (speed-up)"] = _joined(
        "{} ({}x)", _column(rows, "prefill", ".1f"), _column(rows, "speedup", ".2f")
    )
    return body


def _costs(rows: pd.DataFrame, unit: tuple[str, float]) -> dict[str, list[str]]:
    body = {"Method": _labels(rows)}
    for part in ("vision", "selection", "llm"):
        body[f"{part} ms"] = _column(rows, part, ".2f")
    body["prefill ms p10–p90"] = _joined(
        "{}–{}", _column(rows, "prefill_p10", ".1f"), _column(rows, "prefill_p90", ".1f")
    )
    body[f"own work, {unit[0]}"] = _column(rows, "selection_gflops", ".2g", unit[1])
    if rows.get("peak_gb", pd.Series(dtype=float)).notna().any():
        body["peak GB"] = _column(rows, "peak_gb", ".2f")
        body["J / image"] = _column(rows, "joules", ".1f")
    return body


def caption(config: RunConfig, outcome, text_tokens: int) -> str:
    """What the numbers are, on what, and where each came from."""
    done = [r for r in outcome.cells if r["status"] == "done"]
    sizes = {r["task"]: (r["data"]["documents"], r["data"]["documents_in_file"]) for r in done}
    titles = {b.name: b.title for b in config.benchmarks}
    slices = ", ".join(f"{titles[t]} {n} of {total}" for t, (n, total) in sizes.items())
    head = (outcome.efficiency or done)[0]
    sessions = sorted({r["written"] for r in outcome.efficiency if r["status"] == "done"})
    lost = {r["task"]: len(r["data"].get("unaskable", ())) for r in done}
    limited = any(n + lost[task] < total for task, (n, total) in sizes.items())
    failed = f", {len(outcome.failed)} failed" if outcome.failed else ""
    lines = [
        f"Backbone **{Path(config.backbone).name}**, {config.dtype}, on {head['device']['name']}; "
        f"data: {config.suite.title}, documents: {slices}"
        + (f" (the fixed slice of {_limits(config)})." if limited else "."),
        f"Cells: {outcome.computed} computed by this run, {outcome.reused} re-used from files of "
        f"earlier runs{failed}.",
        "Scores are lmms-eval's (0.7.3): %, MME in points, POPE the mean F1 of its parts. Avg. is the mean "
        "over the tasks of score / vanilla, with its paired bootstrap interval (others: leaderboard.csv).",
        "Tokens: visual tokens entering the last layer / averaged over the LLM's layers; measured, mean over "
        "all documents (± standard deviation, where a method keeps more of one image than of another).",
        f"FLOPs: one prefill, 2 FLOPs per multiply-accumulate, {text_tokens} text tokens, vision tower, "
        "projector, the method's own work and the LLM head at one position included; ratio to vanilla.",
        "Prefill: median ms, batch size 1, from pixels to the first token's logits, methods measured in "
        f"turn, {config.latency_repeats} times ({', '.join(sessions)}); speed-up to vanilla in that session.",
    ]
    specs = dict.fromkeys(r["method"]["spec"] for r in outcome.efficiency)
    lines += [f"{FOOTNOTE} {spec}: {note}." for spec, note in notes(specs).items()]
    if outcome.kept:
        files = dict.fromkeys(name for names in outcome.kept.values() for name in names)
        lines.append(
            f"{KEPT} measured before {reuse.listed(list(files))} changed, and kept as it was "
            "(--keep-results; which files for which row: other_code in leaderboard.csv)."
        )
    if cut := _cut(done, titles):
        lines.append(cut)
    lines += [f"Left out: {line}." for line in outcome.left_out]
    if any(lost.values()):
        counts = ", ".join(f"{titles[task]} {n}" for task, n in lost.items() if n)
        lines.append(
            f"Not asked, since their images cannot be shown to the model: {counts} (rows and reasons: "
            "data.unaskable in the records). Scores are over the others."
        )
    if config.blind:
        lines.insert(1, "**Blind**: every image was replaced by a grey one of its size (--blind).")
    if config.suite.synthetic:
        lines.append("The images are drawn, so no number here compares with the paper's tables.")
    else:
        lines += _comparable(done, titles)
    return "\n".join(f"- {line}" for line in lines)


def _cut(done: Sequence[Mapping], titles: Mapping[str, str]) -> str:
    """How many answers were as long as they may be; empty if none was."""
    found: dict[str, list[int]] = {}
    for r in done:
        if r.get("answers_at_cap"):
            own = found.setdefault(r["task"], [0, 0, r["prompt"]["generation"]["max_new_tokens"]])
            own[0] += r["answers_at_cap"]
            own[1] += r["data"]["documents"]
    each = [f"{titles[t]} {n} of {total} (at {cap} tokens)" for t, (n, total, cap) in found.items()]
    what = "Answers that reached the cap on their length (--max-new-tokens)"
    return f"{what}: {', '.join(each)}." if each else ""


def _limits(config: RunConfig) -> str:
    """The `--limit` that gives the run's slices."""
    given = {config.limit_of(b) for b in config.benchmarks} - {None}
    return "--limit " + " / ".join(str(n) for n in sorted(given))


def _comparable(done: Sequence[Mapping], titles: Mapping[str, str]) -> list[str]:
    """Which columns can stand beside the paper's, and why the others cannot, in one or two lines."""
    data = {r["task"]: r["data"] for r in done}
    alike = [titles[t] for t, d in data.items() if d["comparable_to_paper"]]
    tasks: dict[str, list[str]] = {}
    for task, d in data.items():
        for reason in () if d["comparable_to_paper"] else d["comparability"].split("; "):
            tasks.setdefault(reason, []).append(titles[task])
    apart = [f"{', '.join(own)} ({reason})" for reason, own in tasks.items()]
    lines = [f"Comparable to the paper: {', '.join(alike)}."] if alike else []
    if len(counted := averaged(data)) < len(data):
        left = [titles[t] for t in data if t not in counted]
        lines.append(f"Avg. does not count {', '.join(left)}, which is the same benchmark asked otherwise.")
    return lines + ([f"Not comparable to the paper: {'; '.join(apart)}."] if apart else [])


def read_table(folder: Path) -> pd.DataFrame:
    """The leaderboard.csv of a run."""
    return pd.read_csv(folder / "leaderboard.csv")
