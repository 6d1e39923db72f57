"""Where log lines go when a person runs a command: plain lines, around progress bars."""

from __future__ import annotations

import logging
import sys

#: the packages whose log lines are shown
LOGGERS = ("harness", "backbones", "methods")


class Terminal(logging.Handler):
    """Information on standard output, warnings and errors on standard error, each line as it is. A progress
    bar that is on the screen steps aside."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        bars = sys.modules.get("tqdm")  # nobody draws bars before it is imported
        if bars is None:
            print(self.format(record), file=stream, flush=True)
        else:
            bars.tqdm.write(self.format(record), file=stream)
            stream.flush()


TERMINAL = Terminal()


def attach() -> None:
    """Show the log lines of this program from here on."""
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        if TERMINAL not in logger.handlers:
            logger.addHandler(TERMINAL)
