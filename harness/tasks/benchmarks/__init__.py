"""The benchmarks, one file each (MMBench's two languages and TextVQA's two prompts share theirs).

A module here defines `BENCHMARKS`, a tuple of `harness.tasks.benchmark.Benchmark`: a new file is a new
column.
"""

from __future__ import annotations

import importlib
import pkgutil

from harness.tasks.benchmark import Benchmark


def load() -> dict[str, Benchmark]:
    """All benchmarks by name, in the order of the table's columns. Raises ValueError if two share a name."""
    found: dict[str, Benchmark] = {}
    for module in pkgutil.iter_modules(__path__):
        for benchmark in importlib.import_module(f"{__name__}.{module.name}").BENCHMARKS:
            if benchmark.name in found:
                raise ValueError(f"two benchmarks are named {benchmark.name}")
            found[benchmark.name] = benchmark
    return dict(sorted(found.items(), key=lambda item: item[1].place))
