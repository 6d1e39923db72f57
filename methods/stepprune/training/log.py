"""What is written down of a training run: CSV rows, K histograms, a plot."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import torch
from torch import nn

BINS = 16
#: gradient norms are logged for the parts whose parameters begin with these names
PARTS = {
    "encoder": "policy.encoder.blocks",
    "text": "policy.encoder.text",
    "decoder": "policy.decoder",
    "pointer": "policy.pointer",
    "head": "policy.head",
    "stop": "policy.stop",
    "start": "policy.start",
    "denoiser": "denoiser",
}


def gradient_norms(module: nn.Module) -> dict[str, float]:
    """Norm of the gradient of each part that there is, before clipping; nan if none reached it."""
    squares: dict[str, list[torch.Tensor]] = {}
    for part, prefix in PARTS.items():
        for name, parameter in module.named_parameters():
            if name.startswith(prefix):
                own = squares.setdefault(part, [])
                if parameter.grad is not None:
                    own.append(parameter.grad.square().sum())
    return {
        f"grad_{part}": float(torch.stack(found).sum().sqrt()) if found else float("nan")
        for part, found in squares.items()
    }


def edges(max_steps: int) -> list[int]:
    """Log-spaced edges of the K histogram's bins, 1 to max_steps."""
    return sorted({round(e) for e in np.geomspace(1, max_steps + 1, BINS + 1)})


class Log:
    """Means over `every` steps, appended to <path> as CSV; K histograms of the same steps to <path>'s
    neighbour. On resume rows after `step` are dropped, so that a step stands there once."""

    def __init__(self, path: Path, every: int, max_steps: int, step: int):
        self.path, self.every, self.edges = path, every, edges(max_steps)
        self.histogram = path.with_name(path.stem + "_k.csv")
        self._rows: list[dict[str, float]] = []
        self._counts: list[int] = []
        for file in (self.path, self.histogram):
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.exists():
                lines = file.read_text().splitlines()
                kept = [line for line in lines[1:] if int(line.partition(",")[0]) <= step]
                if kept:
                    file.write_text("\n".join([lines[0], *kept]) + "\n")
                else:
                    file.unlink()

    def add(self, step: int, row: dict[str, float], counts: list[int]) -> None:
        """Values of step `step` (from 1), and K of its samples."""
        self._rows.append(row)
        self._counts += counts
        if step % self.every == 0:
            self.flush(step)

    def flush(self, step: int) -> None:
        if not self._rows:
            return
        names = self._rows[0]
        means = {n: float(np.mean([r[n] for r in self._rows])) for n in names}
        _append(self.path, {"step": step} | {n: f"{v:.6g}" for n, v in means.items()})
        bins = np.histogram(self._counts, [*self.edges])[0]
        _append(self.histogram, {"step": step} | {f"from_{e}": int(b) for e, b in zip(self.edges, bins)})
        self._rows, self._counts = [], []


def _append(path: Path, row: dict[str, object]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


def plot(path: Path) -> Path:
    """Learning curves of a log as PNG beside it: loss, K, gradient norms, sharpness of the pointer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import pandas as pd

    table = pd.read_csv(path)
    panels = {
        "loss": ["loss", "lm_loss", "right", "recall"],
        "visual tokens": ["count", "expected", "count_std"],
        "gradient norm": [c for c in table if c.startswith("grad_")],
        "polarisation": ["pointer_max", "gate_undecided"],
    }
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), sharex=True)
    for axis, (title, names) in zip(axes.flat, panels.items()):
        for name in names:
            axis.plot(table["step"], table[name], label=name.removeprefix("grad_"))
        axis.set_title(title)
        axis.legend(fontsize="small")
        if title == "gradient norm":
            axis.set_yscale("log")
    for axis in axes[1]:
        axis.set_xlabel("step")
    figure.tight_layout()
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=110)
    plt.close(figure)
    return target
