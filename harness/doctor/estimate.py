"""How long the requested run takes at least, by datasheets (`harness.costs.roofline`): no measurement."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
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
        hours, longest = (
            sum(counts.values())
            / 3600
            * sum(_answer_seconds(estimates, device, *m, config.batch_size, length) for m in methods)
            for length in (ANSWER_TOKENS, config.token_cap or LONGEST)
        )
        low, high = (slack * hours for slack in SLACK)
        money = f", at {price:g} an hour {low * price:.2f} to {high * price:.2f}" if price else ""
        yield Diagnosis(
            NOTE,
            f"time, one {device.name}",
            f"at least {hours:.2g} hours by its datasheet; expect {low:.2g} to {high:.2g}{money}; "
            f"{longest:.2g} if every answer ran to the cap of {config.token_cap or LONGEST} tokens"
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


def _answer_seconds(estimates, device, spec: str, budget, batch: int, length: int) -> float:
    """One answer at the batch size: its share of a prefill and of `length` decoding steps."""
    try:
        work = estimates.work(spec, budget, batch)
    except Exception:  # a method that cannot plan without weights: as the unpruned model
        work = estimates.work("vanilla", None, batch)
    times = work.milliseconds(device)
    prefill = times["eager"] or max(times["weights"], times["flops"])
    reading = 1e3 * work.weights["llm"] / device.bandwidth
    launching = 1e3 * work.launches["llm"] * device.launch if work.launches else 0.0
    return (prefill + length * max(reading, launching)) / batch / 1e3
