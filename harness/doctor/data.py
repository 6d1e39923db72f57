"""The benchmarks' files: where they are, whether their columns and first rows are what the tasks read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from harness.doctor.findings import MISSING, NOTE, OK, Diagnosis, from_error
from harness.pocket.data import ensure
from harness.tasks.benchmark import Benchmark
from harness.tasks.schemas import column_problems, row_problem
from harness.tasks.sources import BenchmarkFiles, locate
from methods.errors import UserError

ASKED = "questions on them are left out and counted; get the files anew to ask them"
#: rows looked at in each file
FIRST = 3


@dataclass(frozen=True)
class Table:
    """A benchmark's files; documents: rows of questions in them."""

    benchmark: Benchmark
    source: BenchmarkFiles
    documents: int


def check(config, family) -> Iterator[Diagnosis | Table]:
    """One finding a benchmark, and a Table for each that a run could use. config: RunConfig. family: the
    backbone's."""
    data = config.data
    if data is None and config.suite.synthetic:
        data = ensure(varied=family is not None and family.any_size)
    for benchmark in config.benchmarks:
        what = f"data {benchmark.name}"
        try:
            source = locate(config.suite, benchmark, data, config.load.download)
            problems = [p for role in source.files for p in _problems(benchmark, role, source)]
            documents = _rows(source)
            bad = _bad_images(source)
        except UserError as error:
            yield from_error(what, error)
            continue
        if bad:
            named = "; ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
            yield Diagnosis(NOTE, what, f"{len(bad)} images cannot be shown to a model: {named}", ASKED)
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            yield Diagnosis(
                MISSING, what, "; ".join(problems[:3]) + more, "other files (see docs/benchmarks.md)"
            )
            continue
        origin = source.origin.get("repository") or "local files"
        commit = (source.origin.get("revision") or "")[:12]
        text = (
            f"{documents} documents, {source.bytes / 1e6:.0f} MB, {origin} {commit}".rstrip()
            + "; columns and first rows as expected"
        )
        yield Diagnosis(OK, what, text)
        yield Table(benchmark, source, documents)


def _rows(source: BenchmarkFiles) -> int:
    import pyarrow.parquet

    return sum(pyarrow.parquet.read_metadata(path).num_rows for path in source.files["rows"])


def _bad_images(source: BenchmarkFiles) -> list[str]:
    """A line for each image that cannot be shown to a model: the first of each file by decoding them, all
    others by their headers. Nothing where the files have no such column."""
    import pyarrow.parquet

    from backbones.images import header_problem, problem

    found = []
    for path in source.files.get("images", source.files["rows"]):
        row = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            if "image" not in file.schema_arrow.names:
                continue
            for batch in file.iter_batches(batch_size=64, columns=["image"]):
                for image in batch.column(0).to_pylist():
                    image = image or {}
                    content = image.get("bytes")
                    if why := problem(content)[0] if row < FIRST else header_problem(content):
                        found.append(f"{path.name} row {row}, {image.get('path') or 'no name'}: {why}")
                    row += 1
    return found


def _problems(benchmark: Benchmark, role: str, source: BenchmarkFiles) -> list[str]:
    """Of the first rows of every file of the role."""
    import pyarrow
    import pyarrow.parquet

    found = []
    for path in source.files[role]:
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                own = column_problems(benchmark, role, file.schema_arrow)
                if not own:
                    batch = next(file.iter_batches(batch_size=FIRST), None)
                    rows = batch.to_pylist() if batch is not None else []
                    found_in = [(n, row_problem(benchmark, role, row)) for n, row in enumerate(rows)]
                    own = [f"row {n}: {why}" for n, why in found_in if why] if rows else ["no rows"]
                if not own and benchmark.strata:
                    parts = set(file.read(columns=[benchmark.stratum])[benchmark.stratum].to_pylist())
                    unknown = sorted(parts - set(benchmark.strata))
                    own = [f"unknown parts {unknown}"] if unknown else []
        except (OSError, pyarrow.ArrowException) as error:
            own = [f"unreadable ({str(error).splitlines()[0]})"]
        found += [f"{path.name}: {problem}" for problem in own]
    return found
