"""Figures of a leaderboard for papers: average accuracy against the budget, and against what was measured of
its cost. PNG and SVG; every method has a colour, a marker and a line of its own, so that grey copies tell
them apart."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from harness.store import atomic

#: what costs are read off: name of the figure, column, label of the axis
COSTS = (
    ("accuracy_latency", "prefill", "measured prefill latency (ms, batch size 1)"),
    ("accuracy_flops", "gflops", "FLOPs of one prefill (GFLOP)"),
    ("accuracy_tokens", "mean_over_layers", "visual tokens, mean over the language model's layers"),
)
NAMES = ("accuracy_budget", *(name for name, *_ in COSTS))
FORMATS = ("png", "svg")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "d")
_LINES = ("-", "--", "-.", (0, (1, 1.2)), (0, (6, 1, 1, 1, 1, 1)))
SIZE = (7.4, 4.2)


@dataclass(frozen=True)
class Style:
    """colour: RGB. filled: open markers come in where the shapes are used up."""

    colour: tuple[float, float, float]
    marker: str
    filled: bool
    line: object

    @property
    def drawn(self) -> dict:
        """For matplotlib."""
        face = self.colour if self.filled else "white"
        return {
            "color": self.colour, "marker": self.marker, "markerfacecolor": face, "ls": self.line,
            "markeredgecolor": self.colour, "lw": 1.2, "elinewidth": 0.8, "capsize": 2,
        }  # fmt: skip


def styles(methods: Sequence[str]) -> dict[str, Style]:
    """By method. No two share a colour, and (up to 24) none a marker; neighbours differ in lightness."""
    from matplotlib.colors import hsv_to_rgb

    found = {}
    for i, method in enumerate(methods):
        colour = tuple(map(float, hsv_to_rgb((i / len(methods), 0.85, (0.45, 0.85, 0.65)[i % 3]))))
        filled = (i // len(_MARKERS)) % 2 == 0
        found[method] = Style(colour, _MARKERS[i % len(_MARKERS)], filled, _LINES[i % len(_LINES)])
    return found


def draw(table: pd.DataFrame, out: Path) -> list[Path]:
    """Write the figures NAMES of a leaderboard's rows (`harness.report.numbers.build`) in all FORMATS.

    Budgets stand in visual tokens, or in % of an image's where all of them are fractions. Draws nothing where
    no method that prunes has an average, nor against a cost that no row has, and removes what an earlier run
    drew there.
    """
    for name in NAMES:
        for suffix in FORMATS:
            (out / f"{name}.{suffix}").unlink(missing_ok=True)
    if not (table["budget"].notna() & table["average"].notna()).any():
        return []
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    data = table.copy()
    unpruned = data.loc[data["budget"].isna(), "kept"].mean()
    fractions = data["block"] < 1
    by_share = bool(fractions.all())
    data["x"] = data["block"].where(~fractions, data["block"] * (100 if by_share else unpruned))
    pruned = data[data["budget"].notna() & data["average"].notna()]
    look = styles(list(dict.fromkeys(pruned["method"])))
    # text stays text; equal tables give equal files
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "figures", "font.size": 8.5}):
        figure, axes = _axes()
        for method, own in pruned.groupby("method", sort=False):
            own = own.sort_values("x")
            axes.errorbar(own["x"], own["average"], _bars(own), label=method, ms=5, **look[method].drawn)
        axes.axhline(100, color="0.4", ls=(0, (4, 3)), lw=1, label=f"vanilla ({unpruned:.4g} tokens)")
        what = "% of an image's visual tokens" if by_share else "visual tokens"
        axes.set_xlabel(f"budget ({what})")
        axes.set_xticks(sorted(pruned["x"].unique()))
        axes.margins(x=0.1)
        paths = _save(figure, out / "accuracy_budget")
        for name, column, label in COSTS:
            if column in data and data[column].notna().any():
                paths += _save(_against(data, pruned, look, column, label), out / name)
    return paths


def _against(data: pd.DataFrame, pruned: pd.DataFrame, look: Mapping[str, Style], column: str, label: str):
    """A figure of averages against a cost: a line joins a method's budgets, a grey one the Pareto front."""
    figure, axes = _axes()
    known = data[data[column].notna() & data["average"].notna()].drop_duplicates(["method", "budget"])
    axes.plot(*_front(known, column), color="0.75", lw=3, zorder=0, label="Pareto front")
    sizes = {x: 5.5 + 2 * i for i, x in enumerate(sorted(pruned["x"].unique()))}
    for method, own in pruned[pruned[column].notna()].groupby("method", sort=False):
        own = own.sort_values("x")
        across = _spread(own) if column == "prefill" else None
        drawn = look[method].drawn
        axes.plot(own[column], own["average"], color=drawn["color"], ls=drawn["ls"], lw=1, zorder=2)
        for i, x in enumerate(own["x"]):
            one = own.iloc[[i]]
            axes.errorbar(
                one[column], one["average"], _bars(one), None if across is None else across[:, [i]],
                label=method if i == len(own) - 1 else None, ms=sizes[x], zorder=3,
                **{**drawn, "ls": "none"},
            )  # fmt: skip
    vanilla = known[known["budget"].isna()].head(1)
    axes.plot(vanilla[column], vanilla["average"], "k*", ms=11, label="vanilla", zorder=3)
    axes.set_xlabel(label + ("; larger markers: larger budgets" if len(sizes) > 1 else ""))
    return figure


def _axes():
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=SIZE)
    axes.grid(color="0.9", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylabel("average of score / vanilla (%)")
    return figure, axes


def _bars(rows: pd.DataFrame):
    """[2, rows]: from the average to the ends of its interval."""
    low, high = rows["average"] - rows["average_low"], rows["average_high"] - rows["average"]
    return pd.DataFrame([low, high]).clip(lower=0).fillna(0).to_numpy()


def _spread(rows: pd.DataFrame):
    """[2, rows]: from the median of the latency to its 10th and 90th percentile; None if they are unknown."""
    if not {"prefill_p10", "prefill_p90"} <= set(rows):
        return None
    low, high = rows["prefill"] - rows["prefill_p10"], rows["prefill_p90"] - rows["prefill"]
    return pd.DataFrame([low, high]).clip(lower=0).fillna(0).to_numpy()


def _front(rows: pd.DataFrame, column: str) -> tuple[list[float], list[float]]:
    """The points that no other one beats in both, by rising cost. Answer keys are no methods: left out."""
    from harness.report.numbers import ANSWER_KEYS

    keys = rows["method"].str.partition(":")[0].isin(ANSWER_KEYS)
    costs, averages, best = [], [], float("-inf")
    own = rows[~keys].sort_values([column, "average"], ascending=[True, False])
    for cost, average in zip(own[column], own["average"]):
        if average > best:
            costs.append(cost)
            averages.append(average)
            best = average
    return costs, averages


def _save(figure, path: Path) -> list[Path]:
    """In all formats, with a legend beside the plot, where it hides no point."""
    import matplotlib.pyplot as plt

    (axes,) = figure.axes
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, frameon=False)
    figure.tight_layout()
    paths = []
    for suffix in FORMATS:
        drawn = io.BytesIO()
        figure.savefig(drawn, format=suffix, dpi=150, metadata={"Date": None} if suffix == "svg" else None)
        paths.append(path.with_name(f"{path.name}.{suffix}"))
        atomic.replace(paths[-1], drawn.getvalue())
    plt.close(figure)
    return paths
