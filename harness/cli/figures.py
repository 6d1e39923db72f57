"""`overlay`, `adaptive` and `policy`: what methods keep, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from harness.cli.command import command
from harness.cli.options import (
    HOW,
    WHAT,
    Backbone,
    BatchSize,
    Data,
    Device,
    Methods,
    as_budget,
    as_path,
    as_text,
    count,
    flag,
    option,
    split_specs,
)
from harness.run.config import RunConfig
from methods.errors import UserError

OVERLAY = """\
examples:
  python -m harness overlay                            two drawn scenes, three methods at 64 tokens
  python -m harness overlay --images dog.jpg cat.jpg --question "What is on the grass?" \\
      --backbone llava-1.5-7b --methods fastv,visionzip --budget 64 --device cuda
"""
ADAPTIVE = """\
example:
  python -m harness adaptive results/runs/pocket-llava --method stepprune
"""


POLICY = """\
examples:
  python -m harness policy    the shipped StepPrune policy for 64 tokens
  python -m harness policy --backbone pocket-qwen --budget 48 --json > policy.json
  python -m harness policy --method stepprune:checkpoint=k64.safetensors --limit 20
"""


@command("overlay", examples=OVERLAY)
def overlay(
    backbone: Backbone = RunConfig.backbone,
    methods: Methods = "stepprune,visionzip,fastv",
    budget: Annotated[
        str, option("--budget", "visual tokens to keep; below 1: a fraction, as 0.111", "N", as_budget)
    ] = str(RunConfig.budgets[0]),
    images: Annotated[
        list[Path] | None,
        option("--images", "image files, one or several (default: two drawn scenes)", "FILE...", as_path),
    ] = None,
    question: Annotated[
        str | None, option("--question", "asked about every image; needed with --images", "TEXT", as_text)
    ] = None,
    device: Device = "cpu",
    out: Annotated[Path, option("--out", "picture to write", "FILE", as_path)] = Path("overlay.png"),
) -> int:
    """Draw what methods keep of an image, over the image.

    One row per image, one column per method, with the method's answer.
    """
    if images and question is None:
        raise UserError("--images needs --question, what is asked about them")
    specs = split_specs(methods)
    from harness.report import overlay
    from harness.run.device import resolve

    return overlay.run(backbone, specs, budget, out, images or [], question, resolve(device))


@command("adaptive", examples=ADAPTIVE)
def adaptive(
    folder: Annotated[
        Path,
        typer.Argument(metavar="RUN_FOLDER", parser=as_path, help="a run or bundle with the method's cells"),
    ],
    method: Annotated[str, option("--method", "as the run named it", "SPEC", as_text)] = "stepprune",
    data: Annotated[
        Path | None, option("--data", "what the run was asked, if not the shipped Pocket-8", "DIR", as_path)
    ] = None,
    out: Annotated[
        Path | None,
        option(
            "--out",
            "for the report (default: the run, or beside results/runs)",
            "DIR",
            as_path,
        ),
    ] = None,
) -> int:
    """What a method that chooses its own number of tokens spends them on (Fig. 4)."""
    from harness.report import adaptive

    return adaptive.run(folder, method, data, out)


@command("policy", examples=POLICY)
def policy(
    method: Annotated[
        str,
        option("--method", "with its checkpoint, if it is none of those shipped", "SPEC", as_text, WHAT),
    ] = "stepprune",
    backbone: Backbone = RunConfig.backbone,
    budget: Annotated[
        str | None,
        option(
            "--budget", "mean tokens wanted (default: what the checkpoint is for; 64)", "N", as_budget, WHAT
        ),
    ] = None,
    tasks: Annotated[
        str, option("--tasks", "of Pocket-8: all, or comma-separated", "LIST", as_text, WHAT)
    ] = "all",
    limit: Annotated[
        int | None, count("--limit", "about so many questions of each task (default: all)", WHAT)
    ] = None,
    data: Data = None,
    split: Annotated[
        Literal["calibration", "eval"],
        option("--split", "of the data; no training sees either", panel=WHAT),
    ] = "calibration",
    batch_size: BatchSize = RunConfig.batch_size,
    device: Device = "auto",
    as_json: Annotated[bool, flag("--json", "print JSON, for programs and for `suite`", HOW)] = False,
) -> int:
    """What a learned method does with the question, and with its steps.

    It answers held-out questions as it is, with the words that it reads blanked or another question's, and,
    if it takes tokens step by step, with as many tokens chosen in its first step, by steps told of wrong
    tokens, and by the policy before training. Printed: what each costs, how much the choices for two
    questions on one image overlap, how much of the evidence is kept, and what the number of tokens follows.
    """
    from harness.report import policy
    from harness.run.device import resolve
    from harness.tasks.suites import parse_tasks

    options = policy.PolicyOptions(
        benchmarks=tuple(parse_tasks(tasks)),
        method=method,
        backbone=backbone,
        budget=budget,
        data=data,
        split=split,
        limit=limit,
        batch_size=batch_size,
        device=resolve(device),
    )
    return policy.run(options, as_json)
