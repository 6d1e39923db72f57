"""Table 4: encoder direction and score aggregation, each trained and measured the same way at a reduced
number of steps, and our own switches beside them."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from methods.stepprune.training.train import TrainOptions, train

#: row -> what differs from the method. The first is the method; the next four are the paper's rows.
TABLE_4: dict[str, dict[str, object]] = {
    "stepprune": {},
    "encoder: causal": {"causal_encoder": True},
    "aggregation: last step": {"aggregation": "last"},
    "aggregation: uniform sum": {"aggregation": "uniform"},
    "aggregation: alive, gamma = 1": {"aggregation": "alive"},
}
#: rows that are ours
OURS: dict[str, dict[str, object]] = {
    "K-bar of the batch": {"k_from": "batch"},
    "no straight-through chain": {"chain": 0},
    "pointer: attention logits": {"pointer": "attention", "decoder_layers": 2},
}


def variants(base: TrainOptions, folder: Path, ours: bool) -> dict[str, TrainOptions]:
    """Options of each row; checkpoints stand in `folder`."""
    rows = TABLE_4 | (OURS if ours else {})
    slug = {
        name: name.replace(": ", "-").replace(", ", "-").replace(" ", "-").replace("=", "") for name in rows
    }
    return {
        name: replace(base, out=folder / f"{slug[name]}.safetensors", **changes)
        for name, changes in rows.items()
    }


def run(base: TrainOptions, folder: Path, ours: bool = False) -> dict[str, dict[str, object]]:
    """Train every variant that has no summary yet; write `<folder>/table4.json` and `.md`.

    A row's accuracy stands on held-out questions (Pocket-8's calibration split, answers right in every
    token, teacher-forced, over vanilla's): it orders variants. The leaderboard's own measure is
    `run_all.py --methods stepprune:checkpoint=FILE`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results = {}
    for name, options in variants(base, folder, ours).items():
        summary = options.out.with_suffix(".summary.json")
        if not summary.exists():
            print(f"-- {name}", flush=True)
            train(replace(options, resume=True))
        results[name] = json.loads(summary.read_text())
        (folder / "table4.json").write_text(
            json.dumps({"steps": base.steps, "rows": results}, indent=1) + "\n"
        )
        (folder / "table4.md").write_text(markdown(results, base.steps))
    print((folder / "table4.md").read_text())
    return results


def markdown(results: dict[str, dict], steps: int) -> str:
    """One row a variant."""
    lines = [
        f"Variants after {steps} steps, held-out questions; retention = right answers / vanilla's.",
        "",
        "| variant | mean K | LM loss, hard | right, hard | retention | LM loss, gated |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, r in results.items():
        hard, gated, vanilla = (r["pathways"][p] for p in ("hard", "gated", "vanilla"))
        retention = hard["right"] / vanilla["right"] if vanilla["right"] else float("nan")
        lines.append(
            f"| {name} | {r['mean_tokens']:.1f} ± {r['std_tokens']:.1f} | {hard['lm_loss']:.3f} | "
            f"{100 * hard['right']:.1f} % | {100 * retention:.1f} % | {gated['lm_loss']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def main(options: argparse.Namespace, base: TrainOptions) -> int:
    run(base, options.folder, options.ours)
    return 0
