"""Figures of a leaderboard: average accuracy against budget, and against measured latency."""

from __future__ import annotations

from pathlib import Path

import pandas as pd


def draw(table: pd.DataFrame, visual_tokens: int, out: Path) -> list[Path]:
    """Write accuracy_budget.png and accuracy_latency.png from the leaderboard's rows
    (harness.leaderboard.build).
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import seaborn as sns

    sns.set_theme(style="whitegrid", context="paper")
    data = table.copy()
    for column in ("average", "average_low", "average_high", "prefill"):
        if column not in data:
            data[column] = float("nan")
    data["tokens"] = [b * visual_tokens if isinstance(b, float) and b < 1 else b for b in data["block"]]
    pruned = data[data["budget"].notna()].drop(columns="budget").rename(columns={"block": "budget"})
    palette = dict(
        zip(pruned["method"].unique(), sns.color_palette("colorblind", pruned["method"].nunique()))
    )
    paths = [out / "accuracy_budget.png", out / "accuracy_latency.png"]

    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    sns.lineplot(pruned, x="tokens", y="average", hue="method", palette=palette, marker="o", ax=axes)
    for _, row in pruned.iterrows():
        axes.plot(
            [row.tokens] * 2, [row.average_low, row.average_high], color=palette[row.method], lw=1, alpha=0.5
        )
    axes.axhline(100, color="0.4", ls="--", lw=1, label=f"vanilla ({visual_tokens} tokens)")
    axes.set(xlabel="budget (visual tokens)", ylabel="average of score / vanilla (%)")
    axes.set_xticks(sorted(pruned["tokens"].unique()))
    axes.margins(x=0.1)
    axes.legend(title=None, fontsize="small")
    _save(figure, paths[0])

    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    sns.scatterplot(
        pruned, x="prefill", y="average", hue="method", style="budget", palette=palette, s=60, ax=axes
    )
    vanilla = data[data["budget"].isna()].head(1)
    axes.scatter(vanilla["prefill"], vanilla["average"], marker="*", s=140, color="0.3", label="vanilla")
    axes.set(xlabel="measured prefill latency (ms, batch size 1)", ylabel="average of score / vanilla (%)")
    axes.legend(title=None, fontsize="small")
    _save(figure, paths[1])
    return paths


def _save(figure, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
