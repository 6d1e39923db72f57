"""leaderboard.csv, leaderboard.md and the page of a run, number by number, against `expected`."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path

from harness.check.expected import Expected, Method, done
from harness.check.findings import Finding
from harness.report import tables
from harness.store.bundle import Run
from harness.tasks.suites import BENCHMARKS
from methods.errors import UserError

#: numbers that were written down and read again
EXACT = 1e-9
#: percentiles of resamples: a library's other order of summation may move them in the last digits
RESAMPLED = 1e-6
_KEYS = ("block", "method", "budget")
_TEXTS = ("kind", "group", "other_code", "match")
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")
#: marks behind a method's name in a Markdown table
_MARKS = re.compile(r"( \(control\)| †| ‡)+$")


def findings(run: Run, expected: Expected) -> Iterator[Finding]:
    """Every number of the run's tables, what they lack, and what they have too much."""
    path = run.folder / "leaderboard.csv"
    rows = read_csv(path) if path.exists() else None
    if rows is None:
        yield Finding("skipped", path.parent.name, "leaderboard.csv", note="there is none")
    else:
        equal = run.folder / "equal_cost.csv"
        matched = read_csv(equal) if equal.exists() else []
        yield from _csv(run, expected, path, rows)
        yield from _csv(run, expected, equal, matched, matched=True)
        seen = {expected.find(row["method"], _budget(row)) for row in (*rows, *matched)}
        yield from _absent_rows(run, expected, path, seen)
    text_path = run.folder / "leaderboard.md"
    if text_path.exists():
        blocks = list(dict.fromkeys(r["block"] for r in rows or ())) or _blocks(expected)
        yield from _markdown(run, expected, text_path, blocks)
    page = run.folder / "index.html"
    if page.exists():
        yield from _page(run, expected, page)


def _blocks(expected: Expected) -> list[float]:
    return sorted({b for _, b in expected.methods if b is not None}, reverse=True)


def agree(
    where: str, what: str, computed: float | None, stands: float, path: Path, tolerance: float = EXACT
) -> Finding:
    """Whether a number is what it must be; None: it cannot be computed here."""
    if computed is None:
        return Finding("skipped", where, what, note="the language model's shape is not at hand")
    close = math.isclose(computed, stands, rel_tol=tolerance, abs_tol=tolerance)
    both_missing = math.isnan(computed) and math.isnan(stands)
    status = "ok" if close or both_missing else "FAIL"
    note = "" if status == "ok" else "the file contradicts itself or its run"
    return Finding(status, where, what, f"{computed:.6g}", f"{stands:.6g}", note, path)


# ---- csv


def read_csv(path: Path) -> list[dict]:
    """The rows, numbers as numbers (nan where a field is empty). UserError for anything else."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    if not rows or any(key not in rows[0] for key in ("method", "budget", "block")):
        raise UserError(f"{path} is no leaderboard: it needs rows, and columns block, method and budget")
    return [{name: _field(path, name, text) for name, text in row.items()} for row in rows]


def _field(path: Path, name: str | None, text: str | None) -> object:
    if name is None or text is None:
        raise UserError(f"{path} has a row with more or fewer fields than it has columns")
    if name == "method" or name in _TEXTS:
        return text
    try:
        value = float(text or "nan")
    except ValueError as error:
        raise UserError(f"{path}, column {name}: {text[:40]!r} is no number") from error
    if math.isinf(value):
        raise UserError(f"{path}, column {name}: {text[:40]!r} is no finite number")
    return value


def _budget(row: Mapping) -> float | None:
    return None if math.isnan(row["budget"]) else row["budget"]


def _csv(
    run: Run, expected: Expected, path: Path, rows: Sequence[Mapping], matched: bool = False
) -> Iterator[Finding]:
    """matched: rows stand in the block of the budget whose cost they have."""
    seen: set[tuple] = set()
    for row in rows:
        budget = _budget(row)
        where = f"{run.folder.name}/{path.name}: {row['method']}" + (f" at {budget:g}" if budget else "")
        method = expected.find(row["method"], budget)
        if method is None or not expected.cells(method):
            yield Finding("FAIL", where, "row", "no record", "a row", "no cell record has this method", path)
            continue
        elsewhere = budget is not None and row["block"] != budget and not matched
        if math.isnan(row["block"]) or elsewhere:
            yield Finding("FAIL", where, "block", f"{budget}", f"{row['block']:g}", "another budget's", path)
            continue
        if (row["block"], method) in seen:
            yield Finding("FAIL", where, "row", "one row", "a second one", "", path)
            continue
        seen.add((row["block"], method))
        if {method, ("vanilla", None)} & run.repeated:
            yield Finding(
                "skipped", where, "row", note="several records of its cells: which one it shows is open"
            )
            continue
        yield from _csv_row(expected, where, path, row, method)


def _csv_row(expected: Expected, where: str, path: Path, row: Mapping, method: Method) -> Iterator[Finding]:
    must = expected.row(method)
    for name in dict.fromkeys([*row, *must]):
        if name in _KEYS or name in ("kind", "other_code", "match"):
            continue
        if name == "group":
            yield _letters(expected, where, path, row["block"], method, row["group"])
            continue
        if name not in row:
            computed = must[name]
            shown = "" if computed is None else f"{computed:.6g}"
            yield Finding("FAIL", where, name, shown, "no column", "missing", path)
            continue
        resampled = name.endswith(("_low", "_high"))
        yield agree(where, name, must.get(name, math.nan), row[name], path, RESAMPLED if resampled else EXACT)


def _letters(
    expected: Expected, where: str, path: Path, block: float, method: Method, stands: str
) -> Finding:
    computed = expected.groups(block).get(method, "")
    same = computed == stands
    return Finding(
        "ok" if same else "FAIL", where, "group", computed or "none", stands or "none",
        "" if same else "the file contradicts itself or its run", path,
    )  # fmt: skip


def _absent_rows(run: Run, expected: Expected, path: Path, seen: set[Method]) -> Iterator[Finding]:
    for method in expected.methods:
        if method not in seen and expected.cells(method) and method not in run.repeated:
            spec, budget = method
            where = f"{run.folder.name}/{path.name}: {spec}" + (f" at {budget:g}" if budget else "")
            yield Finding("FAIL", where, "row", "records", "no row", "the table lacks this method", path)


# ---- Markdown


def _markdown(run: Run, expected: Expected, path: Path, blocks: Sequence[float]) -> Iterator[Finding]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    caption, *sections = re.split(r"^## Budget ", text, flags=re.M)
    yield from _caption(run, expected, path, caption)
    titles = {_title(block): block for block in blocks}
    for section in sections:
        head, _, body = section.partition("\n")
        if head.strip() not in titles:
            yield Finding("FAIL", f"{run.folder.name}/{path.name}", "block", "none", head.strip(),
                          "no row of leaderboard.csv has this budget", path)  # fmt: skip
            continue
        block = titles.pop(head.strip())
        for number, table in enumerate(_tables(body)):
            yield from _markdown_table(run, expected, path, block, table, scores=number == 0)
    for title in titles:
        yield Finding("FAIL", f"{run.folder.name}/{path.name}", "block", title, "none", "missing", path)


def _title(budget: float) -> str:
    if budget < 1:
        return f"{100 * budget:g} % of an image's visual tokens ({100 - 100 * budget:g} % pruned)"
    return f"{budget:.0f} visual tokens"


def _tables(text: str) -> Iterator[list[dict[str, str]]]:
    for chunk in re.findall(r"(?:^\|.*\|[ \t]*\n?)+", text, flags=re.M):
        lines = [
            [tables.unescaped(cell) for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]
            for line in chunk.splitlines()
        ]
        heads, *rows = [line for line in lines if not all(re.fullmatch(r":?-+:?", cell) for cell in line)]
        yield [dict(zip(heads, row)) for row in rows]


def _columns(table: Sequence[Mapping], scores: bool) -> dict[str, tuple[tuple[str, float], ...]]:
    """What the columns of a Markdown table hold: by head, the names and scales of its numbers."""
    found: dict[str, tuple[tuple[str, float], ...]] = {}
    if scores:
        found |= {b.title: ((b.name, 1.0),) for b in BENCHMARKS.values()}
        found["Avg. %"] = (("average", 1.0),)
        found["95 % interval"] = (("average_low", 1.0), ("average_high", 1.0))
        found["tokens: kept / mean"] = (("kept", 1.0), ("kept_std", 1.0), ("mean_over_layers", 1.0))
        for unit, scale in (("GFLOPs", 1.0), ("TFLOPs", 1e-3)):
            found[f"{unit} (ratio)"] = (("gflops", scale), ("gflops_ratio", 1.0))
        found["prefill ms (speed-up)"] = (("prefill", 1.0), ("speedup", 1.0))
    else:
        found |= {f"{part} ms": ((part, 1.0),) for part in ("vision", "selection", "llm")}
        found["prefill ms p10–p90"] = (("prefill_p10", 1.0), ("prefill_p90", 1.0))
        for unit, scale in (("GFLOPs", 1.0), ("TFLOPs", 1e-3)):
            found[f"own work, {unit}"] = (("selection_gflops", scale),)
        found["peak GB"], found["J / image"] = (("peak_gb", 1.0),), (("joules", 1.0),)
    return found


def _needed(expected: Expected, scores: bool) -> list[str]:
    if not scores:
        return ["vision ms", "selection ms", "llm ms", "prefill ms p10–p90"]
    titles = [BENCHMARKS[t].title for t in expected.tasks]
    return [*titles, "Avg. %", "95 % interval", "group", "tokens: kept / mean", "prefill ms (speed-up)"]


def _markdown_table(
    run: Run, expected: Expected, path: Path, block: float, rows: Sequence[Mapping], scores: bool
) -> Iterator[Finding]:
    own = f"{run.folder.name}/{path.name}"
    columns = _columns(rows, scores)
    heads = list(rows[0]) if rows else []
    for head in _needed(expected, scores):
        if head not in heads:
            yield Finding("FAIL", f"{own}: budget {block:g}", head, "a column", "none", "missing", path)
    for head in heads[1:]:
        if head not in columns and head != "group":
            yield Finding("FAIL", f"{own}: budget {block:g}", head, "no such column", "a column", "", path)
    seen = set()
    for row in rows:
        label = _MARKS.sub("", row.get("Method", ""))
        method = expected.find(label, block) or expected.find(label, None)
        where = f"{own}: {label} at {block:g}"
        if method is None or not expected.cells(method) or method in seen:
            yield Finding("FAIL", where, "row", "no record", "a row", "no cell record has this method", path)
            continue
        seen.add(method)
        if {method, ("vanilla", None)} & run.repeated:
            yield Finding("skipped", where, "row", note="several records of its cells")
            continue
        must = expected.row(method)
        failed = {BENCHMARKS[t].title for t, r in expected.cells(method).items() if not done(r)}
        for head, text in row.items():
            if head == "group":
                stands = "" if text == tables.MISSING else text
                yield _letters(expected, where, path, block, method, stands)
            elif head in columns and not (head in failed and text == "failed"):
                yield _printed(where, head, text, columns[head], must, path)
    for method in expected.methods:
        if method[1] in (None, block) and method not in seen and expected.cells(method):
            where = f"{own}: {method[0]} at {block:g}"
            yield Finding("FAIL", where, "row", "records", "no row", "the table lacks this method", path)


def _printed(
    where: str, head: str, text: str, names: Sequence[tuple[str, float]], must: Mapping, path: Path
) -> Finding:
    """A cell of a table against the numbers that it must show, each to its last printed digit."""
    numbers = _NUMBER.findall(text)
    if len(names) == 3 and "±" not in text:  # without a spread, because it rounds to 0
        names = [n for n in names if n[0] != "kept_std"]
    values = [must.get(name, math.nan) for name, _ in names]
    if None in values:
        return Finding("skipped", where, head, note="the language model's shape is not at hand")
    values = [v * scale for v, (_, scale) in zip(values, names)]
    if any(math.isnan(v) for v in values):
        right, shown = text == tables.MISSING, tables.MISSING
    else:
        right = len(numbers) == len(values) and all(map(_rounds_to, values, numbers))
        shown = ", ".join(f"{v:.6g}" for v in values)
    note = "" if right else "the file contradicts its run"
    return Finding("ok" if right else "FAIL", where, head, shown, text, note, path)


def _rounds_to(value: float, text: str) -> bool:
    half = 0.5 * 10.0 ** Decimal(text).as_tuple().exponent
    return abs(value - float(text)) <= half * (1 + 1e-6) + 1e-12


def _caption(run: Run, expected: Expected, path: Path, text: str) -> Iterator[Finding]:
    """The numbers above the tables: sizes of the slices, cells, length of the text."""
    where = f"{run.folder.name}/{path.name}: caption"

    def judged(what: str, computed: object, stands: object) -> Finding:
        same = str(computed) == str(stands)
        note = "" if same else "the file contradicts its run"
        return Finding("ok" if same else "FAIL", where, what, str(computed), str(stands), note, path)

    first = next(iter(run.cells.values()))
    for what, pattern, computed in (
        ("text tokens", r"(\d+) text tokens", expected.text_tokens),
        ("dtype", r"^- Backbone \*\*.*?\*\*, ([\w.]+), on", first["dtype"]),
        ("backbone", r"^- Backbone \*\*(.*?)\*\*, ", tables.escaped(Path(run.backbone).name)),
    ):
        found = re.search(pattern, text, flags=re.M)
        yield judged(what, computed, found[1] if found else "nothing")
    cells = re.search(r"(\d+) computed by this run, (\d+) re-used", text)
    if cells and not run.repeated:
        yield judged("cells", len(run.cells), int(cells[1]) + int(cells[2]))
    for task in expected.tasks:
        records = [r for a, r in run.cells.items() if a[0] == task and done(r)]
        if not records:
            continue
        title, record = BENCHMARKS[task].title, records[-1]
        found = re.search(rf"(?:documents: |, ){re.escape(title)} (\d+ of \d+)", text)
        size = f"{len(record['documents']['row'])} of {record['data']['documents_in_file']}"
        yield judged(f"documents of {title}", size, found[1] if found else "nothing")
    repeats = {r["identity"]["repeats"] for r in run.efficiency.values() if r.get("identity")}
    told = re.search(r"in turn, (\d+) times", text)
    if len(repeats) == 1 and told:
        yield judged("repeats", next(iter(repeats)), told[1])


# ---- page


def _page(run: Run, expected: Expected, path: Path) -> Iterator[Finding]:
    """The numbers that the page draws from: rows with the columns of leaderboard.csv, as JSON in it."""
    where = f"{run.folder.name}/{path.name}"
    try:
        text = path.read_text(encoding="utf-8")
        found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, flags=re.S)
        body = json.loads(found[1]) if found else None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    rows = list(_rows_in(body))
    if not rows:
        yield Finding("FAIL", where, "numbers", "rows", "none", "the page holds no numbers as JSON", path)
    for block, row in rows:
        budget = row.get("budget")
        label = str(row["method"])
        method = expected.find(label, budget)
        if method is None or not expected.cells(method):
            yield Finding("FAIL", f"{where}: {label}", "row", "no record", "a row", "", path)
            continue
        if {method, ("vanilla", None)} & run.repeated:
            continue
        must = expected.row(method) | expected.on_page(method, block)
        for name, value in row.items():
            if name not in must or isinstance(value, bool):
                continue
            stands = math.nan if value is None else value
            if not isinstance(stands, int | float):
                yield Finding("FAIL", f"{where}: {label}", name, f"{must[name]}", repr(value)[:40], "", path)
                continue
            yield agree(f"{where}: {label}", name, must[name], stands, path, RESAMPLED)


def _rows_in(body: object, block: float | None = None) -> Iterator[tuple[float | None, dict]]:
    """All mappings in `body` that are rows of a leaderboard (they name method and budget), each with the
    budget of the table it stands in."""
    if isinstance(body, dict):
        if isinstance(body.get("method"), str) and "budget" in body:
            yield block, body
        else:
            for value in body.values():
                yield from _rows_in(value, body.get("budget", block))
    elif isinstance(body, list):
        for value in body:
            yield from _rows_in(value, block)
