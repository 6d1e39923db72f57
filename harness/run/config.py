"""What a run is asked to do, the cells it consists of, and the key that identifies a cell's answers."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from backbones.hub.options import LoadOptions
from harness.store.records import package_versions
from harness.tasks.suites import POCKET8, Benchmark, Suite
from methods.errors import UserError

Budget = int | float


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The options of `run_all.py`, checked. `methods` are specs such as `fastv:k=3,schedule=average`. `limit`
    is documents a benchmark (None: all), `limits` the same for single ones. `load`: how the backbone is found
    and loaded.
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
    try:
        budget: Budget = float(text) if "." in text else int(text)
    except ValueError as error:
        raise UserError(problem) from error
    if budget <= 0 or (isinstance(budget, float) and budget >= 1):
        raise UserError(problem)
    return budget


@dataclass(frozen=True)
class Method:
    """A method at a budget (None: it prunes nothing). `parameters` are all of its settings, defaults
    included.
    """

    spec: str
    name: str
    budget: Budget | None
    parameters: Mapping[str, object] = field(hash=False)
    code: str = field(repr=False)

    @property
    def slug(self) -> str:
        """File-name form of spec and budget."""
        return re.sub(r"[^A-Za-z0-9._]+", "-", f"{self.spec}_{'all' if self.budget is None else self.budget}")


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
        spec, name, None if name == "vanilla" else budget, pruner.parameters(), source_digest(type(pruner))
    )


@functools.cache
def source_digest(cls: type) -> str:
    """Digest of the source files of a method's class and its bases, so that an edited method is run again.

    A method that is a package counts with all modules of the package, not with those of sub-packages (a
    learned method's training code).
    """
    total = hashlib.sha256()
    for base in cls.__mro__:
        module = sys.modules.get(base.__module__)
        if base is object or module is None or base.__module__.split(".")[0] in ("torch", "abc", "typing"):
            continue
        try:
            total.update(inspect.getsource(module).encode())
            package = sys.modules.get(module.__package__ or "")
            own = package if package and package.__name__ != "methods" else module
            for folder in getattr(own, "__path__", ()):
                for path in sorted(Path(folder).glob("*.py")):
                    total.update(path.read_bytes())
        except (OSError, TypeError):  # defined in a prompt: nothing to read, its parameters must do
            total.update(base.__qualname__.encode())
    return total.hexdigest()[:16]


@functools.cache
def engine_digest() -> str:
    """Digest of the code that applies methods to models: `backbones` and the shared part of `methods`."""
    import backbones
    import methods
    from methods import registry

    own = {Path(inspect.getfile(cls)) for cls in registry.available().values()}
    shared = [path for path in Path(methods.__file__).parent.glob("*.py") if path not in own]
    total = hashlib.sha256()
    for path in sorted([*Path(backbones.__file__).parent.glob("*.py"), *shared]):
        total.update(path.name.encode())
        total.update(path.read_bytes())
    return total.hexdigest()[:16]


def digest(body: object) -> str:
    """First 12 hex digits of the SHA-256 of canonical JSON."""
    return hashlib.sha256(json.dumps(body, sort_keys=True, default=str).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Cell:
    """One (backbone, method and its parameters, budget, task), over a fixed set of documents.

    `answers_key` covers everything that determines the answer to a document; `key` adds which documents.
    Batch size is in neither: any batch size gives the same answers.
    """

    benchmark: Benchmark
    method: Method
    answers_key: str
    key: str

    @property
    def name(self) -> str:
        return f"{self.benchmark.name}/{self.method.slug}"

    def record_path(self, out: Path) -> Path:
        return out / "cells" / self.benchmark.name / f"{self.method.slug}_{self.key}.json"

    def journal_path(self, out: Path) -> Path:
        return out / "journal" / self.benchmark.name / f"{self.method.slug}_{self.answers_key}.jsonl"


def make_cell(
    config: RunConfig, described: Mapping[str, object], benchmark: Benchmark, method: Method, documents
) -> Cell:
    """described: `Backbone.describe()`; documents: harness.tasks.lmms.Documents."""
    versions = package_versions()
    answers = digest(
        {
            "backbone": dict(described),
            "engine": engine_digest(),
            "method": {"name": method.name, "parameters": dict(method.parameters), "code": method.code},
            "budget": method.budget,
            "task": {
                "yaml": benchmark.yaml,
                "overrides": dict(benchmark.overrides),
                "data": documents.digest,
            },
            "dtype": config.dtype,
            "device": config.device.partition(":")[0],
            "max_new_tokens": config.token_cap,
            **({"blind": True} if config.blind else {}),
            "versions": {name: versions[name] for name in ("torch", "transformers", "lmms-eval")},
        }
    )
    return Cell(benchmark, method, answers, digest([answers, documents.numbers]))
