"""What the harness knows of one benchmark. Each stands in a file of its own in `harness/tasks/benchmarks`.

Nothing heavy is imported here or there, so that `run_all.py --list` answers at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from harness.drawings.drawing import Drawing
from harness.tasks.scoring import Scoring

#: kinds of columns in the data sets' files (`harness.tasks.schemas` checks them)
TEXT, INT, TEXTS, IMAGE, ANSWERS = "text", "whole number", "list of texts", "image", "list of answers"

Row = Mapping[str, object]


def rows_in(folder: str) -> dict[str, str]:
    """`Benchmark.files` of a benchmark with one table that holds its images."""
    return {"rows": f"{folder}/{{split}}.parquet"}


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One benchmark: a column of the leaderboard.

    Attributes:
        name: as `--tasks` and the records have it.
        title: head of its column.
        place: of the column, counted from the left.
        yaml: the upstream task below `lmms_eval/tasks`.
        files: parquet files below the data root by role, `{split}` filled in: "rows" the questions, "images"
            a table of its own for images (GQA).
        columns: by role, the columns that the task reads and the kind of each.
        scoring: from lmms-eval's per-sample results to the number.
        unit: "%" or "points".
        maximum: highest possible value of the published data set, in `unit`.
        documents: number of documents that the published split has (MMBench with its rotations).
        images: number of distinct images that the published split has; None: about one a document.
        comparable: the score can stand beside the paper's.
        why: how the number is made; where it is not comparable, why not.
        upstream_split: the data set's split.
        repository: the data set's name on the hub.
        configs: its configuration by role.
        overrides: merged into the upstream YAML, one level deep.
        group_by: documents with the same `group_key` are scored together and stay together in a slice.
        group_key: (row, its number in the file) -> key; the default is the row's number.
        stratum: column over which a slice is spread evenly.
        strata: the values that the column may have; empty: any.
        part: row -> the part of the benchmark that it belongs to; a slice holds every part, since without one
            there is no score. None: it has no such parts.
        variant_of: the benchmark that this one asks in another way; where a run has both, the average counts
            the variant (it is the paper's way).
        answer_problem: what is wrong with a row's answer, in words; empty if nothing is.
        drawing: how Pocket-8 draws its questions; None: it does not.
        adapt: (upstream's configuration as a dict) -> None; changes what upstream's code gets wrong.
    """

    name: str
    title: str
    place: int
    yaml: str
    files: Mapping[str, str]
    columns: Mapping[str, Mapping[str, str]]
    scoring: Scoring
    documents: int
    comparable: bool
    why: str
    upstream_split: str
    repository: str
    images: int | None = None
    unit: str = "%"
    maximum: float = 100
    configs: Mapping[str, str] = field(default_factory=lambda: {"rows": "default"})
    overrides: Mapping[str, object] = field(default_factory=dict)
    group_by: Callable[[Row], object] | None = None
    group_size: int | None = None
    stratum: str | None = None
    strata: tuple[str, ...] = ()
    part: Callable[[Row], object] | None = None
    variant_of: str | None = None
    answer_problem: Callable[[Row], str] = lambda row: ""
    adapt: Callable[[dict], None] = lambda config: None
    drawing: Drawing | None = None

    def group_key(self, row: Row, number: int) -> object:
        """Documents with the same key are scored together and stay together in a slice."""
        return number if self.group_by is None else self.group_by(row)


def yes_or_no(row: Row) -> str:
    """`answer_problem` of yes/no questions."""
    said = row["answer"].lower().strip().replace(".", "")
    return "" if said in ("yes", "no") else f"answer {row['answer']!r} is neither yes nor no"


def read_as(doc_to_text, column: str, absent: object, better: object):
    """Upstream's prompt function, reading one way of writing "there is none" as another."""

    def cleaned(doc, lmms_eval_specific_kwargs=None):
        if doc[column] == absent:
            doc = {**doc, column: better}
        return doc_to_text(doc, lmms_eval_specific_kwargs)

    return cleaned
