"""What a prefill takes at least on a GPU, by its datasheet: no measurement, an estimate to hold one against.

For each part (vision, selection, llm) the slowest of three: reading its weights once, its FLOPs at the peak
rate, launching its kernels from the host; the parts follow each other. With the LLM as a CUDA graph its
launches fall away. Activations, caches and the fact that nothing reaches its peak are left out, so a
measurement is expected above the estimate.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from backbones.shapes import Shape
from harness.costs import launches
from harness.costs.closed_form import closed_form_layer
from harness.costs.latency import PARTS
from harness.costs.shape_counter import Budget, PrefillMacs, ShapeCounter
from methods import registry
from methods.errors import UserError

FILE = Path(__file__).with_name("devices.yaml")
#: of a weight in bf16, what the peak rates are about
WEIGHT_BYTES = 2


@dataclass(frozen=True)
class Device:
    """name: for tables. match: part of the name that the driver reports. Rates in bytes and FLOPs per second,
    launch in seconds."""

    name: str
    match: str
    bandwidth: float
    flops: float
    launch: float
    source: str


@functools.cache
def devices() -> tuple[Device, ...]:
    """The known ones, in the file's order."""
    body = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    launch = body["launch_microseconds"] * 1e-6
    return tuple(
        Device(d["name"], d["match"], d["gb_per_second"] * 1e9, d["tflops"] * 1e12, launch, d["source"])
        for d in body["devices"]
    )


@dataclass(frozen=True)
class Work:
    """Of one prefill, by part. launches: None if they are not known."""

    weights: Mapping[str, float]
    flops: Mapping[str, float]
    launches: Mapping[str, int] | None

    def milliseconds(self, device: Device) -> dict[str, float | None]:
        """weights, flops, launches: each alone, over all parts. eager: the estimate; graph: with the LLM as a
        CUDA graph. None where launches are not known."""
        weights = {p: 1e3 * self.weights[p] / device.bandwidth for p in PARTS}
        flops = {p: 1e3 * self.flops[p] / device.flops for p in PARTS}
        found = {"weights": sum(weights.values()), "flops": sum(flops.values())}
        if self.launches is None:
            return {**found, "launches": None, "eager": None, "graph": None}
        launched = {p: 1e3 * n * device.launch for p, n in self.launches.items()}
        eager = self.parts(device)
        graph = {**eager, "llm": max(weights["llm"], flops["llm"])}
        return {
            **found,
            "launches": sum(launched.values()),
            "eager": sum(eager.values()),
            "graph": sum(graph.values()),
        }

    def parts(self, device: Device) -> dict[str, float] | None:
        """The estimate by part, ms, run eagerly; None where launches are not known."""
        if self.launches is None:
            return None
        return {
            p: 1e3
            * max(
                self.weights[p] / device.bandwidth,
                self.flops[p] / device.flops,
                self.launches[p] * device.launch,
            )
            for p in PARTS
        }


class Roofline:
    """Estimates for methods on one shape at one text length; FLOPs are those of `harness flops`."""

    def __init__(self, shape: Shape, text_tokens: int):
        self.shape = shape
        self._flops = ShapeCounter(shape, text_tokens)
        self._weights = _weight_bytes(shape)
        try:
            self._launches = launches.LaunchCounter(shape, text_tokens)
        except UserError:
            self._launches = None

    @functools.cache  # noqa: B019  one per run
    def count(self, spec: str, budget: Budget | None) -> PrefillMacs:
        """The method's plan and MAC, see `ShapeCounter.count`."""
        return self._flops.count(spec, budget)

    def shared(self, spec: str, budget: Budget | None) -> dict[str, float]:
        """FLOPs of one prefill that questions on one image share in a run, by part (docs/runs.md)."""
        pruner = registry.build(spec, None if spec == "vanilla" else budget)
        count, before = self.count(spec, budget), self._flops.before
        layers = len(count.plan.visual_tokens) if pruner.independent_of_text else 0
        if pruner.cuts_only:
            layers = pruner.stages(self._flops.visual_tokens, self.shape.layers)[0].layer
        text = self.shape.config.text_config
        llm = sum(closed_form_layer(text, n + before) for n in count.plan.visual_tokens[:layers])
        own = count.own if pruner.independent_of_text else 0
        return {"vision": 2 * (count.tower + count.projector), "selection": 2 * own, "llm": 2 * llm}

    def work(self, spec: str, budget: Budget | None, batch: int = 1) -> Work:
        """Raises what `ShapeCounter.count` does."""
        one = self._one(spec, budget)
        return replace(one, flops={part: batch * n for part, n in one.flops.items()})

    @functools.cache  # noqa: B019
    def _one(self, spec: str, budget: Budget | None) -> Work:
        count = self.count(spec, budget)
        macs = {"vision": count.tower + count.projector, "selection": count.own, "llm": count.llm}
        launched = None
        if self._launches is not None:
            launched = self._launches.count(registry.build(spec, None if spec == "vanilla" else budget))
        return Work(self._weights, {part: 2 * n for part, n in macs.items()}, launched)


def _weight_bytes(shape: Shape) -> dict[str, float]:
    """By part; of the word embeddings a prefill reads a few rows, of the head all."""
    model = shape.model()
    everything = sum(p.numel() for p in model.parameters())
    inner = model.model.language_model
    llm = sum(p.numel() for p in inner.parameters())
    head = model.lm_head.weight.numel()
    embeddings = inner.embed_tokens.weight.numel()
    tied = model.lm_head.weight is inner.embed_tokens.weight
    vision = everything - llm - (0 if tied else head)
    return {
        "vision": WEIGHT_BYTES * vision,
        "selection": 0,
        "llm": WEIGHT_BYTES * (llm - embeddings + head),
    }
