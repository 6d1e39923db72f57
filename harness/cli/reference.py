"""docs/commands.md, made from the commands themselves by `python -m harness.cli.reference`."""

from __future__ import annotations

import contextlib
import io

HEAD = """\
# Commands

`python run_all.py` and `python -m harness run` are the same command; the others are tools around it. The
console script `visual-token-pruning-bench` is `python -m harness`. An option that takes several values takes
them behind one option (`--budget 192 128 64`) or with the option said again (`--budget 192 --budget 128`).
Bad input is one line on standard error and exit code 2; Ctrl-C is 130. Lines about the run are on standard
output, warnings and errors on standard error.

This page is what `--help` says: `COLUMNS=100 python -m harness.cli.reference > docs/commands.md` (a test
compares).
"""


def text() -> str:
    """The whole page."""
    from harness.cli.app import main, parser

    pages = [HEAD]
    for name in ("", *parser().commands):
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            main([*filter(None, [name]), "--help"])
        title = f"## {name}\n\n" if name else ""
        pages.append(f"{title}```\n{said.getvalue().rstrip()}\n```\n")
    return "\n".join(pages)


if __name__ == "__main__":
    print(text(), end="")
