"""Does what the published tables print follow from what else they print?

Averages from cells, pruning rates from token counts, speed-ups from latencies, Table 3's accuracies from
Table 1, an ablation's default from the main table, a table's row from its authors' own claim. A cell is only
known to its last digit; a printed number follows if some values that round to the printed ones give it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from harness.check.findings import Finding, Status
from harness.published import Registry, row_of
from harness.published.arithmetic import average, average_range, follows, half_unit
from harness.published.schema import Ablation, Accuracy, AuthorClaim, Efficiency, ScoreRow


def findings(registry: Registry) -> list[Finding]:
    """Every comparison within the registry."""
    found: list[Finding] = []
    for table in registry.accuracy.values():
        found += _averages(table)
        found += _other_prints(table)
        found += _rates(table)
    for table in registry.efficiency.values():
        found += _costs(table, registry.accuracy[table.accuracy_source])
    for table in registry.ablation.values():
        found += _ablation(table, registry.accuracy[table.from_table.table])
    for claims in registry.claims.values():
        for claim in claims.rows:
            found += _claim(claim, registry)
    return found


def count(found: Sequence[Finding]) -> str:
    """How many printed averages do not follow, in which tables, and how many of them do over columns that
    another work prints; empty if all do."""
    tables = Counter(
        f.where.partition(":")[0] for f in found if f.what == "average %" and f.status in ("known", "FAIL")
    )
    parts = ", ".join(f"{name}: {n}" for name, n in tables.items())
    if not tables:
        return ""
    others = sum(f.what.startswith("average % over ") and f.status == "ok" for f in found)
    text = f"{tables.total()} printed averages do not follow from what is printed ({parts})"
    return text + (f"; {others} of them follow over another paper's columns" if others else "")


def _judged(agrees: bool, expected: bool) -> tuple[Status, str]:
    """Status of a computation against what the registry says it gives, and the reason for a failure."""
    if agrees:
        return ("ok", "") if expected else ("FAIL", "follows, but the registry says that it does not")
    return ("known", "does not follow from the cells") if not expected else ("FAIL", "does not follow")


def label(table: Accuracy, row: ScoreRow) -> str:
    """`table1: fastv, 64 tokens`."""
    if row.method == "vanilla":
        return f"{table.name}: vanilla"
    size = f"{row.tokens} tokens" if row.tokens else f"{row.pruning_rate} % pruned"
    return f"{table.name}: {row.method}, {size}"


def _averages(table: Accuracy) -> Iterator[Finding]:
    for row in table.rows:
        if row.average is None:
            continue
        vanilla = table.vanilla.scores
        low, high = average_range(row.scores, vanilla)
        status, why = _judged(follows(low, high, row.average), row.average_follows)
        value = average(row, vanilla)
        if status in ("known", "FAIL") and not follows(low, high, row.average):
            why += f"; rounding allows {low:.2f} to {high:.2f}"
        yield Finding(
            status, label(table, row), "average %", f"{value:.1f}", f"{row.average}", why, table.path
        )
        if row.average_over:
            yield _over_other_columns(table, row)


def _over_other_columns(table: Accuracy, row: ScoreRow) -> Finding:
    """A printed average over the columns that the registry names, some of which only another work prints."""
    scores, vanilla = row.all_scores, table.vanilla.all_scores
    low, high = average_range(scores, vanilla, row.average_over)
    status, why = _judged(follows(low, high, row.average), True)
    value = average(scores, vanilla, row.average_over)
    further = ", ".join(t for t in row.average_over if t in row.further)
    why = why or f"over {further} too, from {row.further_source}"
    return Finding(
        status, label(table, row), f"average % over {len(row.average_over)} columns", f"{value:.1f}",
        f"{row.average}", why, table.path,
    )  # fmt: skip


def _other_prints(table: Accuracy) -> Iterator[Finding]:
    """Cells that other works print otherwise; what the row's average is with theirs."""
    vanilla = table.vanilla.scores
    for row in table.rows:
        for other in row.elsewhere:
            stands = row.average if other.column == "average" else row.scores[other.column]
            note = f"printed so by {other.by}" + (f"; {other.note}" if other.note else "")
            if other.column != "average":
                theirs = average({**row.scores, other.column: other.value}, vanilla)
                note += f"; the average would be {theirs:.2f} instead of {average(row, vanilla):.2f}"
            status: Status = "known" if other.value != stands else "FAIL"
            yield Finding(
                status, label(table, row), f"{other.column} elsewhere", f"{other.value}", f"{stands}", note,
                table.path,
            )  # fmt: skip


def _rates(table: Accuracy) -> Iterator[Finding]:
    if not table.visual_tokens:
        return
    for row in table.rows:
        if row.tokens and row.pruning_rate is not None:
            rate = 100 * (1 - row.tokens / table.visual_tokens)
            status, why = _judged(follows(rate, rate, row.pruning_rate), True)
            yield Finding(
                status, label(table, row), "pruning rate %", f"{rate:.1f}", f"{row.pruning_rate}", why,
                table.path,
            )  # fmt: skip


def _costs(table: Efficiency, accuracies: Accuracy) -> Iterator[Finding]:
    vanilla = table.rows[0]
    for row in table.rows:
        where = f"{table.name}: {row.method}, {row.tokens} tokens"
        if row.speed_up is not None:
            half, base = half_unit(row.latency_ms), half_unit(vanilla.latency_ms)
            low = (vanilla.latency_ms - base) / (row.latency_ms + half)
            high = (vanilla.latency_ms + base) / (row.latency_ms - half)
            status, why = _judged(follows(low, high, row.speed_up), True)
            value = vanilla.latency_ms / row.latency_ms
            yield Finding(status, where, "speed-up", f"{value:.2f}", f"{row.speed_up}", why, table.path)
        printed = row_of(accuracies, row.method, row.tokens, table.path.name).average
        same = printed == row.accuracy
        yield Finding(
            "ok" if same else "FAIL", where, "accuracy %", f"{printed}", f"{row.accuracy}",
            "" if same else f"{accuracies.name} prints another average", table.path,
        )  # fmt: skip


def _ablation(table: Ablation, source: Accuracy) -> Iterator[Finding]:
    name, tokens = table.from_table.table, table.from_table.tokens
    row = row_of(source, table.method, tokens, table.path.name)
    value = average(row, source.vanilla.scores, table.tasks)
    low, high = average_range(row.scores, source.vanilla.scores, table.tasks)
    for variant in table.rows:
        if not variant.default:
            continue
        status, why = _judged(follows(low, high, variant.average), variant.average_follows)
        if status != "ok":
            why = f"{why}: {name} at {tokens} tokens, {len(table.tasks)} tasks"
        yield Finding(
            status, f"{table.name}: {variant.variant}", "average %", f"{value:.1f}", f"{variant.average}",
            why, table.path,
        )  # fmt: skip


def _claim(claim: AuthorClaim, registry: Registry) -> Iterator[Finding]:
    """The paper's row of a method beside what the method's own authors say, where both name the budget."""
    for table in registry.accuracy.values():
        for row in table.rows:
            same_row = (table.backbone, row.method, row.tokens) == (
                claim.backbone,
                claim.method,
                claim.tokens,
            )
            if not same_row or claim.tokens is None or claim.setting:
                continue
            where = f"{label(table, row)} / {claim.source}"
            if claim.standing == "rerun":
                yield Finding("skipped", where, "scores", note="measured again by others")
                continue
            if claim.version != row.version:
                yield Finding(
                    "skipped", where, "scores", f"{row.version}", f"{claim.version}", "other version"
                )
                continue
            for task in sorted(set(claim.scores) & set(row.scores)):
                ours, theirs = row.scores[task], claim.scores[task]
                same = abs(ours - theirs) <= half_unit(ours) + half_unit(theirs) + 1e-9
                yield Finding(
                    "ok" if same else "FAIL", where, task, f"{theirs}", f"{ours}",
                    "" if same else "the method's authors print another figure", table.path,
                )  # fmt: skip
            if claim.average is not None and row.average is not None:
                yield Finding(
                    "skipped", where, "average %", f"{claim.average}", f"{row.average}",
                    "the authors' average is over their own benchmarks", table.path,
                )  # fmt: skip
