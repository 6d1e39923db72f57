"""`python -m harness adaptive`: what a method that chooses its own number of tokens spends them on (Fig. 4).

All of it is read from a run's records: the tokens kept for every question, beside what is known of its image
(Pocket-8's scenes say how many things are drawn) and whether it was answered as well as the unpruned model
does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from backbones import families
from harness.report import tables
from harness.store import records
from harness.store.bundle import Run, read
from methods.errors import UserError

#: K-buckets of Fig. 4, log-spaced
BUCKETS = 6
RESAMPLES = 1000


def run(folder: Path, method: str, data: Path | None, out: Path | None) -> int:
    """Write adaptive_<method>.json, .md and .png into `out` (default: the run's folder; of a bundle
    results/runs/BACKBONE-adaptive); print the table."""
    found = read(folder)
    if found.header is not None and out is None:  # the files of a bundle stay as they are
        out = Path("results", "runs", f"{Path(found.backbone).name}-adaptive")
    table = questions(found, method, data)
    blocks = {budget: describe(rows) for budget, rows in table.groupby("budget", sort=False)}
    target = (out or folder) / f"adaptive_{method.partition(':')[0]}"
    target.parent.mkdir(parents=True, exist_ok=True)
    body = [{"budget": _plain(budget), **block} for budget, block in blocks.items()]
    header = {"schema_version": records.SCHEMA_VERSION, "kind": "adaptive", "method": method}
    records.write(
        target.with_suffix(".json"), {**header, "git_commit": records.git_commit(), "budgets": body}
    )
    text = render(method, blocks)
    target.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    draw(table, blocks, target.with_suffix(".png"))
    print(text)
    if target.parent != folder:
        print(f"\nwritten to {target.parent}")
    return 0


def questions(run: Run, method: str, data: Path | None = None) -> pd.DataFrame:
    """One row per question: budget, task, kept (K), score and vanilla (0..1), things (nan if unknown).

    Raises UserError if the run has no such method, or was recorded before counts were kept for each question.
    """
    specs = sorted({spec for _, spec, budget in run.cells if budget is not None})
    if method not in specs:
        raise UserError(f"{run.folder} has no cells of {method}; it has: {', '.join(specs) or 'none'}")
    found = []
    for (task, spec, budget), record in run.cells.items():
        if spec != method or budget is None or record["status"] != "done":
            continue
        vanilla = run.cells.get((task, "vanilla", None))
        documents = record["documents"]
        if "kept" not in documents:
            raise UserError(f"{record['path']} says nothing of single questions; run it again with --fresh")
        if vanilla is None or vanilla["status"] != "done" or vanilla["documents"]["row"] != documents["row"]:
            raise UserError(f"{run.folder} has no vanilla cell on the same questions of {task}")
        columns = {
            "budget": budget,
            "task": task,
            "kept": documents["kept"],
            "score": documents["score"],
            "vanilla": vanilla["documents"]["score"],
            "things": _things(record, data),
        }
        found.append(pd.DataFrame(columns))
    return pd.concat(found, ignore_index=True).sort_values("budget", ascending=False, kind="stable")


def _things(record: Mapping, data: Path | None) -> Sequence[float]:
    """How many things each question's image shows; nan where that is not known."""
    rows = record["documents"]["row"]
    if record["data"]["suite"] != "pocket8":
        return [float("nan")] * len(rows)
    from harness.pocket import data
    from harness.pocket.data import build
    from harness.tasks.lmms import Documents
    from harness.tasks.sources import flat
    from harness.tasks.suites import BENCHMARKS

    root = data or data.ensure(varied=families.of_type(record["backbone"]["family"]).any_size)
    benchmark = BENCHMARKS[record["task"]]
    whole = Documents(benchmark, flat(benchmark, root, record["data"]["split"]))
    if whole.digest != record["data"]["digest"]:
        raise UserError(f"{root} holds other data than {record['path']} was measured on; name it with --data")
    names = whole.image_names
    return [len(build.scene_of(names[row]).things) for row in rows]


def describe(rows: pd.DataFrame) -> dict[str, object]:
    """Of one budget's questions: the spread of K, its rank correlation with complexity, accuracy by bucket.

    rho's interval: 95 %, percentile bootstrap over questions.
    """
    kept = rows["kept"].to_numpy(float)
    known = rows.dropna(subset="things")
    return {
        "questions": len(rows),
        "mean": float(kept.mean()),
        "std": float(kept.std()),
        "smallest": float(kept.min()),
        "largest": float(kept.max()),
        "p5": float(np.percentile(kept, 5)),
        "p95": float(np.percentile(kept, 95)),
        "rho_things": rho(known) if len(known) > 2 else None,
        "rho_things_interval": rho_interval(known) if len(known) > 2 else None,
        "by_things": _by_things(known),
        "by_kept": _by_kept(rows),
    }


def rho(rows: pd.DataFrame) -> float:
    """Spearman's rank correlation of K with the number of things; 0 if one of them never varies."""
    from scipy.stats import rankdata

    ranks = rankdata(rows[["kept", "things"]], axis=0)  # pandas takes ten times as long
    if (ranks == ranks[0]).all(0).any():
        return 0.0
    return float(np.corrcoef(ranks.T)[0, 1])


def rho_interval(rows: pd.DataFrame) -> list[float]:
    """Of `rho`: 95 %, percentile bootstrap over questions."""
    generator = np.random.default_rng(0)
    draws = [rho(rows.iloc[generator.integers(len(rows), size=len(rows))]) for _ in range(RESAMPLES)]
    return [float(x) for x in np.percentile(draws, [2.5, 97.5])]


def _by_things(rows: pd.DataFrame) -> list[dict[str, float]]:
    groups = rows.groupby("things")
    return [
        {"things": int(n), "questions": len(g), "kept": float(g["kept"].mean()), **_accuracy(g)}
        for n, g in groups
    ]


def _by_kept(rows: pd.DataFrame) -> list[dict[str, float]]:
    """The buckets of Fig. 4, log-spaced from the smallest to the largest K; empty ones are left out."""
    low, high = max(1, rows["kept"].min()), rows["kept"].max()
    edges = np.geomspace(low, high + 1, BUCKETS + 1)
    place = np.clip(np.digitize(rows["kept"], edges) - 1, 0, BUCKETS - 1)
    return [
        {
            "from": float(edges[i]),
            "to": float(edges[i + 1]),
            "questions": int((place == i).sum()),
            **_accuracy(rows[place == i]),
        }
        for i in range(BUCKETS)
        if (place == i).any()
    ]


def _accuracy(rows: pd.DataFrame) -> dict[str, float]:
    """Mean score of the method and of vanilla on the same questions, in %."""
    return {"score": 100 * float(rows["score"].mean()), "vanilla": 100 * float(rows["vanilla"].mean())}


def render(method: str, blocks: Mapping[float, Mapping]) -> str:
    """Markdown: the spread of K, then the two breakdowns of every budget."""
    spread = [
        {
            "budget": f"{budget:g}",
            "questions": b["questions"],
            "K: mean ± std": f"{b['mean']:.1f} ± {b['std']:.1f}",
            "5 % to 95 %": f"{b['p5']:.0f} to {b['p95']:.0f}",
            "least, most": f"{b['smallest']:.0f}, {b['largest']:.0f}",
            "rank correlation with things": "–"
            if b["rho_things"] is None
            else "{:.2f} [{:.2f}, {:.2f}]".format(b["rho_things"], *b["rho_things_interval"]),
        }
        for budget, b in blocks.items()
    ]
    parts = [
        f"# What {tables.escaped(tables.labels([method])[method])} spends its tokens on",
        "",
        tables.markdown(spread),
    ]
    for budget, b in blocks.items():
        parts += ["", f"## Budget {budget:g}: by tokens kept (log-spaced)", ""]
        parts.append(
            tables.markdown([{"K": f"{r['from']:.0f} to {r['to']:.0f}", **_cells(r)} for r in b["by_kept"]])
        )
        if b["by_things"]:
            parts += ["", f"## Budget {budget:g}: by things in the image", ""]
            parts.append(
                tables.markdown(
                    [
                        {"things": r["things"], "mean K": f"{r['kept']:.1f}", **_cells(r)}
                        for r in b["by_things"]
                    ]
                )
            )
    parts += ["", "score, vanilla: mean over the same questions of the pruned and of the unpruned model, %."]
    return "\n".join(parts)


def _cells(row: Mapping[str, float]) -> dict[str, str]:
    return {
        "questions": str(row["questions"]),
        "score": f"{row['score']:.1f}",
        "vanilla": f"{row['vanilla']:.1f}",
        "difference": f"{row['score'] - row['vanilla']:+.1f}",
    }


def draw(table: pd.DataFrame, blocks: Mapping[float, Mapping], path: Path) -> None:
    """Three panels: K against things, K's histogram, accuracy by K."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import seaborn as sns

    sns.set_theme(style="whitegrid", context="paper")
    colours = dict(zip(blocks, sns.color_palette("colorblind", len(blocks))))
    figure, (by_things, histogram, by_kept) = plt.subplots(1, 3, figsize=(11, 3.4))
    for budget, block in blocks.items():
        rows, colour, label = table[table["budget"] == budget], colours[budget], f"budget {budget:g}"
        known = rows.dropna(subset="things")
        if len(known):
            sns.lineplot(known, x="things", y="kept", errorbar="sd", color=colour, ax=by_things)
        bins = np.geomspace(1, table["kept"].max() + 1, 25)
        histogram.hist(rows["kept"], bins=bins, color=colour, alpha=0.6, label=label)
        middles = [np.sqrt(r["from"] * r["to"]) for r in block["by_kept"]]
        by_kept.plot(middles, [r["score"] for r in block["by_kept"]], marker="o", color=colour, label=label)
        by_kept.plot(middles, [r["vanilla"] for r in block["by_kept"]], ls="--", color=colour)
    by_things.set(xlabel="things in the image", ylabel="visual tokens kept (mean ± std)")
    histogram.set(xscale="log", xlabel="visual tokens kept", ylabel="questions")
    by_kept.set(
        xscale="log", xlabel="visual tokens kept", ylabel="score, %  (dashed: vanilla)", ylim=(0, 100)
    )
    histogram.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _plain(budget):
    """A budget as JSON has it (pandas gives its own numbers)."""
    return budget.item() if hasattr(budget, "item") else budget
