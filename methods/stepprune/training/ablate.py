"""Variants of the method, each trained and measured in the same way at a reduced number of steps and at the
same mean K: those that the method names (`methods.learned.Learned.ABLATIONS`)."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from methods import learned
from methods.stepprune.training.data import Supplies
from methods.stepprune.training.options import AblationOptions, TrainOptions
from methods.stepprune.training.train import train

#: row -> seed -> the training's summary
Results = dict[str, dict[int, dict]]


def variants(base: TrainOptions, folder: Path, groups: Sequence[str]) -> dict[str, TrainOptions]:
    """Options of the method and of each row of the groups; checkpoints stand in `folder`."""
    rows: dict[str, Mapping[str, object]] = {base.method: {}}
    for group in groups:
        rows |= learned.find(base.method).ABLATIONS.get(group, {})
    return {
        name: replace(base, out=folder / f"{re.sub('[^A-Za-z0-9.]+', '-', name)}.safetensors", **changes)
        for name, changes in rows.items()
    }


def run(
    base: TrainOptions,
    folder: Path,
    supplies: Supplies,
    groups: Sequence[str] = ("paper",),
    seeds: Sequence[int] = (0,),
) -> Results:
    """Train every variant with every seed where there is no summary yet; write `<folder>/ablations.json` and
    `.md`. Checkpoints and logs stand in `<folder>/seed<N>`.

    A row's accuracy stands on held-out questions (Pocket-8's calibration split, answers right in every
    token, teacher-forced, over vanilla's), the stop bias calibrated to the target on the same ones: it
    orders variants. The leaderboard's own measure is `run_all.py --methods METHOD:checkpoint=FILE`.
    """
    results: Results = {}
    for seed in seeds:
        for name, options in variants(replace(base, seed=seed), folder / f"seed{seed}", groups).items():
            summary = options.out.with_suffix(".summary.json")
            if not summary.exists():
                print(f"-- {name}, seed {seed}", flush=True)
                train(replace(options, resume=True, cost=False), supplies)
            results.setdefault(name, {})[seed] = json.loads(summary.read_text())
            (folder / "ablations.json").write_text(
                json.dumps({"steps": base.steps, "rows": results}, indent=1) + "\n"
            )
            (folder / "ablations.md").write_text(markdown(results, base.steps))
    print((folder / "ablations.md").read_text())
    return results


def markdown(results: Results, steps: int) -> str:
    """One row per variant, means over its seeds."""
    lines = [
        f"Variants after {steps} steps, held-out questions; retention = right answers / vanilla's. Means "
        "over seeds; behind K the deviation over questions, in brackets the least and the most of a seed.",
        "",
        "| variant | seeds | mean K | LM loss, hard | right, hard, % | retention, % | LM loss, gated |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, by_seed in results.items():
        runs = list(by_seed.values())

        def mean(value: Callable[[dict], float], runs=runs) -> float:
            return statistics.mean(map(value, runs))

        def retention(run: dict) -> float:
            hard, vanilla = (run["pathways"][p]["right"] for p in ("hard", "vanilla"))
            return 100 * hard / vanilla if vanilla else float("nan")

        right = [100 * run["pathways"]["hard"]["right"] for run in runs]
        spread = f" ({min(right):.1f} to {max(right):.1f})" if len(runs) > 1 else ""
        tokens, deviation = mean(lambda r: r["mean_tokens"]), mean(lambda r: r["std_tokens"])
        losses = [mean(lambda r, p=p: r["pathways"][p]["lm_loss"]) for p in ("hard", "gated")]
        lines.append(
            f"| {name} | {len(runs)} | {tokens:.1f} ± {deviation:.1f} | {losses[0]:.3f} | "
            f"{statistics.mean(right):.1f}{spread} | {mean(retention):.1f} | {losses[1]:.3f} |"
        )
    return "\n".join(lines) + "\n"


def main(options: AblationOptions, base: TrainOptions, supplies: Supplies) -> int:
    run(base, options.folder, supplies, options.rows, range(base.seed, base.seed + options.seeds))
    return 0
