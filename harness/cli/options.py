"""The options that commands share: their types, what they accept, and their help. Defaults stand in the
dataclasses of what is run (`RunConfig`, `TrainOptions`, ...) and are referred to."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from typer import BadParameter, Option

from harness.run.config import Budget, RunConfig, parse_budget
from methods.errors import UserError

#: more than any count that makes sense, and what 32 bits hold
MOST = 2**31 - 1
#: longest text that a language model of the families here takes
LONGEST_TEXT = 131_072

Dtype = Literal["float32", "bfloat16", "float16"]

# ---- what a value may be


def as_text(given: object) -> str:
    """Any text but an empty one."""
    value = str(given)
    if not value.strip():
        raise BadParameter("is empty; give a value, or leave the option out")
    if "\0" in value or any(0xD800 <= ord(c) < 0xE000 for c in value):
        raise BadParameter(f"{value!r} holds bytes that no name has")
    return value


def as_path(given: object) -> Path:
    """A file or folder, not necessarily there."""
    return Path(as_text(given))


def whole(least: int = 1, most: int = MOST) -> Callable[[object], int]:
    """A parser of whole numbers, written in digits."""

    def parse(given: object) -> int:
        value = str(given)
        digits = value.removeprefix("-")
        if not (digits.isascii() and digits.isdigit() and least <= int(value[:20]) <= most):
            limits = f"from {least} to {most:,}" if most < MOST else f"of at least {least}"
            raise BadParameter(f"{value!r} is not a whole number {limits}")
        return int(value)

    return parse


def number(
    least: float = -math.inf, above: float = -math.inf, most: float = math.inf
) -> Callable[[object], float]:
    """A parser of finite numbers of at least `least`, more than `above`, at most `most`."""

    def parse(given: object) -> float:
        try:
            value = float(str(given))
        except ValueError as error:
            raise BadParameter(f"{given!r} is not a number") from error
        if not (math.isfinite(value) and least <= value <= most and value > above):
            limits = [f"at least {least:g}"] * math.isfinite(least) + [
                f"more than {above:g}"
            ] * math.isfinite(above)
            limits += [f"at most {most:g}"] * math.isfinite(most)
            raise BadParameter(
                f"{given} is not a finite number" + (f" of {' and '.join(limits)}" if limits else "")
            )
        return value

    return parse


def one_of(*choices: str) -> Callable[[object], str]:
    """A parser of a few words, for options that take several (typer has no lists of literals)."""

    def parse(given: object) -> str:
        if given not in choices:
            raise BadParameter(f"{given!r} is not one of {', '.join(choices)}")
        return str(given)

    return parse


def as_budget(given: object) -> Budget:
    return parse_budget(str(given))


def as_limit(given: object) -> int | Literal["all"]:
    """A number of documents, or "all"."""
    if given == "all":
        return "all"
    try:
        return whole()(given)
    except BadParameter as error:
        raise BadParameter(f"{given!r}: give a whole number of documents of at least 1, or all") from error


def split_specs(given: object) -> list[str]:
    """`"fastv:k=3,schedule=average,random"` -> `["fastv:k=3,schedule=average", "random"]`.

    A comma separates both methods and parameters: a piece with `=` and no `:` belongs to the method before
    it.
    """
    specs: list[str] = []
    for piece in filter(None, (p.strip() for p in str(given).split(","))):
        if "=" in piece and ":" not in piece:
            if not specs:
                raise UserError(
                    f"--methods {given}: {piece!r} stands before any method; write METHOD:{piece}"
                )
            specs[-1] += ("," if ":" in specs[-1] else ":") + piece
        else:
            specs.append(piece)
    if not specs:
        raise UserError("--methods names no method; --list shows them")
    if "all" in specs and len(specs) > 1:
        raise UserError(
            f"--methods {given}: all stands alone, or name the methods; to run one in two ways, name both"
        )
    return specs


# ---- options; a heading of the help page is a "panel" to typer

WHAT, HOW, WHERE = "what", "how", "where to run"


def option(name: str, help: str, metavar: str | None = None, parser=None, panel: str | None = None, **more):
    """An option as all commands have them. parser: text (or the default's text) -> value."""
    return Option(name, help=help, metavar=metavar, parser=parser, rich_help_panel=panel, **more)


def flag(name: str, help: str, panel: str | None = None):
    """A switch that is off unless it is given."""
    return Option(name, help=help, rich_help_panel=panel)


def count(
    name: str, help: str, panel: str | None = None, least: int = 1, most: int = MOST, metavar: str = "N"
):
    """An option that takes a whole number."""
    return option(name, help, metavar, whole(least, most), panel)


def real(name: str, help: str, panel: str | None = None, metavar: str = "X", **limits: float):
    """An option that takes a finite number."""
    return option(name, help, metavar, number(**limits), panel)


Backbone = Annotated[
    str,
    option(
        "--backbone",
        "name, checkpoint folder, or hub id of a known model family; run --list names them",
        "NAME",
        as_text,
        WHAT,
    ),
]
Budgets = Annotated[
    list[str],
    option(
        "--budget",
        "visual tokens to keep of an image, one or several; below 1: a fraction, as 0.111",
        "N...",
        as_budget,
        WHAT,
    ),
]
Methods = Annotated[
    str,
    option(
        "--methods",
        "all, or comma-separated methods with their parameters: fastv,visionzip or fastv:k=3,random",
        "LIST",
        as_text,
        WHAT,
    ),
]
Data = Annotated[
    Path | None,
    option(
        "--data",
        "folder of parquet files (default: the shipped Pocket-8, drawn on first use)",
        "DIR",
        as_path,
        WHAT,
    ),
]
Seed = Annotated[int, count("--seed", "of everything that is random", WHAT, least=0)]
Match = Annotated[
    Literal["flops"] | None,
    option(
        "--match",
        "flops: beside the table another one (equal_cost.md), in which every method has the budget whose "
        "prefill costs what keeping --budget tokens before the language model does",
        panel=WHAT,
    ),
]
BatchSize = Annotated[int, count("--batch-size", "questions at once; answers do not depend on it", HOW)]
BatchSizes = Annotated[
    list[int], count("--batch-size", "questions at once, one or several sizes", HOW, metavar="N...")
]
Device = Annotated[
    str, option("--device", "cpu, cuda, cuda:1; auto: cuda if there is one", "NAME", as_text, HOW)
]


@dataclass(frozen=True)
class RunOptions:
    """What a person types of a run: the options of `run`, `doctor` and `sweep-bench`."""

    budget: Budgets = RunConfig.budgets
    backbone: Backbone = RunConfig.backbone
    revision: Annotated[
        str | None,
        option(
            "--revision",
            "branch, tag or commit of a hub checkpoint (default: its main)",
            "REV",
            as_text,
            WHAT,
        ),
    ] = None
    methods: Methods = RunConfig.methods[0]
    tasks: Annotated[
        str | None,
        option(
            "--tasks",
            "all, or comma-separated tasks: pope,gqa, on Pocket-8. paper: the benchmarks themselves, in the "
            "columns of the paper's table for the backbone's family; paper:pope,gqa: some of them "
            "(docs/benchmarks.md). Default: Pocket-8 in those columns, or in all eight",
            "LIST",
            as_text,
            WHAT,
        ),
    ] = None
    limit: Annotated[
        str | None,
        option(
            "--limit",
            "about N documents per task, a fixed slice with question groups kept whole; all: every document "
            "(default: the slice named in the table's caption)",
            "N",
            as_limit,
            WHAT,
        ),
    ] = None
    data: Annotated[
        Path | None,
        option(
            "--data",
            "folder of parquet files (default: the shipped Pocket-8, drawn on first use); with --tasks "
            "paper: a mirror of the hub's data sets, DIR/lmms-lab-encoder/POPE/... (default: the Hugging "
            "Face cache)",
            "DIR",
            as_path,
            WHAT,
        ),
    ] = None
    blind: Annotated[
        bool,
        flag(
            "--blind", "replace every image by a grey one: what guessing from the question alone scores", WHAT
        ),
    ] = RunConfig.blind
    seed: Seed = RunConfig.seed
    batch_size: BatchSize = RunConfig.batch_size
    device: Device = "auto"
    dtype: Annotated[
        Dtype | None,
        option(
            "--dtype",
            "of the weights (default float32; with --tasks paper on a GPU bfloat16)",
            panel=HOW,
        ),
    ] = None
    download: Annotated[
        bool,
        flag(
            "--download",
            "get checkpoint and data from the hub where the cache lacks them, saying so first",
            HOW,
        ),
    ] = False
    device_map: Annotated[
        Literal["auto", "balanced", "sequential"] | None,
        option(
            "--device-map", "spread the model over all GPUs (accelerate), in place of one --device", panel=HOW
        ),
    ] = None
    quantize: Annotated[
        Literal["8bit", "4bit"] | None,
        option(
            "--quantize",
            "language model's weights in 8 or 4 bits; needs a GPU and the extra [quantize] (bitsandbytes)",
            panel=HOW,
        ),
    ] = None
    llava_inputs: Annotated[
        Literal["original", "checkpoint"] | None,
        option(
            "--llava-inputs",
            "LLaVA's images and prompts as its own code makes them (padded to squares, its system sentence: "
            "the default with --tasks paper), or as the Hugging Face checkpoint does (the default "
            "otherwise)",
            panel=HOW,
        ),
    ] = None
    min_pixels: Annotated[
        int | None,
        count(
            "--min-pixels",
            "least pixels of an image, for families that take any size (default with --tasks paper: "
            "lmms-eval's 200704, 256 visual tokens; otherwise the checkpoint's)",
            HOW,
        ),
    ] = None
    max_pixels: Annotated[
        int | None,
        count(
            "--max-pixels", "most pixels (default with --tasks paper: lmms-eval's 1605632, 2048 tokens)", HOW
        ),
    ] = None
    max_new_tokens: Annotated[
        int | None,
        count(
            "--max-new-tokens",
            "cap on an answer's length (default: 16 for Pocket-8, 128 with --tasks paper; never above the "
            "task's own limit)",
            HOW,
        ),
    ] = None
    latency_repeats: Annotated[
        int, count("--latency-repeats", "prefills timed for each method and budget", HOW)
    ] = RunConfig.latency_repeats
    out: Annotated[
        Path | None,
        option(
            "--out", "folder for results (default results/runs/BACKBONE[-paper][-blind])", "DIR", as_path, HOW
        ),
    ] = None
    fresh: Annotated[
        bool, flag("--fresh", "compute everything again, replacing earlier results of these cells", HOW)
    ] = RunConfig.fresh
    explore: Annotated[
        int, count("--explore", "questions in the page's explorer, with what each method kept", HOW, least=0)
    ] = RunConfig.explore
    keep_results: Annotated[
        bool,
        flag(
            "--keep-results",
            "re-use finished results although the code behind them has changed; the table marks their rows",
            HOW,
        ),
    ] = RunConfig.keep_results
    match: Match = RunConfig.match
    engine: Annotated[
        Literal["local", "ray"],
        option(
            "--engine",
            "local: here, in one process or in those of a launcher; ray: cells spread over a Ray cluster, "
            "one worker per GPU, or per CPU where there is no GPU (pip install '.[cluster]')",
            panel=WHERE,
        ),
    ] = RunConfig.engine
    address: Annotated[
        str | None,
        option(
            "--address",
            "Ray cluster to use, or auto for the one of this machine (default: a local one for this run)",
            "HOST:PORT",
            as_text,
            WHERE,
        ),
    ] = None
    workers: Annotated[
        int | None, count("--workers", "Ray workers (default: every GPU, or every CPU)", WHERE)
    ] = None
