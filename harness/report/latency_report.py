"""`python -m harness latency`: one session of measurements, its record and its table."""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from backbones import shapes
from harness.costs import cuda_graphs, energy, fitted, latency, random_weights
from harness.costs.roofline import Roofline, devices
from harness.costs.shape_counter import TEXT_TOKENS
from harness.report import latency_table
from harness.run import preflight
from harness.run.config import Budget, Method, RunConfig, method_at
from harness.run.probes import choose
from harness.run.runner import check_writable
from harness.run.session import Session
from harness.store import records
from methods.errors import UserError

LOG = logging.getLogger(__name__)
FOLDER = Path("results", "runs", "latency")
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Request:
    """The options of the command, checked one by one. weights: the backbone is a `checkpoint`, a shape with
    `random` weights, or a shape of which `none` are made (estimates only)."""

    backbone: str
    budgets: tuple[Budget, ...]
    methods: tuple[str, ...]
    weights: Literal["checkpoint", "random", "none"]
    batch_sizes: tuple[int, ...]
    repeats: int
    decode_tokens: int
    device: str
    dtype: str
    text_tokens: int | None = None
    data: Path | None = None
    seed: int = 0
    profile: bool = False
    out: Path | None = None

    @property
    def config(self) -> RunConfig:
        """For the session."""
        from harness.tasks.suites import POCKET8, parse_tasks

        return RunConfig(
            budgets=self.budgets, benchmarks=tuple(parse_tasks("all")), methods=self.methods, out=FOLDER,
            backbone=self.backbone, data=self.data, limit=POCKET8.default_limit, device=self.device,
            dtype=self.dtype, seed=self.seed,
        )  # fmt: skip


def run(request: Request) -> int:
    """Measure, write record and table, print the table. Returns 1 if a method failed or was left out."""
    if request.text_tokens is not None and request.weights == "checkpoint":
        raise UserError("--text-tokens: a checkpoint is asked real questions; use it with --random-weights")
    preflight.check_methods(request.methods, request.budgets)
    if request.weights == "checkpoint":
        preflight.check(_known_checkpoint(request).config)
    path = request.out or FOLDER / f"{_default_name(request)}.json"
    preflight.check_place(path.parent)
    check_writable(path.parent)
    record = _estimate_only(request) if request.weights == "none" else _measured(request)
    table = latency_table.render(record)
    records.write(path, record)
    path.with_suffix(".md").write_text(table + "\n", encoding="utf-8")
    print("\n" + table)
    LOG.info(f"\nWritten to {path} and {path.with_suffix('.md')}")
    failed = [r for r in record["results"] if r["status"] == "failed"]
    for result in failed:
        method = result["method"]
        LOG.error(f"FAILED {method['spec']} / {method['budget']}: {result['error'].strip().splitlines()[-1]}")
    return 1 if failed or record["left_out"] else 0


def _default_name(request: Request) -> str:
    name = request.backbone
    if request.weights != "checkpoint":
        name = shapes.load(name).name
    device = NOT_MEASURED
    if request.weights != "none":
        kind = request.device.partition(":")[0]
        device = kind if kind == "cpu" else torch.cuda.get_device_name(request.device)
    return re.sub(r"[^a-z0-9._]+", "-", f"{Path(name).name}-{device}".lower())


class _RandomSession(Session):
    """A session on a shape with random weights."""

    def __init__(self, config: RunConfig, shape: shapes.Shape):
        self.shape = shape
        super().__init__(config)

    def _load(self):
        return random_weights.build(self.shape, self.config.device, self.config.dtype)

    def pruner(self, method: Method):
        pruner = super().pruner(method)
        self.backbone.give_weights(pruner)
        return pruner


def _measured(request: Request) -> dict:
    if request.weights == "random":
        session = _RandomSession(request.config, shapes.load(request.backbone))
        samples = [session.backbone.synthetic(request.text_tokens or TEXT_TOKENS)]
        shape, source = session.shape, "noise for an image, random words"
    else:
        session = Session(_known_checkpoint(request).config)
        probes = choose(session.probes())
        samples = [p.inputs() for p in probes]
        shape = _shape_of(session, samples[0])
        source = f"{session.config.suite.title}: " + ", ".join(f"{p.task} {p.row}" for p in probes)
    for line in session.left_out:
        LOG.warning(f"LEFT OUT {line}")
    for line in session.unavailable:
        LOG.warning(f"not available here: {line}")
    text_tokens = _text_tokens(session.backbone, samples)
    estimates = Roofline(shape, round(text_tokens)) if shape else None
    results = []
    for batch in request.batch_sizes:
        results += _batch(request, session, samples, batch, estimates)
    gpu = energy.find(request.device)
    header = session.header()
    header["device"] |= {"cuda": torch.version.cuda, **(gpu.facts() if gpu else {})}
    return {
        **header,
        "kind": "latency",
        "status": "done",
        "settings": {
            "batch_sizes": list(request.batch_sizes),
            "repeats": request.repeats,
            "warm_up": latency.WARM_UP[session.backbone.model.device.type],
            "decode_tokens": request.decode_tokens,
            "text_tokens": text_tokens,
            "inputs": source,
            "budgets": list(request.budgets),
        },
        "weights_bytes": sum(p.nbytes for p in session.backbone.model.parameters()),
        "held": _held(estimates),
        "left_out": session.left_out,
        "unavailable": session.unavailable,
        "results": results,
    }


def _known_checkpoint(request: Request) -> Request:
    """UserError that names the option, for a shape where a checkpoint is wanted."""
    if request.backbone.lower() in shapes.available() or request.backbone.endswith(".json"):
        raise UserError(
            f"--backbone {request.backbone} is a shape without weights: add --random-weights to measure it "
            "on a GPU, or --estimate"
        )
    return request


def _shape_of(session: Session, inputs: Mapping[str, Tensor]) -> shapes.Shape | None:
    """The checkpoint's shape, with the text ahead of the image as in `inputs`; None if image sizes vary."""
    backbone = session.backbone
    before = int((inputs["input_ids"][0] == backbone.model.config.image_token_id).int().argmax())
    try:
        return shapes.of_config(backbone.model.config, backbone.name, before)
    except UserError:
        return None


def _text_tokens(backbone, samples: Sequence[Mapping[str, Tensor]]) -> float:
    """Mean over the samples."""
    image = backbone.model.config.image_token_id
    return sum(int((s["input_ids"] != image).sum()) for s in samples) / len(samples)


def _batch(request: Request, session: Session, samples: Sequence[dict], batch: int, estimates) -> list[dict]:
    """One result a method, measured in turn at one batch size: copies of each sample."""
    from tqdm import tqdm

    backbone = session.backbone
    copies = [{k: v.repeat(batch, *[1] * (v.ndim - 1)) for k, v in s.items()} for s in samples]
    results, runnable = [], []
    for method in session.methods:
        result = _result(method.spec, method.name, method.budget, batch, estimates)
        results.append(result)
        pruner = session.pruner(method)
        try:
            latency.measure_once(backbone, pruner, copies[0], request.decode_tokens)
        except Exception:
            result |= {"status": "failed", "error": traceback.format_exc(limit=-4)}
            continue
        runnable.append((pruner, result))
    pruners = [pruner for pruner, _ in runnable]
    with tqdm(
        total=request.repeats * len(pruners), desc=f"batch size {batch}", unit="prefill", disable=None
    ) as bar:
        timed = latency.compare(backbone, pruners, copies, request.repeats, bar.update, request.decode_tokens)
    recorded = cuda_graphs.compare(backbone, pruners, copies[0], request.repeats)
    for (pruner, result), times, graph in zip(runnable, timed, recorded):
        result |= {"status": "done", "latency_ms": times.summary(), "graph_ms": graph.summary()}
        if request.profile:
            print(f"\n## {result['method']['spec']} at batch size {batch}\n")
            print(_profile(backbone, pruner, copies[0]))
    return results


def _result(spec: str, name: str, budget: Budget | None, batch: int, estimates: Roofline | None) -> dict:
    """A result that was not measured, with its estimate (None if there is no plan without weights)."""
    estimate = None
    if estimates is not None:
        try:
            work = estimates.work(spec, budget, batch)
        except Exception:  # a method that cannot plan without weights must not end the report
            work = None
        if work is not None:
            estimate = {
                "tflops": sum(work.flops.values()) / 1e12,
                "weight_bytes": sum(work.weights.values()),
                "launches": None if work.launches is None else sum(work.launches.values()),
                "devices_ms": {d.name: work.milliseconds(d) for d in devices()},
            }
            if (held := fitted.fit(estimates)) and batch == 1:
                estimate["corrected_ms"] = {held.device: held.corrected(work)}
    return {
        "method": {"spec": spec, "name": name, "budget": budget},
        "batch_size": batch,
        "status": NOT_MEASURED,
        "estimate": estimate,
    }


def _held(estimates: Roofline | None) -> dict | None:
    """The estimates against published measurements (`harness.costs.fitted.Fit`); None for other shapes."""
    held = fitted.fit(estimates) if estimates is not None else None
    return None if held is None else asdict(held)


def _profile(backbone, pruner, inputs: Mapping[str, Tensor]) -> str:
    from torch.profiler import ProfilerActivity, profile

    cuda = backbone.model.device.type == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=kinds) as seen:
        latency.measure_once(backbone, pruner, inputs)
    order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    return seen.key_averages().table(sort_by=order, row_limit=15)


def _estimate_only(request: Request) -> dict:
    """The record with every row not measured."""
    from methods import registry

    shape = shapes.load(request.backbone)
    text_tokens = request.text_tokens or TEXT_TOKENS
    estimates = Roofline(shape, text_tokens)
    named = list(request.methods) != ["all"]
    specs = ["vanilla", *(s for s in (request.methods if named else registry.available()) if s != "vanilla")]
    methods, left_out = [], []
    for budget in request.budgets:
        registry.build("vanilla", budget).check_budget(shape.visual_tokens)
        for spec in specs:
            method = method_at(spec, budget, request.seed)
            try:
                estimates.count(method.spec, method.budget)
            except UserError as error:
                left_out.append(f"{method.spec} at {budget}: {error}")
            else:
                methods += [method] if method not in methods else []
    return {
        "schema_version": records.SCHEMA_VERSION,
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "git_commit": records.git_commit(),
        "packages": records.package_versions(),
        "backbone": {"name": shape.name, "family": shape.family.model_type, "weights": "none"},
        "device": None,
        "dtype": None,
        "seed": request.seed,
        "kind": "latency",
        "status": NOT_MEASURED,
        "settings": {
            "batch_sizes": list(request.batch_sizes),
            "text_tokens": text_tokens,
            "budgets": list(request.budgets),
        },
        "held": _held(estimates),
        "left_out": left_out,
        "unavailable": [],
        "results": [
            _result(m.spec, m.name, m.budget, batch, estimates)
            for batch in request.batch_sizes
            for m in methods
        ],
    }
