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
    """The options of `run_all.py`, checked.

    Attributes:
        benchmarks: the columns of the leaderboard.
        out: folder of the run.
        budgets: visual tokens per image, or fractions of them below 1; a block of the table each.
        methods: specs such as `fastv:k=3,schedule=average`; "all": every method there is.
        backbone: a name for `backbones.load`.
        suite: which data set the benchmarks are read from, and its defaults.
        data: folder of the data; None: the suite's own.
        limit: documents per benchmark; None: all.
        batch_size: questions answered together; changes no answer.
        device: of the backbone.
        dtype: of its weights: float32, bfloat16 or float16.
        fresh: compute again what an earlier run in `out` has finished.
        explore: questions in the explorer of the page.
        keep_results: re-use what was finished by other code, with a footnote in the table.
        match: "flops" for a second table beside the leaderboard, in which every method has a budget of equal
            cost (`harness.costs.match`); None: none.
        seed: of the methods that draw, and of the bootstrap.
        latency_repeats: prefills timed of each method.
        max_new_tokens: cap on an answer's length, in tokens; None: the suite's.
        blind: every image is replaced by a grey one.
        engine: "local", or "ray" to spread the cells over a cluster.
        address: of the Ray cluster, or "auto"; None: a local one for this run.
        workers: of Ray; None: one per GPU, or per CPU where there is no GPU.
        limits: `limit` of single benchmarks, by name.
        load: how the backbone is found and loaded.
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
        """Documents of the benchmark; None: all."""
        return self.limits.get(benchmark.name, self.limit)

    @property
    def token_cap(self) -> int | None:
        """New tokens that an answer has at most; None: the benchmark's own number."""
        return self.max_new_tokens if self.max_new_tokens is not None else self.suite.max_new_tokens


def parse_budget(text: str) -> Budget:
    """A budget as it is typed: `"64"` is 64 visual tokens, `"0.111"` that fraction of the image's.

    Raises:
        UserError: neither a whole number from 1 on nor a fraction between 0 and 1.
    """
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
    """A method at a budget.

    Attributes:
        spec: as it was asked for, with the run's seed where the method draws.
        name: the method's.
        budget: visual tokens per image, or a fraction of them; None: it prunes nothing.
        parameters: all of its settings, defaults included.
        code: digests of the source files that its class depends on (`identity.method_code`).
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
    """Resolve a spec through the registry.

    Args:
        spec: such as `fastv:k=3`.
        budget: see `Method`; vanilla has none whatever is given.
        seed: the run's, for a method with such a parameter, unless the spec names one.

    Raises:
        UserError: for an unknown method or parameter (from the registry).
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

    Batch size is in no key: any batch size gives the same answers.

    Attributes:
        benchmark: the task.
        method: with parameters and budget.
        answers_key: digest of everything that determines the answer to a document.
        key: digest of `identity`.
        identity: what `answers_key` covers, which documents, and how they are scored; JSON-able.
    """

    benchmark: Benchmark
    method: Method
    answers_key: str
    key: str
    identity: Mapping[str, object] = field(repr=False, hash=False)

    @property
    def name(self) -> str:
        """For logs and messages."""
        return f"{self.benchmark.name}/{self.method.slug}"

    def record_path(self, out: Path) -> Path:
        """File of the cell's record in the run's folder `out`."""
        return out / "cells" / self.benchmark.name / f"{self.method.slug}_{self.key}.json"

    def journal_path(self, out: Path) -> Path:
        """File of the answers so far in the run's folder `out`."""
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
    """The cell of a method on a benchmark.

    Args:
        config: of the run.
        described: `Backbone.describe()`.
        benchmark: the task.
        method: with parameters and budget.
        documents: `harness.tasks.lmms.Documents` of the benchmark.
        answering: `identity.answer_code` of the backbone's family.
        scoring: `identity.scoring_code` of the benchmark.
    """
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
