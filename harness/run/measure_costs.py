"""FLOPs and prefill latency of every (method, budget) of a run, and their records.

FLOPs of a method: vision tower and projector as they really ran, the LLM at the per-layer visual-token counts
measured while answering (mean over all documents of the run's cells), and the method's own work measured on
real prefills of the probe questions. Latency is measured on the same probe questions.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from harness.costs import latency, macs
from harness.run import identity
from harness.run.config import Method, RunConfig, build_pruner, digest
from harness.run.probes import Probe
from harness.run.session import Session
from harness.store.records import package_versions


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
    """Each method's own MAC, then the latency of all methods in turn; one dict per method, in order.

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
