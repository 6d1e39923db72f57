"""The command lines: `run_all.py`, `python -m harness` and the console script. Nothing heavy is imported
before the arguments are read."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import typer

from harness.cli import check, doctor, efficiency, figures, policies, run
from harness.cli.command import app, invoke

#: the modules that declare commands, in the order of the help page
GROUPS = (run, doctor, check, efficiency, figures, policies)


app.registered_commands.sort(key=lambda c: [g.__name__ for g in GROUPS].index(c.callback.__module__))


@app.callback()
def tools(version: run.Version = False) -> None:
    pass


@functools.cache
def parser():
    """All commands; their parsers by name in `.commands`."""
    return typer.main.get_command(app)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m harness COMMAND`: `run` is run_all.py, the others are tools around it. The exit code."""
    return invoke(parser(), arguments, "python -m harness")


def run_all(arguments: Sequence[str] | None = None) -> int:
    """The command behind run_all.py. Returns the exit code."""
    return invoke(parser().commands["run"], arguments, "run_all.py")
