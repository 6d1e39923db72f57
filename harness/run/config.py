"""What a run is asked to do, the cells it consists of, and the key that identifies a cell's answers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from backbones.hub.options import LoadOptions
from harness.run import identity
from harness.store.records import digest, package_versions
from harness.tasks.suites import POCKET8, Benchmark, Suite
from methods.errors import UserError

Budget = int | float

#: packages whose version an answer depends on
ANSWERED_BY = ("torch", "transformers", "lmms-eval", "tokenizers", "torchvision", "pillow")
#: characters of a method's spec in the names of its files
_LONGEST = 80


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The options of `run_all.py`, checked. `methods` are specs such as `fastv:k=3,schedule=average`. `limit`
    is documents per benchmark (None: all), `limits` the same for single ones. `load`: how the backbone is
    found and loaded. `explore`: questions in the explorer of the page. `keep_results`: re-use what was
    finished by other code, with a footnote in the table. `match`: "flops" for a second table beside the
    leaderboard, in which every method has a budget of equal cost (`harness.costs.match`).
    """

    benchmarks: tuple[Benchmark, ...]
    out: Path
    budgets: tuple[Budget, ...] = (64,)
    methods: tuple[str, ...] = ("all",)
    backbone: str = "pocket-llava"
    suite: Suite = POCKET8
    data: Path | None = None
    limit: int | None = None
    batch_size: int = 8
    device: str = "cpu"
    dtype: str = "float32"
    fresh: bool = False
    explore: int = 60
    keep_results: bool = False
    match: Literal["flops"] | None = None
    seed: int = 0
    latency_repeats: int = 15
    max_new_tokens: int | None = None
    blind: bool = False
    engine: str = "local"
    address: str | None = None
    workers: int | None = None
    limits: Mapping[str, int] = field(default_factory=dict, hash=False)
    load: LoadOptions = field(default_factory=LoadOptions)

    def limit_of(self, benchmark: Benchmark) -> int | None:
        return self.limits.get(benchmark.name, self.limit)

    @property
    def token_cap(self) -> int | None:
        return self.max_new_tokens if self.max_new_tokens is not None else self.suite.max_new_tokens


def parse_budget(text: str) -> Budget:
    """`"64"` -> 64 visual tokens, `"0.111"` -> that fraction of the image's. Raises UserError."""
    problem = (
        f"budget {text!r}: give a whole number of visual tokens (64) or a fraction between 0 and 1 (0.111)"
    )
    if not re.fullmatch(r"\d+|\d*\.\d+|\d+\.", text, re.ASCII):
        raise UserError(problem)
    budget: Budget = float(text) if "." in text else int(text)
    if budget <= 0 or (isinstance(budget, float) and budget >= 1):
        raise UserError(problem)
    return budget


@dataclass(frozen=True)
class Method:
    """A method at a budget (None: it prunes nothing). `parameters` are all of its settings, defaults
    included; `code` the source files that its class depends on (`identity.method_code`).
    """

    spec: str
    name: str
    budget: Budget | None
    parameters: Mapping[str, object] = field(hash=False)
    code: identity.Code = field(repr=False, hash=False)

    @property
    def slug(self) -> str:
        """File-name form of spec and budget; of a long spec its beginning (a file's key tells them apart)."""
        spec = self.spec if len(self.spec) <= _LONGEST else self.spec[:_LONGEST]
        return re.sub(r"[^A-Za-z0-9._]+", "-", f"{spec}_{'all' if self.budget is None else self.budget}")


def build_pruner(method: Method):
    """A fresh pruner object of the method."""
    from methods import registry

    return registry.build(method.spec, budget=method.budget)


def method_at(spec: str, budget: Budget | None, seed: int) -> Method:
    """Resolve a spec through the registry. A method with a `seed` parameter gets the run's, unless the spec
    names one.

    Raises UserError for an unknown method or parameter (from the registry).
    """
    from methods import registry

    name = spec.partition(":")[0]
    pruner = registry.build(spec, budget=None if name == "vanilla" else budget)
    if "seed" in pruner.parameters() and "seed=" not in spec and seed:
        spec = f"{spec}{',' if ':' in spec else ':'}seed={seed}"
        pruner = registry.build(spec, budget=budget)
    return Method(
        spec,
        name,
        None if name == "vanilla" else budget,
        pruner.parameters(),
        identity.method_code(type(pruner)),
    )


@dataclass(frozen=True)
class Cell:
    """One (backbone, method and its parameters, budget, task), over a fixed set of documents.

    `answers_key` covers everything that determines the answer to a document; `key` adds which documents and
    how they are scored: it is the digest of `identity`. Batch size is in neither: any batch size gives the
    same answers.
    """

    benchmark: Benchmark
    method: Method
    answers_key: str
    key: str
    identity: Mapping[str, object] = field(repr=False, hash=False)

    @property
    def name(self) -> str:
        return f"{self.benchmark.name}/{self.method.slug}"

    def record_path(self, out: Path) -> Path:
        return out / "cells" / self.benchmark.name / f"{self.method.slug}_{self.key}.json"

    def journal_path(self, out: Path) -> Path:
        return out / "journal" / self.benchmark.name / f"{self.method.slug}_{self.answers_key}.jsonl"


def make_cell(
    config: RunConfig,
    described: Mapping[str, object],
    benchmark: Benchmark,
    method: Method,
    documents,
    answering: identity.Code,
    scoring: identity.Code,
) -> Cell:
    """described: `Backbone.describe()`; documents: harness.tasks.lmms.Documents; answering, scoring:
    `identity.answer_code` of the backbone's family and `identity.scoring_code` of the benchmark."""
    answers = {
        "backbone": dict(described),
        "method": {"name": method.name, "parameters": dict(method.parameters)},
        "budget": method.budget,
        "task": {
            "name": benchmark.name,
            "yaml": benchmark.yaml,
            "overrides": dict(benchmark.overrides),
            "data": documents.digest,
        },
        "dtype": config.dtype,
        "device": config.device.partition(":")[0],
        "max_new_tokens": config.token_cap,
        "blind": config.blind,
        "packages": {name: package_versions()[name] for name in ANSWERED_BY},
        "code": {**answering, **method.code},
    }
    whole = {
        "answers": answers,
        "documents": digest(documents.numbers),
        "seed": config.seed,
        "scoring": {"code": dict(scoring)},
    }
    whole = json.loads(json.dumps(whole, default=str))  # as the record will have it
    return Cell(benchmark, method, digest(whole["answers"]), digest(whole), whole)
