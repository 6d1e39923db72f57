"""The eight benchmarks: which upstream lmms-eval task serves each, what we override, how its number is read.

This module imports nothing heavy, so that `run_all.py --list` and `--help` answer at once. The lmms-eval side
(building task objects) is `harness.tasks.lmms`, the arithmetic of the scores is `harness.tasks.scoring`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from methods.errors import UserError


@dataclass(frozen=True)
class Benchmark:
    """One benchmark of the paper's tables.

    `yaml` is the upstream task below `lmms_eval/tasks`; `files` are the parquet files below the data root, by
    role (`{split}` is filled in), where the role "rows" is the questions and "images" GQA's separate image
    table. `scoring` names the entry of `harness.tasks.scoring`. `overrides` are merged into the upstream
    YAML (one level deep). `group_by` is the column whose equal values must stay together in a slice (MME:
    the two questions of an image; MMBench: the rotations of a question, see `group_key`). `stratum` is the
    column over which a slice is spread evenly. `comparable` says whether the score can stand beside the
    paper's, `why` says why not. `repository` is the data set's name on the hub, `configs` its configuration
    by role. `variant_of` names the benchmark that this one asks in another way; where a run has both, the
    average counts the variant (it is the paper's way).
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
    repository: str
    configs: Mapping[str, str] = field(default_factory=lambda: {"rows": "default"})
    overrides: Mapping[str, object] = field(default_factory=dict)
    group_by: str | None = None
    stratum: str | None = None
    variant_of: str | None = None

    def group_key(self, row: Mapping[str, object], number: int) -> object:
        """Documents with the same key are scored together and stay together in a slice."""
        if self.group_by is None:
            return number
        if self.group_by == "index":  # MMBench: index, index + 1e6, ... are rotations of one question
            return int(row["index"]) % 1_000_000
        return row[self.group_by]


def _rows(folder: str) -> dict[str, str]:
    return {"rows": f"{folder}/{{split}}.parquet"}


_SINGLE_WORD = "\nAnswer the question using a single word or phrase."

BENCHMARKS: dict[str, Benchmark] = {
    b.name: b
    for b in (
        Benchmark(
            "gqa", "GQA", "gqa/gqa.yaml",
            {"rows": "gqa/{split}_instructions.parquet", "images": "gqa/{split}_images.parquet"},
            "exact_match", "%", True, "testdev_balanced, exact match", "testdev", "GQA",
            {"rows": "testdev_balanced_instructions", "images": "testdev_balanced_images"},
        ),
        Benchmark(
            "mmbench_en", "MMB", "mmbench/mmbench_en_dev_static.yaml", _rows("mmbench_en"), "mmbench", "%",
            False, "answers are read by rules only (no GPT), where the papers used the OpenCompass server "
            "and LLaVA's own prompt", "dev", "MMBench", {"rows": "en"}, group_by="index", stratum="category",
        ),
        Benchmark(
            "mmbench_cn", "MMB-CN", "mmbench/mmbench_cn_dev.yaml", _rows("mmbench_cn"), "mmbench", "%",
            False, "as MMB, and the option header of the prompt is English upstream", "dev",
            "MMBench", {"rows": "cn"}, group_by="index", stratum="category",
        ),
        Benchmark(
            "mme", "MME", "mme/mme.yaml", _rows("mme"), "mme", "points",
            True, "perception + cognition, in points", "test", "MME",
            group_by="question_id", stratum="category",
        ),
        Benchmark(
            "pope", "POPE", "pope/pope.yaml", _rows("pope"), "pope", "%",
            True, "mean of the F1 of the adversarial, popular and random part", "test", "POPE",
            stratum="category",
        ),
        Benchmark(
            "scienceqa", "SQA", "scienceqa/scienceqa_img.yaml", _rows("scienceqa"), "exact_match", "%",
            True, "image subset, accuracy", "test", "ScienceQA", {"rows": "ScienceQA-IMG"},
        ),
        Benchmark(
            "vqav2", "VQAv2", "vqav2/vqav2_val.yaml", _rows("vqav2"), "exact_match", "%",
            False, "validation split, where the paper's number is test-dev from the evaluation server",
            "validation", "VQAv2",
        ),
        Benchmark(
            "textvqa", "TextVQA", "textvqa/textvqa_val.yaml", _rows("textvqa"), "exact_match", "%",
            False, "prompt without OCR tokens, which the paper's number has", "validation",
            "textvqa",
        ),
        Benchmark(
            "textvqa_ocr", "TextVQA+OCR", "textvqa/textvqa_val.yaml", _rows("textvqa"), "exact_match", "%",
            True, "validation split, the data set's OCR tokens in the prompt", "validation", "textvqa",
            overrides={
                "lmms_eval_specific_kwargs": {
                    "default": {"pre_prompt": "", "post_prompt": _SINGLE_WORD, "ocr": True}
                }
            },
            variant_of="textvqa",
        ),
    )
}  # fmt: skip


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
PAPER = Suite("paper", "the benchmarks themselves", None, None, False, None, {"vqav2": 10_000})

#: the paper's columns by model family, which a run takes unless it is told otherwise: those of Table 1
#: (TextVQA both ways) and of Table 2, whose last one is "VQA" with a mark that our copy has lost; 84.8 for
#: the unpruned model fits TextVQA without OCR tokens
PAPER_COLUMNS = {
    "llava": tuple(BENCHMARKS),
    "qwen2_5_vl": ("mmbench_en", "mme", "pope", "scienceqa", "textvqa"),
}


def parse_suite(text: str) -> tuple[Suite, str]:
    """`--tasks` -> the suite and the names within it: "paper" alone is the columns of the backbone's table,
    "paper:LIST" some of them; without the word, Pocket-8's files or others in its layout."""
    suite, colon, names = text.strip().partition(":")
    if suite.strip() != PAPER.name:
        return POCKET8, text
    return PAPER, names if colon else PAPER.name


def paper_columns(family: str) -> list[Benchmark]:
    """The paper's benchmarks for a model family. Raises UserError for one that it has no table of."""
    if family not in PAPER_COLUMNS:
        raise UserError(
            f"--tasks paper: the paper has no table of family {family!r}; name tasks: --tasks paper:gqa,pope"
        )
    return [BENCHMARKS[name] for name in PAPER_COLUMNS[family]]


def pocket_columns(family: str) -> list[Benchmark]:
    """Pocket-8's tasks in the paper's columns for a model family; all eight for one without a table."""
    return [BENCHMARKS[name] for name in EIGHT if name in PAPER_COLUMNS.get(family, EIGHT)]


def parse_tasks(text: str) -> list[Benchmark]:
    """`"all"` (the eight) or comma-separated names -> benchmarks in the table's order. UserError names the
    known ones."""
    names = [n.strip() for n in text.split(",") if n.strip()]
    if names == ["all"]:
        names = list(EIGHT)
    unknown = [n for n in names if n not in BENCHMARKS]
    if unknown or not names:
        what = ", ".join(unknown) or "(none given)"
        raise UserError(f"unknown task {what}; known tasks: all, paper, {', '.join(BENCHMARKS)}")
    return [b for b in BENCHMARKS.values() if b.name in names]


def averaged(names: Collection[str]) -> list[str]:
    """Those that the average counts: one way of asking each benchmark."""
    asked_otherwise = {BENCHMARKS[n].variant_of for n in names}
    return [n for n in names if n not in asked_otherwise]
