"""Datasheet estimates held against published measurements: one efficiency factor per part, tower and prefill,
fitted on some rows and tested on the others. What comes of it is an estimate still, of one card.

The factor is the estimate over the measurement, geometric mean of the fitted rows: the share of the
datasheet's speed that the card reached. Behind the tower's may stand the precision that the authors ran it
in, which they do not tell.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from harness.costs import roofline

FILE = Path(__file__).with_name("measured.yaml")
#: parts with a factor; a method's own work differs from method to method, and has none
PARTS = ("vision", "llm")


@dataclass(frozen=True)
class Held:
    """One published row.

    Attributes:
        name: the method, as published.
        fitted: whether the factors come of it.
        measured, estimated, corrected: ms by part; corrected: the estimate over its factor.
    """

    name: str
    fitted: bool
    measured: Mapping[str, float]
    estimated: Mapping[str, float]
    corrected: Mapping[str, float]

    def off(self, part: str) -> float:
        """How far the corrected estimate is from the measurement, as a share of it."""
        return self.corrected[part] / self.measured[part] - 1


@dataclass(frozen=True)
class Fit:
    """What a card reaches of its datasheet.

    Attributes:
        device: of devices.yaml.
        source: of the published rows.
        factors: by part.
        rows: all published ones.
    """

    device: str
    source: str
    factors: Mapping[str, float]
    rows: tuple[Held, ...]

    def corrected(self, work: roofline.Work) -> float | None:
        """ms of a prefill, tower and language model corrected; None where launches are not known."""
        parts = work.parts(_device(self.device))
        if parts is None:
            return None
        return sum(ms / self.factors.get(part, 1.0) for part, ms in parts.items())


@functools.cache
def published() -> dict:
    """The file's content."""
    return yaml.safe_load(FILE.read_text(encoding="utf-8"))


def _device(name: str) -> roofline.Device:
    return next(d for d in roofline.devices() if d.name == name)


def fit(estimates: roofline.Roofline, budget: int = 64) -> Fit | None:
    """The factors by the published rows; None unless `estimates` are of their shape and launches known."""
    body = published()
    if estimates.shape.name != body["shape"]:
        return None
    device = _device(body["device"])
    estimated = []
    for row in body["rows"]:
        plan = row["plan"]
        parts = estimates.work(plan, None if plan == "vanilla" else budget).parts(device)
        if parts is None:
            return None
        estimated.append(parts)
    pairs = list(zip(body["rows"], estimated))
    factors = {}
    for part in PARTS:
        logs = [math.log(ours[part] / row[part]) for row, ours in pairs if row["fitted"]]
        factors[part] = math.exp(sum(logs) / len(logs))
    rows = [
        Held(
            row["name"],
            row["fitted"],
            {part: row[part] for part in PARTS},
            {part: ours[part] for part in PARTS},
            {part: ours[part] / factors[part] for part in PARTS},
        )
        for row, ours in pairs
    ]
    return Fit(device.name, body["source"], factors, tuple(rows))
