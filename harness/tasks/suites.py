"""Which benchmarks a run asks, and where their data comes from: Pocket-8 or the benchmarks themselves."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from harness.tasks import benchmarks
from harness.tasks.benchmark import Benchmark
from methods.errors import UserError

if TYPE_CHECKING:
    from backbones.families.family import Family

#: by name, in the order of the columns
BENCHMARKS: dict[str, Benchmark] = benchmarks.load()
#: the paper's eight columns; the others are variants of one of them
EIGHT = tuple(name for name, b in BENCHMARKS.items() if b.variant_of is None)


@dataclass(frozen=True)
class Suite:
    """Where the data files come from. `split` is the one in their names; None: each benchmark's own split, in
    the data sets as they are on the hub (`harness.tasks.sources`).

    `max_new_tokens` caps the task's own limit (None: no cap): pocket answers are a word or a letter, and a
    model that has lost the image must not babble for upstream's 1,024 tokens. `default_limit` is the slice
    that a run takes unless it is told otherwise (`--limit all` takes everything), `default_limits` the same
    for single benchmarks.
    """

    name: str
    title: str
    split: str | None
    max_new_tokens: int | None
    synthetic: bool
    default_limit: int | None
    default_limits: Mapping[str, int] = field(default_factory=dict)


POCKET8 = Suite("pocket8", "Pocket-8 (drawn scenes, held-out split)", "eval", 16, True, 40)
#: 10,000 of VQAv2's 214,354 questions give its score to about 0.8 points (95 %)
#: 128 tokens: real answers are a word, a letter or a short phrase, so it cuts babble alone (MMBench's own
#: limit is 1,024)
PAPER = Suite("paper", "the benchmarks themselves", None, 128, False, None, {"vqav2": 10_000})


def parse_suite(text: str) -> tuple[Suite, str]:
    """`--tasks` -> the suite and the names within it: "paper" alone is the columns of the backbone's table,
    "paper:LIST" some of them; without the word, Pocket-8's files or others in its layout."""
    suite, colon, names = text.strip().partition(":")
    if suite.strip() != PAPER.name:
        return POCKET8, text
    return PAPER, names if colon else PAPER.name


def paper_columns(family: Family) -> list[Benchmark]:
    """The paper's benchmarks for a model family, which a run takes unless it is told otherwise. Raises
    UserError for a family that the paper has no table of."""
    if family.paper_columns is None:
        raise UserError(
            f"--tasks paper: the paper has no table of {family.title}; name tasks: --tasks paper:gqa,pope"
        )
    return [b for b in BENCHMARKS.values() if family.paper_columns == "all" or b.name in family.paper_columns]


def pocket_columns(family: Family) -> list[Benchmark]:
    """Pocket-8's tasks in the paper's columns for a model family; all eight for one without a table."""
    columns = EIGHT if family.paper_columns in (None, "all") else family.paper_columns
    return [BENCHMARKS[name] for name in EIGHT if name in columns]


def parse_tasks(text: str) -> list[Benchmark]:
    """`"all"` (the eight) or comma-separated names -> benchmarks in the table's order. UserError names the
    known ones."""
    names = [n.strip() for n in text.split(",") if n.strip()]
    if names == ["all"]:
        names = list(EIGHT)
    if alone := next((n for n in ("all", "paper") if n in names), None):
        how = "paper:LIST, or " if alone == "paper" else ""
        raise UserError(f"--tasks {text}: {alone} stands alone; give {how}the tasks by name, without it")
    unknown = [n for n in names if n not in BENCHMARKS]
    if unknown or not names:
        what = ", ".join(unknown) or "(none given)"
        raise UserError(f"unknown task {what}; known tasks: all, paper, {', '.join(BENCHMARKS)}")
    return [b for b in BENCHMARKS.values() if b.name in names]


def averaged(names: Collection[str]) -> list[str]:
    """Those that the average counts: one way of asking each benchmark."""
    asked_otherwise = {BENCHMARKS[n].variant_of for n in names}
    return [n for n in names if n not in asked_otherwise]
