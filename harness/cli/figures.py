"""`overlay` and `adaptive`: pictures of what methods keep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harness.cli.command import command
from harness.cli.options import (
    Backbone,
    Device,
    Methods,
    as_budget,
    as_path,
    as_text,
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
