"""Where log lines go when a person runs a command: plain lines, around progress bars."""

from __future__ import annotations

import logging
import sys
import textwrap

#: the packages whose log lines are shown
LOGGERS = ("harness", "backbones", "methods")


#: columns of a help page, and of what the packages in SENTENCES tell; what others tell may hold tables
WIDTH, SENTENCES = 100, ("harness.run", "harness.store")


class Terminal(logging.Handler):
    """Information on standard output, warnings and errors on standard error, each line as it is. A progress
    bar that is on the screen steps aside."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno >= logging.WARNING or not record.name.startswith(SENTENCES):
            return text
        return "\n".join(line if len(line) <= WIDTH else _broken(line) for line in text.split("\n"))

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        bars = sys.modules.get("tqdm")  # nobody draws bars before it is imported
        if bars is None:
            print(self.format(record), file=stream, flush=True)
        else:
            bars.tqdm.write(self.format(record), file=stream)
            stream.flush()


def _broken(line: str) -> str:
    """The line in several, indented from the second on. A long word, such as a path that someone copies,
    stays whole."""
    indent = line[: len(line) - len(line.lstrip())] + "  "
    return textwrap.fill(
        line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


TERMINAL = Terminal()


def attach() -> None:
    """Show the log lines of this program from here on."""
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        if TERMINAL not in logger.handlers:
            logger.addHandler(TERMINAL)
