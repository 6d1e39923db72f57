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
  python -m harness check RUN --published my_paper.yaml    a run against your own published table

Exit code: 0 all agrees, 1 a check failed, 2 bad input.
"""
BUNDLE = """\
examples:
  python -m harness bundle results/runs/pocket-llava     to results/runs/pocket-llava-bundle
  python -m harness bundle results/runs/my-run --out mine && python -m harness check mine
"""
SUITE = """\
examples:
  python -m harness suite                                  from the committed results/pocket-llava
  python -m harness suite results/runs/pocket-llava BLIND  from runs of yours

Exit code: 0 every point holds, 1 one does not or cannot be told, 2 bad input.
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
            metavar="RUN",
            parser=as_path,
            help="run folders or bundles to check (default: those committed in results/)",
        ),
    ] = None,
    baseline: Annotated[
        Path | None,
        option("--baseline", "run to compare with (default: the committed one)", "DIR", as_path),
    ] = None,
    published: Annotated[
        Path | None,
        option(
            "--published",
            "your own published numbers, in the form of harness/published/table1.yaml (docs/results.md)",
            "FILE",
            as_path,
        ),
    ] = None,
    partial: Annotated[
        bool, flag("--partial", "the run was not meant to have all that the baseline has")
    ] = False,
    everything: Annotated[bool, flag("--all", "print what agrees, too")] = False,
    github: Annotated[bool, flag("--github", "print annotations for GitHub's checks as well")] = False,
) -> int:
    """Published numbers and our own under watch.

    Is a run whole, does every number in its files follow from its answers, and is it as good as the
    committed baseline and as what was published for its backbone? Without a run: the committed ones, and
    whether what was published follows from what was published.
    """
    for folder in [*(folders or []), *([baseline] if baseline else [])]:
        if not folder.is_dir():
            raise UserError(f"{folder} is no run folder; name one that run_all.py has written")
    from harness import check

    return check.run(folders or [], baseline, github, everything, own=published, partial=partial)


@command("bundle", examples=BUNDLE)
def bundle(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN_FOLDER", parser=as_path, help="what run_all.py wrote (--out)")
    ],
    out: Annotated[
        Path | None, option("--out", "for the bundle (default: RUN_FOLDER-bundle)", "DIR", as_path)
    ] = None,
) -> int:
    """Turn a run folder into a handful of files that can be handed over.

    Records, answers, questions without images, the leaderboard, figures: `check` computes all of it anew
    from them, on a CPU, without the model and without the data.
    """
    from harness.store import bundle

    return bundle.run(folder, out)


@command("suite", examples=SUITE)
def suite(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="RUN", parser=as_path, help="run folders or bundles (default: the committed)"),
    ] = None,
) -> int:
    """Whether Pocket-8 can tell good pruning from bad: its acceptance list, point by point."""
    from harness.check import suite

    return suite.run(folders or [])


@command("parity", examples=PARITY)
def parity(
    golden: Annotated[Path, option("--golden", "folder with the recordings", "DIR", as_path)],
) -> int:
    """Check the methods against recordings of the authors' code."""
    if not golden.is_dir():
        raise UserError(f"--golden {golden}: there is no such folder")
    from harness.parity import compare

    return compare.main(golden)
