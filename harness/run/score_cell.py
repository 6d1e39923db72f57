"""Score a cell's answers with lmms-eval's own code and make its record."""

from __future__ import annotations

import argparse
import tempfile
import traceback
from collections import Counter
from collections.abc import Sequence

from harness.run.session import Session
from harness.run.sweep import SweepEntry
from harness.store import records
from harness.store.journal import Answer
from harness.tasks import comparability, evidence
from harness.tasks.bootstrap import interval
from harness.tasks.environment import silenced
from harness.tasks.lmms import Documents
from harness.tasks.scoring import Score
from methods.errors import UserError

LEVEL, RESAMPLES = 0.95, 2000


def evaluate(task, model, documents: Documents) -> tuple[Score, dict[str, float]]:
    """Run lmms-eval over one task with `model` (a PrunedModel) -> our score, and lmms-eval's own metrics."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as scratch, silenced():
        results = simple_evaluate(
            model=model,
            tasks=[task],
            task_manager=TaskManager(include_defaults=False),
            bootstrap_iters=0,
            process_docs_parallel=1,
            log_samples=True,
            # without these images are decoded again for scoring, and MMBench writes into the working
            # directory
            cli_args=argparse.Namespace(output_path=scratch, process_with_media=False),
        )
    name = documents.benchmark.name
    samples = sorted(results["samples"][name], key=lambda s: s["doc_id"])
    if len(samples) != len(documents):
        raise ArithmeticError(f"{name}: {len(documents)} documents, but lmms-eval scored {len(samples)}")
    metrics = {
        k.removesuffix(",none"): v
        for k, v in results["results"][name].items()
        if k.endswith(",none") and "stderr" not in k
    }
    ours = documents.benchmark.scoring.score(samples, documents.groups, documents.image_ids, metrics)
    return ours, {k: float(v) for k, v in metrics.items() if isinstance(v, (int, float))}


def token_statistics(answers: Sequence[Answer]) -> dict:
    """Visual tokens that entered each LLM layer, as measured, averaged over the documents.

    `rows` are the distinct per-layer counts with how many documents had each (exact FLOPs need them, since
    attention is quadratic). `kept` is what enters the last layer, `mean_over_layers` the other convention.
    """
    rows = Counter(a.visual_tokens for a in answers)
    n = len(answers)
    layers = len(answers[0].visual_tokens)
    per_layer = [sum(r[i] * c for r, c in rows.items()) / n for i in range(layers)]
    return {
        "per_layer": per_layer,
        "kept": per_layer[-1],
        "mean_over_layers": sum(per_layer) / layers,
        "image_places": sum(a.image_tokens for a in answers) / n,
        "text_tokens": sum(a.input_tokens - a.image_tokens for a in answers) / n,
        "output_tokens": sum(a.output_tokens for a in answers) / n,
        "rows": [[list(r), c] for r, c in sorted(rows.items())],
    }


def failure_record(session: Session, entry: SweepEntry) -> dict:
    """The record of a cell that raised: its error in place of its metrics. It is run again next time."""
    cell = entry.cell
    return {
        **session.header(),
        "kind": "cell",
        "status": "failed",
        "key": cell.key,
        "task": cell.benchmark.name,
        "method": _method(cell),
        "error": entry.report.error,
        "identity": dict(cell.identity),
    }


def close(session: Session, entry: SweepEntry, task, documents: Documents, processes: int = 1) -> dict:
    """Score one answered cell and write its record; a failure in the scoring is the cell's failure.

    processes: how many answered it.
    """
    if entry.report.error is None:
        try:
            record = records.sealed(cell_record(session, entry, task, documents, processes))
        except UserError:
            raise
        except Exception:
            entry.report.error = traceback.format_exc(limit=-4)
    if entry.report.error is not None:
        record = records.sealed(failure_record(session, entry))
    records.write(entry.cell.record_path(session.config.out), record)
    return record


def cell_record(session: Session, entry: SweepEntry, task, documents: Documents, processes: int = 1) -> dict:
    """Score the cell (all of its answers are in the journal) and describe it completely."""
    report = entry.report
    config, cell, model = session.config, entry.cell, entry.model
    result, official = evaluate(task, model, documents)
    low, high = interval(result.units, cell.benchmark.scoring.statistic, LEVEL, RESAMPLES, config.seed)
    found = [model.journal.answers[q.row, q.prompt] for q in map(model.question, task.instances)]
    benchmark, generation = cell.benchmark, dict(model.question(task.instances[0]).generation)
    apart = comparability.reasons(
        benchmark, config.suite, session.described, len(documents), documents.total, config.blind
    )
    return {
        **session.header(),
        "kind": "cell",
        "status": "done",
        "key": cell.key,
        "task": benchmark.name,
        "method": _method(cell),
        "data": {
            "suite": config.suite.name,
            "split": documents.source.split,
            **({"source": dict(documents.source.origin)} if documents.source.origin else {}),
            "digest": documents.digest,
            "documents": len(documents),
            "documents_in_file": documents.total,
            "unaskable": [[one.row, one.image, one.why] for one in documents.unaskable],
            "limit": config.limit_of(benchmark),
            "blind": config.blind,
            "upstream_yaml": benchmark.yaml,
            "overrides": dict(benchmark.overrides),
            "comparable_to_paper": not apart,
            "comparability": "; ".join(apart) or benchmark.why,
        },
        "prompt": {"generation": generation, "padding_side": "left"},
        "metrics": {
            "score": result.value,
            "unit": benchmark.unit,
            "interval": [low, high],
            "interval_level": LEVEL,
            "resamples": RESAMPLES,
            "clusters": len(result.units.keys),
            **result.extra,
            "lmms_eval": official,
        },
        "answers_at_cap": sum(a.output_tokens >= generation["max_new_tokens"] for a in found),
        "visual_tokens": token_statistics(found),
        "run": {
            "seconds": report.seconds,
            "answers_computed": report.computed,
            "answers_from_journal": len(found) - report.computed,
            "batch_size": config.batch_size,
            "batch_size_reduced_to": report.reduced,
            "processes": processes,
        },
        "documents": {
            "row": documents.numbers,
            "score": result.documents,
            "kept": [a.visual_tokens[-1] for a in found],
            **evidence.columns(model.pruner, documents.rows, documents.hints, found, documents.sizes),
        },
        "units": {
            "cluster": list(result.units.keys),
            "stratum": [str(s) for s in result.units.strata],
            "counts": result.units.counts.tolist(),
        },
        "identity": dict(cell.identity),
    }


def _method(cell) -> dict:
    m = cell.method
    return {
        "spec": m.spec,
        "name": m.name,
        "budget": m.budget,
        "parameters": dict(m.parameters),
        "code": records.digest(dict(m.code)),
    }
