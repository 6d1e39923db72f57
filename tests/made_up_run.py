"""Run folders of made-up records, for tests of what reads them."""

from __future__ import annotations

import numpy as np

from harness.check import folder
from harness.store import records
from harness.tasks.bootstrap import Units, interval
from harness.tasks.suites import BENCHMARKS

DOCUMENTS = 240
LAYERS = 4


def cell(task, spec, budget, hits, name="pocket-x", **data):
    """A record of one document per cluster; hits: 0/1 per document."""
    pope = task == "pope"
    counts = [[h, 1 - h, 1 - h] if pope else [h, 1] for h in map(float, hits)]
    units = Units(tuple(map(str, range(len(hits)))), np.array(counts), ("0",) * len(hits))
    function = BENCHMARKS[task].scoring.statistic
    kept = 64 if budget is None else budget
    return {
        "schema_version": records.SCHEMA_VERSION,
        "written": "2026-01-01T00:00:00+00:00",
        "backbone": {"name": name, "layers": LAYERS, "weights": "w", "config": "c"},
        "device": {"kind": "cpu", "name": "a processor"},
        "dtype": "float32",
        "seed": 0,
        "kind": "cell",
        "status": "done",
        "task": task,
        "method": {"spec": spec, "name": spec, "budget": budget},
        "data": {"documents": len(hits), "documents_in_file": len(hits), "digest": "d", **data},
        "metrics": {
            "score": float(function(units.counts.sum(0, keepdims=True))[0]),
            "interval": list(interval(units, function, 0.95, 200, 0)),
            "interval_level": 0.95,
            "resamples": 200,
        },
        "visual_tokens": {
            "kept": kept, "mean_over_layers": kept, "text_tokens": 20.0,
            "rows": [[[kept] * LAYERS, len(hits)]],
        },
        "documents": {"row": list(range(len(hits))), "score": hits},
        "units": {"cluster": list(units.keys), "stratum": list(units.strata), "counts": counts},
    }  # fmt: skip


def hits(right, total=DOCUMENTS, flip=()):
    """`right` hits spread over `total` documents; those at the numbers `flip` are turned over."""
    answers = [int((i + 1) * right // total > i * right // total) for i in range(total)]
    assert sum(answers) == right
    return [1 - h if i in flip else h for i, h in enumerate(answers)]


def cost(spec, budget, own=1000, total=30.0, device="a processor"):
    return {
        "schema_version": records.SCHEMA_VERSION,
        "written": "2026-01-01T00:00:00+00:00",
        "backbone": {"name": "pocket-x", "layers": LAYERS, "weights": "w", "config": "c"},
        "device": {"kind": "cpu", "name": device},
        "dtype": "float32",
        "seed": 0,
        "kind": "efficiency",
        "status": "done",
        "task": "efficiency",
        "method": {"spec": spec, "name": spec, "budget": budget},
        "macs": {"tower": 10, "projector": 10, "selection": own},
        "latency_ms": {
            "total": {"p10": total - 1, "median": total, "p90": total + 1}, "vanilla_total_median": 30.0,
        },
    }  # fmt: skip


def save(root, *made):
    """Write the records as a run does: sealed, under their keys."""
    for record in made:
        place = f"cells/{record['task']}" if record["kind"] == "cell" else "efficiency"
        write(root / place, record)
    return root


def write(folder, record):
    """A sealed record in `folder`; its path. What stood in a record's file before is replaced by it."""
    method, rest = record["method"], {k: v for k, v in record.items() if k != "path"}
    identity = {"task": record["task"], "method": method}
    key = records.digest(identity)
    path = folder / f"{method['spec']}_{method['budget']}_{key}.json"
    records.write(path, records.sealed({**rest, "identity": identity, "key": key}))
    return path


def run_of(tmp_path, name, *made):
    """A run of these records, with vanilla on the same tasks (and measured) if they do not have it."""
    cells = [r for r in made if r["kind"] == "cell"]
    if not any(r["method"]["spec"] == "vanilla" for r in cells):
        like = {r["task"]: r for r in cells}
        made += tuple(vanilla_like(r) for r in like.values())
    if len(cells) < len(made) and any(r["kind"] == "efficiency" for r in made):
        made += (cost("vanilla", None, own=0),)
    return folder.read(save(tmp_path / name, *made))


def vanilla_like(record):
    name, answers = record["backbone"]["name"], record["documents"]["score"]
    made = cell(record["task"], "vanilla", None, [1] * len(answers), name)
    if record["status"] == "done":
        made["data"] = {**record["data"], "documents": len(answers)}
        made["documents"]["row"] = record["documents"]["row"]
    made["backbone"] = record["backbone"]
    return made


def of(found, spec):
    """The findings about a method."""
    return [f for f in found if spec in f.where]
