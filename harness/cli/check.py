"""`check` and `parity`: are numbers as they should be?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harness.cli.command import command
from harness.cli.options import as_path, flag, option
from methods.errors import UserError

CHECK = """\
examples:
  python -m harness check                             everything that is committed in results/
  python -m harness check results/runs/pocket-llava   a run of yours against the committed baseline
  python -m harness check RUN --baseline OTHER_RUN --all

Exit code: 0 all agrees, 1 a check failed, 2 bad input.
"""
PARITY = """\
example:
  python -m harness parity --golden tests/golden

Exit code: 0 all agrees, 1 a method disagrees, 2 bad input.
"""


@command("check", examples=CHECK)
def check(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="RUN_FOLDER", parser=as_path, help="runs to check (default: those committed in results/)"
        ),
    ] = None,
    baseline: Annotated[
        Path | None,
        option("--baseline", "run to compare with (default: the committed one)", "DIR", as_path),
    ] = None,
    everything: Annotated[bool, flag("--all", "print what agrees, too")] = False,
    github: Annotated[bool, flag("--github", "print annotations for GitHub's checks as well")] = False,
) -> int:
    """Published numbers and our own under watch.

    Does what was printed follow from what was printed, do the files of a run agree with each other, and
    is a run as good as the committed baseline and as what was published for its backbone?
    """
    for folder in [*(folders or []), *([baseline] if baseline else [])]:
        if not folder.is_dir():
            raise UserError(f"{folder} is no run folder; name one that run_all.py has written")
    from harness import check

    return check.run(folders or [], baseline, github, everything)


@command("parity", examples=PARITY)
def parity(
    golden: Annotated[Path, option("--golden", "folder with the recordings", "DIR", as_path)],
) -> int:
    """Check the methods against recordings of the authors' code."""
    if not golden.is_dir():
        raise UserError(f"--golden {golden}: there is no such folder")
    from harness.parity import compare

    return compare.main(golden)
