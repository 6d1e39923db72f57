"""FLOPs and prefill latency of every (method, budget) of a run, and their records.

FLOPs of a method: vision tower and projector as they really ran, the LLM at the per-layer visual-token counts
measured while answering (mean over all documents of the run's cells), and the method's own work measured on
real prefills of the probe questions. Latency is measured on the same probe questions.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from backbones.shapes import Shape
from harness.costs import latency, macs
from harness.costs.shape_counter import ShapeCounter
from harness.run import identity
from harness.run.config import Method, RunConfig, build_pruner, digest
from harness.run.session import Session
from harness.store.records import package_versions
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
    """Those with the text lengths nearest to the median, one an image, in a fixed order."""
    ranked = sorted(probes, key=lambda p: (len(p.text), p.task, p.row))
    middle = len(ranked) // 2
    ranked = sorted(enumerate(ranked), key=lambda pair: (abs(pair[0] - middle), pair[0]))
    chosen: dict[str, Probe] = {}
    for _, probe in ranked:
        chosen.setdefault(probe.image, probe)
        if len(chosen) == number:
            break
    return list(chosen.values())


def shape_counter(session: Session) -> ShapeCounter:
    """Counts methods on the session's backbone by plan: at the size of a probe's image and the probes' mean
    length of text."""
    backbone = session.backbone
    samples = [dict(p.inputs()) for p in choose(session.probes())]
    is_image = [s["input_ids"][0] == backbone.model.config.image_token_id for s in samples]
    text = round(_mean([int((~own).sum()) for own in is_image]))
    grid = backbone.family.raster(backbone.model.config, samples[0])
    body = json.loads(json.dumps(backbone.model.config.to_dict(), default=str))
    shape = Shape(backbone.name, backbone.name, (), (0, 0), int(is_image[0].int().argmax()), body)
    return ShapeCounter(shape, text, shape.pixels_of(grid))


def identity_of(session: Session, method: Method) -> dict:
    """What a measurement depends on, the machine and its device included. The documents determine the
    probes. `config.digest` of it is the record's key."""
    body = {
        "backbone": dict(session.described),
        "method": {"name": method.name, "parameters": dict(method.parameters)},
        "budget": method.budget,
        "device": session.device_name,
        "dtype": session.config.dtype,
        "repeats": session.config.latency_repeats,
        "blind": session.config.blind,
        "documents": [[d.benchmark.name, d.digest, digest(d.numbers)] for d in session.documents],
        "packages": package_versions(),
        "code": {**identity.cost_code(str(session.described["family"])), **method.code},
    }
    return json.loads(json.dumps(body, default=str))  # as the record will have it


def record_path(out: Path, method: Method, key: str) -> Path:
    return out / "efficiency" / f"{method.slug}_{key}.json"


def measure(
    config: RunConfig,
    backbone,
    methods: Sequence[Method],
    probes: Sequence[Probe],
    progress: Callable[[], None],
) -> list[dict]:
    """Each method's own MAC, then the latency of all methods in turn; one dict a method, in order.

    methods[0] must be vanilla: each result carries vanilla's total of the same session, which speed-ups refer
    to. A method that cannot do a prefill gets {"error": traceback} and is left out of the timing.
    """
    samples = [p.inputs() for p in probes]
    counter = macs.ModelCounter(backbone.model)
    results: list[dict] = []
    runnable = []
    for method in methods:
        pruner = build_pruner(method)
        if pruner.answer_key:  # one question's for all probes: what it costs does not depend on it
            pruner.hints = [probes[0].hint]
        try:
            counts = [macs.count_prefill(counter, backbone, pruner, s) for s in samples]
        except Exception:
            results.append({"error": traceback.format_exc(limit=-4)})
            continue
        results.append({"macs": _macs(counts), "probes": [{"task": p.task, "row": p.row} for p in probes]})
        runnable.append((pruner, results[-1]))
    timed = latency.compare(backbone, [p for p, _ in runnable], samples, config.latency_repeats, progress)
    reference = timed[0].summary()["total"]["median"] if "error" not in results[0] else None
    for (_, result), times in zip(runnable, timed):
        result["latency_ms"] = {**times.summary(), "batch_size": 1, "vanilla_total_median": reference}
    return results


def _macs(counts: Sequence[macs.PrefillCount]) -> dict:
    return {
        "tower": _mean([c.tower for c in counts]),
        "projector": _mean([c.projector for c in counts]),
        "selection": _mean([c.selection for c in counts]),
        "probe_llm": _mean([c.llm for c in counts]),
        "probe_text_tokens": [c.text_tokens for c in counts],
        "probe_visual_tokens": [list(c.visual_tokens) for c in counts],
    }


def total_macs(counter: macs.ModelCounter, measured: Mapping, rows: Sequence, text_tokens: int) -> float:
    """MAC of the method's prefill: measured parts plus the LLM at the run's per-layer counts."""
    parts = measured["macs"]
    return (
        parts["tower"] + parts["projector"] + parts["selection"] + macs.mean_llm(counter, rows, text_tokens)
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
