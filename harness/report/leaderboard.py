"""The leaderboard: a run's table as Markdown, as CSV, and for a terminal."""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from harness.costs import macs
from harness.report import equal_cost, evidence, figures, numbers, prediction, tables
from harness.report.page import contents
from harness.report.tables import MISSING
from harness.run import reuse
from harness.run.config import RunConfig
from harness.run.session import Session
from harness.store import atomic, bundle
from harness.tasks.bootstrap import FEWEST_CLUSTERS
from harness.tasks.suites import averaged

#: behind a method's name in the tables: the caption has a footnote on it
FOOTNOTE = "†"
#: the same for what `--keep-results` re-uses
KEPT = "‡"


def publish(session: Session, outcome) -> str:
    """Write leaderboard.md, leaderboard.csv, the figures and the questions into `config.out`; returns the
    table for a terminal."""
    config, counter = session.config, macs.ModelCounter(session.backbone.model)
    text_tokens = numbers.common_text_length(outcome.cells)
    titles = {b: _budget(b) for b in config.budgets}
    build = functools.partial(
        numbers.build,
        outcome.cells,
        outcome.efficiency,
        budgets=config.budgets,
        tasks=[b.name for b in config.benchmarks],
        seed=config.seed,
        counter=counter,
        text_tokens=text_tokens,
    )
    (table, averages), equal = build(), ""
    if session.matches:
        at = equal_cost.budgets(session.matches)
        matched = build(at=at).table
        equal = equal_cost.publish(config.out, matched, session.matches, titles)
        means, places = equal_cost.averages(matched), list(zip(table["block"], table["spec"]))
        table["equal_cost"] = [means.get(place, math.nan) for place in places]
        table["equal_cost_budget"] = [at.get(place, math.nan) for place in places]
    if outcome.kept:
        table["other_code"] = [", ".join(outcome.kept.get(_address(row), ())) for _, row in table.iterrows()]
    lines = caption(config, outcome, table, text_tokens)
    lines += [f"Not available here: {line}." for line in session.unavailable]
    write(table, config, lines, config.out)
    if where := evidence.render(outcome.cells, config.budgets):
        atomic.replace(config.out / "evidence.md", where.encode())
    index = ""
    if config.suite.synthetic and session.described["family"] == "llava":
        index = prediction.render(table, config.budgets)
        atomic.replace(config.out / "prediction.md", index.encode())
    bundle.write_questions(config.out, {d.benchmark.name: d.questions for d in session.documents})
    contents.publish(session, outcome, table, averages, lines, titles)
    where = where and "Evidence recall, and accuracy by regime and kind of question: evidence.md"
    return "\n\n".join(part for part in (terminal(config, table, lines), where, index, equal) if part)


def write(table: pd.DataFrame, config: RunConfig, lines: Sequence[str], out: Path) -> None:
    """leaderboard.md, leaderboard.csv and the figures of a table."""
    atomic.replace(out / "leaderboard.md", (render(config, table, lines) + "\n").encode())
    kept = table.drop(columns=[c for c in numbers.NOT_IN_FILES if c in table])
    atomic.replace(out / "leaderboard.csv", kept.to_csv(index=False, lineterminator="\n").encode())
    figures.draw(table, out)


def render(config: RunConfig, table: pd.DataFrame, lines: Sequence[str]) -> str:
    """Markdown: the caption, then for each budget the leaderboard and what its costs are made of."""
    name = tables.escaped(Path(config.backbone).name)
    parts = [f"# Leaderboard: {name}", "", *(f"- {tables.escaped(line)}" for line in lines)]
    unit = _unit(table)
    for block, rows in table.groupby("block", sort=False):
        parts += ["", f"## Budget {_budget(block)}"]
        for columns in (_scores(config, rows, unit), _costs(rows, unit)):
            parts += ["", tables.markdown(tables.as_rows(columns))]
    return "\n".join(parts)


def terminal(config: RunConfig, table: pd.DataFrame, lines: Sequence[str]) -> str:
    """The caption as it is, and tables of at most 100 columns, or of those that the terminal has if methods'
    names can be cut so far: averages, what was kept, costs as ratios."""
    width = min(tables.WIDTH, shutil.get_terminal_size((tables.WIDTH, 0)).columns)
    parts = ["- " + tables.without_paths(line).replace("**", "") for line in lines]
    for block, rows in table.groupby("block", sort=False):
        columns = {"method": _labels(rows), **tables.means(rows), "tokens: kept / mean": _kept(rows)}
        columns["FLOPs ratio"] = tables.column(rows, "gflops_ratio", ".2f")
        columns["speed-up"] = [v if v == MISSING else v + "x" for v in tables.column(rows, "speedup", ".2f")]
        kinds = list(rows["kind"])
        rules = [i for i in range(1, len(kinds)) if kinds[i] != kinds[i - 1]]
        parts += ["", f"Budget {_budget(block)}", "", tables.plain(tables.as_rows(columns), width, rules)]
    return "\n".join(parts)


def _unit(table: pd.DataFrame) -> tuple[str, float]:
    """Name of the unit that FLOPs are printed in, and how much of it a GFLOP is."""
    return ("TFLOPs", 1e-3) if table["gflops"].max() >= 1000 else ("GFLOPs", 1.0)


def _budget(budget: float) -> str:
    if isinstance(budget, float) and budget < 1:
        return f"{100 * budget:g} % of an image's visual tokens ({100 - 100 * budget:g} % pruned)"
    return f"{budget:.0f} visual tokens"


def notes(specs: Iterable[str]) -> dict[str, str]:
    """The footnotes of those methods that have one, by spec (`Pruner.note`)."""
    from methods import registry

    return {spec: note for spec in specs if (note := registry.build(spec).note)}


def _labels(rows: pd.DataFrame) -> list[str]:
    noted = notes(rows["spec"])
    kept = rows["other_code"] if "other_code" in rows else [""] * len(rows)
    return [
        label
        + " (control)" * (kind == "control")
        + f" {FOOTNOTE}" * (spec in noted)
        + f" {KEPT}" * bool(files)
        for spec, label, kind, files in zip(rows["spec"], rows["method"], rows["kind"], kept)
    ]


def _address(row: Mapping) -> tuple:
    """(spec, budget) of a row of the table."""
    return row["spec"], numbers.budget_of(row)


def _kept(rows: pd.DataFrame) -> list[str]:
    kept, spread = (tables.column(rows, name, ".1f") for name in ("kept", "kept_std"))
    kept = tables.joined("{} ± {}", kept, spread)
    means = tables.column(rows, "mean_over_layers", ".1f")
    return tables.joined("{} / {}", [k.removesuffix(" ± 0.0") for k in kept], means)


def _scores(config: RunConfig, rows: pd.DataFrame, unit: tuple[str, float]) -> dict[str, list[str]]:
    body = {"Method": _labels(rows)}
    for b in config.benchmarks:
        scores = tables.column(rows, b.name, ".0f" if b.unit == "points" else ".1f")
        body[b.title] = ["failed" if b.name in failed else s for failed, s in zip(rows["failed"], scores)]
    body |= {**tables.means(rows), "tokens: kept / mean": _kept(rows)}
    body[f"{unit[0]} (ratio)"] = tables.joined(
        "{} ({})", tables.column(rows, "gflops", ".2f", unit[1]), tables.column(rows, "gflops_ratio", ".2f")
    )
    body["prefill ms (speed-up)"] = tables.joined(
        "{} ({}x)", tables.column(rows, "prefill", ".1f"), tables.column(rows, "speedup", ".2f")
    )
    return body


def _costs(rows: pd.DataFrame, unit: tuple[str, float]) -> dict[str, list[str]]:
    body = {"Method": _labels(rows)}
    for part in ("vision", "selection", "llm"):
        body[f"{part} ms"] = tables.column(rows, part, ".2f")
    body["prefill ms p10–p90"] = tables.joined(
        "{}–{}", tables.column(rows, "prefill_p10", ".1f"), tables.column(rows, "prefill_p90", ".1f")
    )
    body[f"own work, {unit[0]}"] = tables.column(rows, "selection_gflops", ".2g", unit[1])
    if rows.get("peak_gb", pd.Series(dtype=float)).notna().any():
        body["peak GB"] = tables.column(rows, "peak_gb", ".2f")
        body["J / image"] = tables.column(rows, "joules", ".1f")
    return body


def caption(config: RunConfig, outcome, table: pd.DataFrame, text_tokens: int) -> list[str]:
    """What the numbers are, on what, and where each came from; a line of Markdown each."""
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
        *_about_averages(table),
        "Tokens: visual tokens entering the last layer / averaged over the LLM's layers; measured, mean over "
        "all documents (± standard deviation, where a method keeps more of one image than of another).",
        f"FLOPs: one prefill, 2 FLOPs per multiply-accumulate, {text_tokens} text tokens, vision tower, "
        "projector, the method's own work and the LLM head at one position included; ratio to vanilla.",
        "Prefill: median ms, batch size 1, from pixels to the first token's logits, methods measured in "
        f"turn, {config.latency_repeats} times ({', '.join(sessions)}); speed-up to vanilla in that session.",
    ]
    names = tables.labels(r["method"]["spec"] for r in outcome.efficiency)
    lines += [f"{FOOTNOTE} {names[spec]}: {note}." for spec, note in notes(names).items()]
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
            f"Not asked, since they cannot be shown to the model: {counts} (rows and reasons: "
            "data.unaskable in the records). Scores are over the others."
        )
    if config.blind:
        lines.insert(1, "**Blind**: every image was replaced by a grey one of its size (--blind).")
    if config.suite.synthetic:
        lines.append("The images are drawn, so no number here compares with the paper's tables.")
    else:
        lines += _comparable(done, titles)
    return lines


def _about_averages(table: pd.DataFrame) -> list[str]:
    """How to read the order and the groups; where there is no average, why."""
    lines = [
        "Order: vanilla, the methods, and below them the controls (which know nothing of image or question), "
        "best average first. Group: methods of a block that share a letter cannot be told apart (paired "
        "bootstrap over the same questions, Holm's correction for all pairs of the block, 5 %); – where a "
        f"task has fewer than {FEWEST_CLUSTERS} independent questions."
    ]
    for reason, rows in table[table["no_average"] != ""].groupby("no_average", sort=False):
        who = "any method" if len(rows) == len(table) else ", ".join(dict.fromkeys(rows["method"]))
        lines.append(f"No Avg. for {who}: {reason}.")
    return lines


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
