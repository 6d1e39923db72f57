"""The questions that FLOPs and latency are measured on."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from backbones.shapes import Shape
from harness.costs.shape_counter import ShapeCounter
from methods.views import Hint

#: distinct images that FLOPs and latency are probed on
PROBES = 4


@dataclass(frozen=True)
class Probe:
    """A question for the efficiency measurements: its task, row, text, image identity, model inputs (B = 1)
    and answer key.
    """

    task: str
    row: int
    text: str
    image: str
    inputs: Callable[[], Mapping[str, object]]
    hint: Hint | None = None


def choose(probes: Sequence[Probe], number: int = PROBES) -> list[Probe]:
    """Those with the text lengths nearest to the median, one per image, in a fixed order."""
    ranked = sorted(probes, key=lambda p: (len(p.text), p.task, p.row))
    middle = len(ranked) // 2
    ranked = sorted(enumerate(ranked), key=lambda pair: (abs(pair[0] - middle), pair[0]))
    chosen: dict[str, Probe] = {}
    for _, probe in ranked:
        chosen.setdefault(probe.image, probe)
        if len(chosen) == number:
            break
    return list(chosen.values())


def shape_counter(backbone, probes: Sequence[Probe]) -> ShapeCounter:
    """Counts methods on the backbone by plan: at the size of a probe's image and the probes' mean length of
    text."""
    samples = [dict(p.inputs()) for p in choose(probes)]
    is_image = [s["input_ids"][0] == backbone.model.config.image_token_id for s in samples]
    text = round(statistics.fmean(int((~own).sum()) for own in is_image))
    grid = backbone.family.raster(backbone.model.config, samples[0])
    body = json.loads(json.dumps(backbone.model.config.to_dict(), default=str))
    shape = Shape(backbone.name, backbone.name, (), (0, 0), int(is_image[0].int().argmax()), body)
    return ShapeCounter(shape, text, shape.pixels_of(grid))
