"""How long the requested run takes at least, by datasheets (`harness.costs.roofline`): no measurement."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from harness.costs.shape_counter import TEXT_TOKENS
from harness.doctor.data import Table
from harness.doctor.findings import NOTE, Diagnosis
from harness.tasks.benchmark import Benchmark
from methods.errors import UserError

#: an answer is a word or a letter
ANSWER_TOKENS = 4
#: where nothing caps it
LONGEST = 1024
#: what a run takes of the estimate: nothing reaches its peak, and images are decoded on the host
SLACK = (2, 5)


def check(
    config,
    tables: Sequence[Table],
    checkpoint: Path | None,
    price: float | None,
    seconds: Sequence[float] = (),
) -> Iterator[Diagnosis]:
    """Hours of one GPU, by kind. config: RunConfig. checkpoint: its folder, if it is here. price: of an hour
    of GPU time, in any currency. seconds: that an answer took here, if it was tried."""
    from backbones import shapes
    from harness.costs import roofline

    shape = shapes.named_like(config.backbone)
    try:
        if shape is None and checkpoint is not None:
            shape = shapes.from_config_file(checkpoint / "config.json")
    except UserError:
        shape = None
    here = {t.benchmark.name: t.documents for t in tables}
    published = {} if config.suite.synthetic else {b.name: b.documents for b in config.benchmarks}
    known = published | here
    counts = {b.name: _scored(config, b, known[b.name]) for b in config.benchmarks if b.name in known}
    methods = _methods(config)
    answers = sum(counts.values()) * len(methods)
    what = f"{sum(counts.values())} documents x {len(methods)} methods and budgets = {answers} answers"
    if assumed := [name for name in counts if name not in here]:
        what += f" (number of documents as published, no data here: {', '.join(assumed)})"
    yield Diagnosis(NOTE, "work", what)
    if seconds:
        each = statistics.mean(seconds)
        text = f"about {answers * each / 3600:.2g} hours, at {each:.2g} s per answer of the unpruned model"
        yield Diagnosis(
            NOTE, "time here", f"{text} (measured, one question alone; a batch and pruning take less)"
        )
        if config.device.partition(":")[0] == "cpu":
            return  # datasheets of GPUs that are not here would tell nothing of this run
    if shape is None:
        yield Diagnosis(NOTE, "estimate", f"none: no shape of {config.backbone} is known (backbones/shapes)")
        return
    estimates = roofline.Roofline(shape, TEXT_TOKENS)
    found = [d for d in roofline.devices() if d.match in _here(config.device)]
    for device in found or roofline.devices():
        hours, longest, apart = (
            sum(
                counts[b.name] * _question_seconds(estimates, device, methods, config, length, share)
                for b in config.benchmarks
                if b.name in counts
                for share in [passes(config, b, known[b.name]) if together else None]
            )
            / 3600
            for length, together in (
                (ANSWER_TOKENS, True),
                (config.token_cap or LONGEST, True),
                (ANSWER_TOKENS, False),
            )
        )
        low, high = (slack * hours for slack in SLACK)
        money = f", at {price:g} an hour {low * price:.2f} to {high * price:.2f}" if price else ""
        yield Diagnosis(
            NOTE,
            f"time, one {device.name}",
            f"at least {hours:.2g} hours by its datasheet; expect {low:.2g} to {high:.2g}{money}; "
            f"{longest:.2g} if every answer ran to the cap of {config.token_cap or LONGEST} tokens; "
            f"{apart:.2g} if methods and questions on one image shared nothing"
            + ("" if found else " (not this machine)"),
        )


def _scored(config, benchmark: Benchmark, documents: int) -> int:
    limit = config.limit_of(benchmark)
    return documents if limit is None else min(limit, documents)


def _methods(config) -> list[tuple[str, int | float | None]]:
    """(spec, budget) of the run, before a backbone has been asked which of them it can do."""
    from methods import registry

    specs = list(registry.available()) if list(config.methods) == ["all"] else list(config.methods)
    return [("vanilla", None), *((s, b) for b in config.budgets for s in specs if s != "vanilla")]


def _here(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.partition(":")[0] == "cuda" else ""


def passes(config, benchmark: Benchmark, documents: int) -> float:
    """Prefills of an image for each question about it: questions on one image stand side by side, in batches,
    and share theirs within one. documents: all that there are; a slice of single ones hits more images."""
    if config.suite.synthetic or benchmark.images is None:
        return 1.0
    n, share = _scored(config, benchmark, documents), benchmark.images / benchmark.documents
    if n < documents and benchmark.group_by is None:
        missed = (1 - n / documents) ** (1 / share)
        share = min(1.0, share * documents * (1 - missed) / n)
    return share + (1 - share) / config.batch_size


def _question_seconds(
    estimates, device, methods: Sequence, config, length: int, share: float | None
) -> float:
    """One question of all methods; share: `passes`, None if nothing is shared."""
    grids, total = set(), 0.0
    for method in methods:
        spec, budget = _plannable(estimates, *method)
        grid = estimates.count(spec, budget).plan.grid
        seen = share is not None and grid in grids  # in the vision cache
        grids.add(grid)
        total += _answer_seconds(estimates, device, spec, budget, config.batch_size, length, share, seen)
    return total


def _plannable(estimates, spec: str, budget) -> tuple:
    """A method that cannot plan without weights counts as the unpruned model."""
    try:
        estimates.work(spec, budget)
    except Exception:
        return "vanilla", None
    return spec, budget


def _answer_seconds(
    estimates, device, spec: str, budget, batch: int, length: int, share: float | None, seen: bool
) -> float:
    """One answer at the batch size: its part of a prefill and of `length` decoding steps."""
    work = estimates.work(spec, budget)
    flops = dict(work.flops)
    if share is not None:
        flops = {p: n - (1 - share) * estimates.shared(spec, budget)[p] for p, n in flops.items()}
    own = {p: batch * n for p, n in flops.items()}
    weights, launches = dict(work.weights), work.launches and dict(work.launches)
    if seen:
        own["vision"] = weights["vision"] = 0.0
        if launches:
            launches["vision"] = 0
    times = replace(work, flops=own, weights=weights, launches=launches).milliseconds(device)
    prefill = times["eager"] or max(times["weights"], times["flops"])
    reading = 1e3 * work.weights["llm"] / device.bandwidth
    launching = 1e3 * work.launches["llm"] * device.launch if work.launches else 0.0
    return (prefill + length * max(reading, launching)) / batch / 1e3
