"""The Markdown table of a latency record (`harness.report.latency_report`), from the record alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from backbones import shapes
from harness import published
from harness.costs.roofline import devices
from harness.report import tables
from harness.report.tables import MISSING
from harness.run.config import Budget


def render(record: Mapping) -> str:
    """Caption, then a block for each batch size and budget: times, and beside them cost and estimates."""
    parts = [
        f"# Prefill latency: {tables.escaped(Path(record['backbone']['name']).name)}",
        "",
        _caption(record),
    ]
    blocks = [
        (batch, budget)
        for batch in record["settings"]["batch_sizes"]
        for budget in sorted(record["settings"]["budgets"], reverse=True)
    ]
    for batch, budget in blocks:
        rows = [
            r
            for r in record["results"]
            if r["batch_size"] == batch and r["method"]["budget"] in (None, budget)
        ]
        unit = "of the image" if isinstance(budget, float) else "visual tokens"
        parts += ["", f"## Budget {budget:g} {unit}, batch size {batch}"]
        if record["device"] is not None:
            parts += ["", tables.markdown(_times(rows)), *_graph_notes(rows)]
        parts += ["", tables.markdown(_costs(rows, (record["device"] or {}).get("name", "")))]
        if batch == 1:
            parts += _paper(record, rows, budget)
    if record.get("held"):
        parts += ["", *_held(record["held"])]
    return "\n".join(parts)


def _held(held: Mapping) -> list[str]:
    """Estimates against published measurements, with the factors of `harness.costs.fitted`."""
    body = []
    for row in held["rows"]:
        entry = {"row": row["name"], "": "fitted" if row["fitted"] else "test"}
        for part, title in (("vision", "tower"), ("llm", "prefill")):
            measured, corrected = row["measured"][part], row["corrected"][part]
            entry[f"{title}: measured"] = f"{measured:.1f}"
            entry["datasheet" + " " * (part == "llm")] = f"{row['estimated'][part]:.1f}"
            entry["corrected" + " " * (part == "llm")] = f"{corrected:.1f}"
            entry["off" + " " * (part == "llm")] = f"{100 * (corrected / measured - 1):+.0f} %"
        body.append(entry)
    factors = held["factors"]
    return [
        f"## Estimates held against measurements, {held['device']}",
        "",
        tables.markdown(body, left=2),
        "",
        f"ms; measured: {held['source']}. Of the datasheet's speed the card reached "
        f"{factors['vision']:.3f} in the tower and {factors['llm']:.3f} in the prefill (geometric mean of "
        "the fitted rows); the other rows test that. corr. above is the estimate with these factors, "
        "selection as by the datasheet: an **estimate** still, of one card.",
    ]


def _names(rows: Sequence[Mapping]) -> dict[str, str]:
    return tables.labels(r["method"]["spec"] for r in rows)


def _median(result: Mapping, part: str) -> float | None:
    return result["latency_ms"][part]["median"] if "latency_ms" in result else None


def _with_graph(result: Mapping) -> float | None:
    """Vision and selection as measured, and the LLM as a graph."""
    graph = result.get("graph_ms", {}).get("median")
    return None if graph is None else _median(result, "vision") + _median(result, "selection") + graph


def _number(value: float | None, form: str = ".2f", scale: float = 1.0) -> str:
    return MISSING if value is None else format(value * scale, form)


def _with_speed_up(result: Mapping, vanilla: Mapping, time: Callable[[Mapping], float | None]) -> str:
    """`12.34 (1.50x)`."""
    own, reference = time(result), time(vanilla)
    if own is None:
        return MISSING
    return f"{own:.2f} ({reference / own:.2f}x)" if reference else f"{own:.2f}"


def _times(rows: Sequence[Mapping]) -> list[dict]:
    vanilla = rows[0]
    names = _names(rows)
    table = []
    for r in rows:
        spread = r.get("latency_ms", {}).get("total")
        total = _with_speed_up(r, vanilla, lambda x: _median(x, "total"))
        table.append(
            {
                "method": names[r["method"]["spec"]],
                "vision ms": _number(_median(r, "vision")),
                "selection ms": _number(_median(r, "selection")),
                "LLM ms": _number(_median(r, "llm")),
                "total ms (speed-up)": total if "latency_ms" in r else r["status"],
                "p10–p90": f"{spread['p10']:.2f}–{spread['p90']:.2f}" if spread else MISSING,
                "wall ms": _number(_median(r, "wall")),
                "LLM as graph ms": _number(r.get("graph_ms", {}).get("median")),
                "total with graph (speed-up)": _with_speed_up(r, vanilla, _with_graph),
                "decode ms per token": _number(_median(r, "decode")),
            }
        )
    return table


def _costs(rows: Sequence[Mapping], here: str) -> list[dict]:
    """here: the driver's name of the device that was measured on."""
    names = _names(rows)
    table = []
    for r in rows:
        seen, estimate = r.get("latency_ms", {}), r["estimate"] or {}
        measured = {
            "tokens cached": _number(seen.get("cached_tokens"), ".1f"),
            "KV cache MB": _number(seen.get("kv_bytes"), ".2f", 1e-6),
            "peak GB": _number(seen.get("peak_bytes"), ".2f", 1e-9),
            "of it the prefill's": _number(seen.get("prefill_bytes"), ".2f", 1e-9),
            "J an image": _number(seen.get("joules"), ".2f"),
        }
        row = {
            "method": names[r["method"]["spec"]],
            **(measured if seen else {"latency, memory, energy": r["status"]}),
            "TFLOPs": _number(estimate.get("tflops"), ".4g"),
            "launches": _number(estimate.get("launches"), "d", 1),
        }
        for device in devices():
            ms = estimate.get("devices_ms", {}).get(device.name, {})
            row[f"est. {device.name}" + (" (this one)" if device.match in here else "")] = _estimate(ms)
        for name, ms in estimate.get("corrected_ms", {}).items():
            row[f"corr. {name}"] = _number(ms, ".3g")
        table.append(row)
    return table


def _estimate(ms: Mapping) -> str:
    """`18.1 / 16 / 10.4: 20.3, 20.3` (see the caption)."""
    if not ms:
        return MISSING
    terms = " / ".join(_number(ms[k], ".3g") for k in ("weights", "flops", "launches"))
    return f"{terms}: {_number(ms['eager'], '.3g')}, {_number(ms['graph'], '.3g')}"


def _graph_notes(rows: Sequence[Mapping]) -> list[str]:
    """Why there is no graph, and for whom."""
    without: dict[str, list[str]] = {}
    for r in rows:
        reason = r.get("graph_ms", {}).get("reason")
        if reason:
            without.setdefault(reason, []).append(r["method"]["spec"])
    lines = []
    for reason, specs in without.items():
        who = "no row" if len(specs) == len(rows) else "not for " + ", ".join(specs)
        lines.append(f"- LLM as graph, {who}: {reason}.")
    return ["", *lines] if lines else []


def _paper(record: Mapping, rows: Sequence[Mapping], budget: Budget) -> list[str]:
    """The published latencies of this backbone: beside ours on the device they were measured on, else their
    ratios alone."""
    shape = shapes.named_like(record["backbone"]["name"])
    lines = []
    for table in published.load().efficiency.values():
        if shape is None or shape.name != table.backbone or budget not in {r.tokens for r in table.rows[1:]}:
            continue
        ours = {r["method"]["name"]: _median(r, "total") for r in reversed(rows)}
        here = (record["device"] or {}).get("name", "")
        same = table.device.removeprefix("NVIDIA ") in here
        body = []
        for row in table.rows:
            own, base = ours.get(row.method), ours.get("vanilla")
            entry = {
                "row": f"{row.method}, {row.tokens}",
                "paper's speed-up": f"{table.rows[0].latency_ms / row.latency_ms:.2f}x",
                "ours": f"{base / own:.2f}x" if own and base else MISSING,
            }
            if same:
                entry |= {"paper's ms": f"{row.latency_ms:.1f}", "our ms": _number(own, ".1f")}
            body.append(entry)
        note = (
            f"Measured on the same kind of device, {table.device}."
            if same
            else f"Ratios only: the paper's milliseconds are of an {table.device}, "
            + (f"these rows of {here}." if here else "and nothing was measured here.")
        )
        lines += ["", f"### {table.place} of the paper, latency", "", tables.markdown(body), "", note]
    return lines


def _caption(record: Mapping) -> str:
    settings, device = record["settings"], record["device"]
    if device is None:
        what = (
            "**Not measured**: nothing was run at this shape, these are estimates alone, for "
            f"{settings['text_tokens']} text tokens. On a GPU, `--random-weights` in place of `--estimate` "
            "measures them."
        )
        lines = [what]
    else:
        clocks = [
            f"{name} {device[f'{key}_mhz']} of {device[f'{key}_max_mhz']} MHz"
            for name, key in (("SM", "sm"), ("memory", "memory"))
            if device.get(f"{key}_mhz")
        ]
        if device.get("power_limit_w"):
            clocks.append(f"power limit {device['power_limit_w']:.0f} W")
        versions = f"torch {record['packages']['torch']}, transformers {record['packages']['transformers']}"
        driver = f", driver {device['driver']}, CUDA {device['cuda']}" if device.get("driver") else ""
        lines = [
            f"{device['name']}{driver}, {versions}" + "".join(f", {c}" for c in clocks) + ".",
            f"{record['dtype']}, weights {record['backbone']['weights']} "
            f"({record['weights_bytes'] / 1e9:.3f} GB), fused attention (sdpa).",
            f"{settings['text_tokens']:g} text tokens ({settings['inputs']}); larger batches are copies.",
            f"Medians of {settings['repeats']} prefills in turn with all other methods, after "
            f"{settings['warm_up']} of each shape; {settings['decode_tokens']} tokens decoded.",
        ]
    ratio = "; ".join(d.name for d in devices())
    lines += [
        "total = vision (tower, projector) + selection (the method's own work) + LLM to the first token's "
        "logits; wall: the host's clock. LLM as graph: the LLM's prefill replayed as a CUDA graph.",
        f"est. ({ratio}): **estimates** from datasheets, no measurement. Weights read / FLOPs / kernel "
        "launches, each alone in ms: the slowest for each part, summed; the same with the LLM as a graph. "
        "StepPrune's loop counts launch by launch there, though on a GPU it is a graph of its own.",
    ]
    lines += [f"Left out: {line}." for line in record["left_out"]]
    lines += [f"Not available: {line}." for line in record["unavailable"]]
    return "\n".join(f"- {tables.escaped(line)}" for line in lines)
