"""Figures of a leaderboard: average accuracy against budget, and against measured latency."""

from __future__ import annotations

import io
from itertools import cycle
from pathlib import Path

import pandas as pd

from harness.store import atomic


def draw(table: pd.DataFrame, out: Path) -> list[Path]:
    """Write accuracy_budget.png and accuracy_latency.png from the leaderboard's rows
    (harness.report.leaderboard.build).

    Budgets stand in visual tokens, or in % of an image's where all of them are fractions. Draws nothing where
    no method that prunes has an average, and removes what an earlier run drew there.
    """
    paths = [out / "accuracy_budget.png", out / "accuracy_latency.png"]
    if not (table["budget"].notna() & table["average"].notna()).any():
        for path in paths:
            path.unlink(missing_ok=True)
        return []
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import seaborn as sns

    sns.set_theme(style="whitegrid", context="paper")
    data = table.copy()
    unpruned = data.loc[data["budget"].isna(), "kept"].mean()
    fractions = data["block"] < 1
    by_share = bool(fractions.all())
    data["x"] = data["block"].where(~fractions, data["block"] * (100 if by_share else unpruned))
    pruned = data[data["budget"].notna()].drop(columns="budget").rename(columns={"block": "budget"})
    colours = cycle([*sns.color_palette("colorblind"), *sns.color_palette("dark")])
    palette = dict(zip(pruned["method"].unique(), colours))

    figure, axes = plt.subplots(figsize=(7.4, 4.2))
    sns.lineplot(pruned, x="x", y="average", hue="method", palette=palette, marker="o", ax=axes)
    for _, row in pruned.iterrows():
        axes.plot(
            [row.x] * 2, [row.average_low, row.average_high], color=palette[row.method], lw=1, alpha=0.5
        )
    axes.axhline(100, color="0.4", ls="--", lw=1, label=f"vanilla ({unpruned:.4g} tokens)")
    what = "% of an image's visual tokens" if by_share else "visual tokens"
    axes.set(xlabel=f"budget ({what})", ylabel="average of score / vanilla (%)")
    axes.set_xticks(sorted(pruned["x"].unique()))
    axes.margins(x=0.1)
    _legend(axes)
    _save(figure, paths[0])

    figure, axes = plt.subplots(figsize=(7.4, 4.2))
    sns.scatterplot(
        pruned, x="prefill", y="average", hue="method", style="budget", palette=palette, s=60, ax=axes
    )
    vanilla = data[data["budget"].isna()].head(1)
    axes.scatter(vanilla["prefill"], vanilla["average"], marker="*", s=140, color="0.3", label="vanilla")
    axes.set(xlabel="measured prefill latency (ms, batch size 1)", ylabel="average of score / vanilla (%)")
    _legend(axes)
    _save(figure, paths[1])
    return paths


def _legend(axes) -> None:
    """Beside the plot, where it hides no point."""
    axes.legend(title=None, fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)


def _save(figure, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure.tight_layout()
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150)
    plt.close(figure)
    atomic.replace(path, drawn.getvalue())
