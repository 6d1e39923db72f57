"""Log lines on a terminal: which stream they go to, and that progress bars step aside."""

import logging
import sys

import pytest
from tqdm import tqdm

from harness.cli import terminal


@pytest.fixture
def log():
    terminal.attach()
    terminal.attach()  # a second command in the same process
    yield logging.getLogger("harness.run.anything")
    for name in terminal.LOGGERS:
        logging.getLogger(name).removeHandler(terminal.TERMINAL)
        logging.getLogger(name).setLevel(logging.NOTSET)


def test_information_on_stdout_warnings_on_stderr_each_once(log, capsys):
    log.info("two cells")
    log.warning("DAMAGED record")
    log.error("FAILED gqa")
    log.debug("not shown")
    said = capsys.readouterr()
    assert said.out == "two cells\n" and said.err == "DAMAGED record\nFAILED gqa\n"


def test_a_line_does_not_stand_in_the_middle_of_a_bar(log, capsys):
    with tqdm(total=2, file=sys.stderr, desc="cells"):
        log.info("one line")
        said = capsys.readouterr()
    assert said.out == "one line\n"
    assert said.err.count("cells:") == 2, "the bar was cleared, and drawn again below the line"
