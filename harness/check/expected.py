"""What a run's tables must say, computed anew: from the answers where they are there, else from what its
records hold of each document.

A path of its own, on purpose: `harness.report.numbers` is not used, so that a mistake there shows.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from backbones import shapes
from harness.costs.closed_form import closed_form_head, closed_form_layer
from harness.report import tables
from harness.store.bundle import Run
from harness.tasks.bootstrap import FEWEST_CLUSTERS, Units, groups, stream, sums_of_many
from harness.tasks.suites import BENCHMARKS, averaged

CHECKPOINTS = Path(__file__).resolve().parents[2] / "backbones" / "pocket" / "checkpoints"
#: (spec, budget)
Method = tuple[str, "int | float | None"]


def done(record: Mapping) -> bool:
    return record["status"] == "done"


def units_of(record: Mapping) -> Units:
    u = record["units"]
    return Units(tuple(u["cluster"]), np.array(u["counts"], dtype=float), tuple(u["stratum"]))


class Expected:
    """The numbers of a run by method, under the names of leaderboard.csv's columns."""

    def __init__(self, run: Run):
        self.run = run
        self.methods: list[Method] = list(dict.fromkeys([*run.efficiency, *(a[1:] for a in run.cells)]))
        self.tasks = [name for name in BENCHMARKS if any(a[0] == name for a in run.cells)]
        self.labels = tables.labels(spec for spec, _ in self.methods)
        self.seed = next(iter(run.cells.values()))["seed"]

    def find(self, label: str, budget: float | None) -> Method | None:
        """The method that a row of a table is about; a method without cells at that budget is none."""
        for spec, own in self.methods:
            if self.labels[spec] == label and own == budget:
                return spec, own
        return None

    def cells(self, method: Method) -> dict[str, dict]:
        """The method's records by task, in the order of the columns."""
        return {t: self.run.cells[(t, *method)] for t in self.tasks if (t, *method) in self.run.cells}

    @functools.cached_property
    def text_tokens(self) -> int:
        """Mean length of the prompts' text over all documents, from which FLOPs are counted."""
        lengths = {}
        for task in self.tasks:
            own = [(a, r) for a, r in self.run.cells.items() if a[0] == task and done(r)]
            if own:
                address, record = own[-1]
                answers = self.run.answers.get(address)
                mean = record["visual_tokens"]["text_tokens"]
                if answers:
                    mean = sum(a.input_tokens - a.image_tokens for a in answers) / len(answers)
                lengths[task] = (mean, len(record["documents"]["row"]))
        total = sum(n for _, n in lengths.values())
        return round(sum(mean * n for mean, n in lengths.values()) / total) if total else 0

    def row(self, method: Method) -> dict[str, float]:
        """Every column that the method has; `gflops` and `gflops_ratio` are None where they cannot be counted
        here."""
        row: dict[str, float | None] = {}
        finished = {t: r for t, r in self.cells(method).items() if done(r)}
        for task, record in finished.items():
            row[task] = record["metrics"]["score"]
            row[f"{task}_low"], row[f"{task}_high"] = record["metrics"]["interval"]
        row |= self._average(method) | self._tokens(method, finished)
        cost = self.run.efficiency.get(method)
        if cost is not None and done(cost) and finished:
            row |= _times(cost) | {"gflops": self._gflops(method)}
            reference = self._gflops(("vanilla", None))
            known = None not in (row["gflops"], reference)
            row["gflops_ratio"] = row["gflops"] / reference if known else None
        return row

    def on_page(self, method: Method, block: float) -> dict[str, float]:
        """What a row of the page has beside `row`: answers at their cap, evidence recall, accuracy by regime
        and by kind of question, on hard questions. All but the first in %; nan where there is none."""
        own = [r for r in self.cells(method).values() if done(r)]
        row = {"capped": sum(r.get("answers_at_cap") or 0 for r in own)}
        known = [r["documents"] for r in own if "recall" in r["documents"]]
        for name in ("recall", "recall_alone"):
            shares = [share for d in known for share in d[name] if share is not None]
            row[name] = 100 * sum(shares) / len(shares) if shares else math.nan
        parts: dict[str, list[float]] = {}
        for documents in known:
            for part in ("regime", "kind"):
                for name, score in zip(documents[part], documents["score"]):
                    parts.setdefault(f"{part}: {name}", []).append(score)
        row |= {name: 100 * sum(scores) / len(scores) for name, scores in parts.items()}
        return row | {"hard": self._hard(method, block)}

    @functools.cache  # noqa: B019  one object per checked run
    def _right(self, method: Method) -> dict[tuple[str, int], bool]:
        """By (task, row): whether the answer is right."""
        documents = {t: r["documents"] for t, r in self.cells(method).items() if done(r)}
        return {(t, row): s >= 0.5 for t, d in documents.items() for row, s in zip(d["row"], d["score"])}

    def _hard(self, method: Method, block: float) -> float:
        """Of the questions that vanilla has right and downsampling to the same budget has wrong."""
        vanilla, reduced = self._right(("vanilla", None)), self._right(("downsample", block))
        right, shared = self._right(method), vanilla.keys() & reduced.keys()
        hard = [q for q in shared if vanilla[q] and not reduced[q]]
        if not hard or not right.keys() >= shared:
            return math.nan
        return 100 * sum(right[q] for q in hard) / len(hard)

    # ---- averages and groups

    @functools.cached_property
    def _ratios(self) -> dict[Method, tuple[float, np.ndarray]]:
        """Mean of score / vanilla's in %, and its resamples, of methods that have every task."""
        found: dict[Method, list[tuple[float, np.ndarray]]] = {}
        counted = averaged(self.tasks)
        for task in counted:
            base = self.run.cells.get((task, "vanilla", None))
            if base is None or not done(base) or not base["metrics"]["score"]:
                return {}
            own = {m: r for m in self.methods if (r := self.cells(m).get(task)) is not None and done(r)}
            own = {m: r for m, r in own.items() if r["units"]["cluster"] == base["units"]["cluster"]}
            units = [units_of(r) for r in (base, *own.values())]
            sums = sums_of_many(units, base["metrics"]["resamples"], stream(units[0], self.seed))
            reference, *others = (_statistic(task, s) for s in sums)
            for (method, record), draws in zip(own.items(), others):
                if draws is not None and reference is not None:
                    point = record["metrics"]["score"] / base["metrics"]["score"]
                    with np.errstate(divide="ignore", invalid="ignore"):
                        found.setdefault(method, []).append((100 * point, 100 * draws / reference))
        return {
            method: (sum(p for p, _ in each) / len(each), np.mean([d for _, d in each], 0))
            for method, each in found.items()
            if len(each) == len(counted)
        }

    def _average(self, method: Method) -> dict[str, float]:
        if method not in self._ratios:
            return {}
        point, draws = self._ratios[method]
        draws = draws[np.isfinite(draws)]
        low, high = np.percentile(draws, [2.5, 97.5]) if len(draws) else (math.nan, math.nan)
        return {"average": point, "average_low": float(low), "average_high": float(high)}

    @functools.cache  # noqa: B019  one object per checked run
    def groups(self, block: float) -> dict[Method, str]:
        """Letters of the methods of a block of the table."""
        own = [m for m in self.methods if m[1] in (None, block) and m in self._ratios]
        own = [m for m in own if m in self.run.efficiency]  # the rows of the table
        sizes = [
            len(r["units"]["cluster"])
            for a, r in self.run.cells.items()
            if a[0] in averaged(self.tasks) and a[1] == "vanilla" and done(r)
        ]
        if len(own) < 2 or min(sizes) < FEWEST_CLUSTERS:
            return {}
        points, draws = zip(*(self._ratios[m] for m in own))
        return dict(zip(own, groups(np.array(points), np.stack(draws))))

    # ---- visual tokens

    def _layers(self, task: str, method: Method, record: Mapping) -> list[tuple[Sequence[int], int]]:
        """Visual tokens per layer, with the number of documents that had them."""
        answers = self.run.answers.get((task, *method))
        if answers:
            return [(a.visual_tokens, 1) for a in answers]
        return [(layers, n) for layers, n in record["visual_tokens"]["rows"]]

    def _tokens(self, method: Method, finished: Mapping[str, Mapping]) -> dict[str, float]:
        rows = [row for task, r in finished.items() for row in self._layers(task, method, r)]
        if not rows:
            return {}
        weights = [n for _, n in rows]
        last = np.array([layers[-1] for layers, _ in rows], dtype=float)
        means = [sum(layers) / len(layers) for layers, _ in rows]
        kept = float(np.average(last, weights=weights))
        return {
            "kept": kept,
            "kept_std": math.sqrt(float(np.average((last - kept) ** 2, weights=weights))),
            "mean_over_layers": float(np.average(means, weights=weights)),
        }

    # ---- costs

    @functools.cache  # noqa: B019  one object per checked run
    def _gflops(self, method: Method) -> float | None:
        """2 FLOPs per MAC of the measured parts and the LLM's layers at the measured counts, by a formula
        that gives the probe's measured MAC; None if none at hand does."""
        finished = {t: r for t, r in self.cells(method).items() if done(r)}
        cost, llm = self.run.efficiency.get(method), self._llm
        if llm is None or cost is None or not done(cost) or not finished:
            return None
        rows = [row for task, r in finished.items() for row in self._layers(task, method, r)]
        documents = sum(n for _, n in rows)
        counted: dict[tuple, float] = {}
        for layers, n in rows:
            counted[tuple(layers)] = counted.get(tuple(layers), 0) + n
        mean = sum(llm(layers, self.text_tokens) * n for layers, n in counted.items()) / documents
        parts = cost["macs"]
        return 2 * (parts["tower"] + parts["projector"] + parts["selection"] + mean) / 1e9

    @functools.cached_property
    def _llm(self) -> Callable[[Sequence[int], int], float] | None:
        """(visual tokens per layer, text tokens) -> MAC of the language model."""
        probes = [
            c["macs"]
            for c in self.run.efficiency.values()
            if done(c) and all(c["macs"].get(f"probe_{n}") for n in ("visual_tokens", "text_tokens", "llm"))
        ]
        for formula in _formulas(self.run.backbone, probes):
            try:
                fits = probes and all(
                    math.isclose(_mean_of(formula, p), p["probe_llm"], rel_tol=1e-9) for p in probes
                )
            except (AttributeError, TypeError, ZeroDivisionError, IndexError):
                continue
            if fits:
                return formula
        return None


def _statistic(task: str, sums: np.ndarray) -> np.ndarray | None:
    """Scores of summed counts; None for counts that are no such benchmark's (`folder` says so)."""
    try:
        with np.errstate(divide="ignore", invalid="ignore"):
            return BENCHMARKS[task].scoring.statistic(sums)
    except (ValueError, IndexError):
        return None


def _mean_of(formula: Callable, probe: Mapping) -> float:
    pairs = list(zip(probe["probe_visual_tokens"], probe["probe_text_tokens"]))
    return sum(formula(layers, text) for layers, text in pairs) / len(pairs)


def _formulas(backbone: str, probes: Sequence[Mapping]) -> Iterator[Callable[[Sequence[int], int], float]]:
    """By the shape of the language model, where its configuration is at hand; else by what all decoders
    share: a layer's MAC are linear and quadratic in the tokens, with factors that the probes tell."""
    config = _text_config(backbone)
    if config is not None:

        def closed_form(layers: Sequence[int], text: int) -> float:
            return sum(closed_form_layer(config, v + text) for v in layers) + closed_form_head(config)

        yield closed_form
    try:
        rows = [np.mean([_powers(*p) for p in zip(m["probe_visual_tokens"], m["probe_text_tokens"])], 0)
                for m in probes]  # fmt: skip
        scale = np.max(rows, 0)
        factors, _, rank, _ = np.linalg.lstsq(
            np.array(rows) / scale, np.array([m["probe_llm"] for m in probes]), rcond=1e-12
        )
    except (TypeError, ValueError, IndexError, np.linalg.LinAlgError):
        return
    if rank == 3:
        yield lambda layers, text: float(np.dot(_powers(layers, text) / scale, factors))


def _powers(layers: Sequence[int], text: int) -> np.ndarray:
    n = np.array(layers, dtype=float) + text
    return np.array([1.0, n.sum(), (n * n).sum()])


def _text_config(backbone: str):
    shape = shapes.named_like(backbone)
    if shape is not None:
        return shape.config.text_config
    for folder in (Path(backbone), CHECKPOINTS / backbone):
        try:
            body = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            return SimpleNamespace(**body["text_config"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _times(cost: Mapping) -> dict[str, float]:
    times = cost["latency_ms"]
    total = times["total"]
    row = {
        "selection_gflops": 2 * cost["macs"]["selection"] / 1e9,
        "prefill": total["median"], "prefill_p10": total["p10"], "prefill_p90": total["p90"],
    }  # fmt: skip
    row |= {part: times[part]["median"] for part in ("vision", "selection", "llm") if part in times}
    if times["vanilla_total_median"]:
        row["speedup"] = times["vanilla_total_median"] / total["median"]
    if times.get("peak_bytes"):
        row["peak_gb"] = times["peak_bytes"] / 1e9
    if times.get("joules") is not None:
        row["joules"] = times["joules"]
    return row
