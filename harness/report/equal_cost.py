"""The equal-cost table beside a leaderboard (`--match flops`): every method at the budget whose prefill costs
what keeping b visual tokens before the language model does. equal_cost.md and equal_cost.csv."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from harness.costs.match import Match
from harness.report import numbers, tables
from harness.report.tables import MISSING
from harness.store import atomic

NAME = "equal_cost"


def budgets(matches: Mapping[tuple, Match]) -> dict[tuple, float | None]:
    """By (block, spec), the budget of equal cost; methods without one are not there."""
    return {key: m.budget for key, m in matches.items() if m.budget is not None}


def publish(out, table: pd.DataFrame, matches: Mapping[tuple, Match], titles: Mapping[float, str]) -> str:
    """Write both files; returns a line for a terminal.

    Args:
        table: `numbers.build` at `budgets`.
        titles: of the blocks.
    """
    kept = table.drop(columns=[c for c in (*numbers.NOT_IN_FILES, "group") if c in table])
    kept.insert(0, "match", "flops")
    atomic.replace(out / f"{NAME}.csv", kept.to_csv(index=False, lineterminator="\n").encode())
    atomic.replace(out / f"{NAME}.md", (render(table, matches, titles) + "\n").encode())
    without = dict.fromkeys(spec for (_, spec), m in matches.items() if m.budget is None)
    told = f" (not to be had for {', '.join(without)})" if without else ""
    return f"Every method at the FLOPs of keeping as many tokens before the language model: {NAME}.md{told}"


def averages(table: pd.DataFrame) -> dict[tuple, float]:
    """By (block, spec): the average at equal cost."""
    rows = table[table["budget"].notna()]
    return dict(zip(zip(rows["block"], rows["spec"]), rows["average"]))


def render(table: pd.DataFrame, matches: Mapping[tuple, Match], titles: Mapping[float, str]) -> str:
    """Markdown."""
    parts = [
        "# At equal cost",
        "",
        "- Every method at the budget whose prefill costs as many FLOPs as keeping the block's tokens before "
        "the language model and computing nothing (`uniform`), by plan, at the size of a question of this "
        "run (docs/efficiency.md). off: what it costs more by that plan; step: what one step of its budget "
        "costs there. Both in % of that prefill.",
        "- FLOPs: as in the leaderboard, from what was measured; ratio to vanilla.",
    ]
    names = tables.labels(spec for _, spec in matches)
    for block, rows in table.groupby("block", sort=False):
        found = [matches.get((block, spec)) for spec in rows["spec"]]
        kept, mean = (tables.column(rows, name, ".1f") for name in ("kept", "mean_over_layers"))
        columns = {
            "Method": [m + " (control)" * (k == "control") for m, k in zip(rows["method"], rows["kind"])],
            "budget": [MISSING if m is None else f"{m.budget:g}" for m in found],
            **tables.means(rows),
            "tokens: kept / mean": [f"{a} / {b}" for a, b in zip(kept, mean)],
            "FLOPs (ratio)": tables.column(rows, "gflops_ratio", ".3f"),
            "off / step, %": [MISSING if m is None else _off(m) for m in found],
        }
        parts += ["", f"## {titles[block]}", "", tables.markdown(tables.as_rows(columns))]
        for (own, spec), match in matches.items():
            if own == block and match.budget is None:
                parts += ["", f"{names[spec]} cannot be had at this cost: {tables.escaped(match.reason)}."]
    return "\n".join(parts)


def _off(found: Match) -> str:
    off, step = ((n / found.target) for n in (found.macs - found.target, found.step))
    return f"{100 * off:+.2f} / {100 * step:.2f}"
