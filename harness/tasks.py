"""The eight benchmarks: which upstream lmms-eval task serves each, what we override, how its number is read.

This module imports nothing heavy, so that `run_all.py --list` and `--help` answer at once. The lmms-eval side
(building task objects) is `harness.lmms_tasks`, the arithmetic of the scores is `harness.scoring`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from harness.errors import UserError


@dataclass(frozen=True)
class Benchmark:
    """One benchmark of the paper's tables.

    `yaml` is the upstream task below `lmms_eval/tasks`; `files` are the parquet files below the data root, by
    role (`{split}` is filled in), where the role "rows" is the questions and "images" GQA's separate image
    table. `scoring` names the entry of `harness.scoring`. `overrides` are merged into the upstream YAML (one
    level deep). `group_by` is the column whose equal values must stay together in a slice (MME: the two
    questions of an image; MMBench: the rotations of a question, see `group_key`). `stratum` is the column
    over which a slice is spread evenly. `comparable` says whether the score can stand beside the paper's,
    `why` says why not.
    """

    name: str
    title: str
    yaml: str
    files: Mapping[str, str]
    scoring: str
    unit: str
    comparable: bool
    why: str
    upstream_split: str
    overrides: Mapping[str, object] = field(default_factory=dict)
    group_by: str | None = None
    stratum: str | None = None

    def group_key(self, row: Mapping[str, object], number: int) -> object:
        """Documents with the same key are scored together and stay together in a slice."""
        if self.group_by is None:
            return number
        if self.group_by == "index":  # MMBench: index, index + 1e6, ... are rotations of one question
            return int(row["index"]) % 1_000_000
        return row[self.group_by]


def _rows(folder: str) -> dict[str, str]:
    return {"rows": f"{folder}/{{split}}.parquet"}


BENCHMARKS: dict[str, Benchmark] = {
    b.name: b
    for b in (
        Benchmark(
            "gqa", "GQA", "gqa/gqa.yaml",
            {"rows": "gqa/{split}_instructions.parquet", "images": "gqa/{split}_images.parquet"},
            "exact_match", "%", True, "testdev_balanced, exact match", "testdev",
        ),
        Benchmark(
            "mmbench_en", "MMB", "mmbench/mmbench_en_dev_static.yaml", _rows("mmbench_en"), "mmbench", "%",
            False, "answers are read by rules only (no GPT); the papers used the OpenCompass server and "
            "LLaVA's own prompt", "dev", group_by="index", stratum="category",
        ),
        Benchmark(
            "mmbench_cn", "MMB-CN", "mmbench/mmbench_cn_dev.yaml", _rows("mmbench_cn"), "mmbench", "%",
            False, "as MMB, and the option header of the prompt is English upstream", "dev",
            group_by="index", stratum="category",
        ),
        Benchmark(
            "mme", "MME", "mme/mme.yaml", _rows("mme"), "mme", "points",
            True, "perception + cognition, in points", "test", group_by="question_id", stratum="category",
        ),
        Benchmark(
            "pope", "POPE", "pope/pope.yaml", _rows("pope"), "pope", "%",
            True, "mean of the F1 of the adversarial, popular and random part", "test", stratum="category",
        ),
        Benchmark(
            "scienceqa", "SQA", "scienceqa/scienceqa_img.yaml", _rows("scienceqa"), "exact_match", "%",
            True, "image subset, accuracy", "test",
        ),
        Benchmark(
            "vqav2", "VQAv2", "vqav2/vqav2_val.yaml", _rows("vqav2"), "exact_match", "%",
            False, "validation split; the paper's number is test-dev from the evaluation server",
            "validation",
        ),
        Benchmark(
            "textvqa", "TextVQA", "textvqa/textvqa_val.yaml", _rows("textvqa"), "exact_match", "%",
            False, "prompt without OCR tokens; the paper's number has them in the prompt", "validation",
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Suite:
    """A set of data files in the eight schemas.

    `max_new_tokens` caps the task's own limit: pocket answers are a word or a letter, and a model that has
    lost the image must not babble for upstream's 1,024 tokens. `default_limit` is the slice that a run takes
    unless it is told otherwise (`--limit all` takes everything).
    """

    name: str
    title: str
    split: str
    max_new_tokens: int
    synthetic: bool
    default_limit: int | None


POCKET8 = Suite("pocket8", "Pocket-8 (drawn scenes, held-out split)", "eval", 16, True, 40)


def parse_tasks(text: str) -> list[Benchmark]:
    """`"all"` or comma-separated names -> benchmarks in the table's order. UserError names the known ones."""
    names = [n.strip() for n in text.split(",") if n.strip()]
    if names == ["all"]:
        return list(BENCHMARKS.values())
    unknown = [n for n in names if n not in BENCHMARKS]
    if unknown or not names:
        what = ", ".join(unknown) or "(none given)"
        raise UserError(f"unknown task {what}; known tasks: all, {', '.join(BENCHMARKS)}")
    return [b for b in BENCHMARKS.values() if b.name in names]
