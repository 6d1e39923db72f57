"""Two runs never write to one folder at once, and a killed one does not keep it."""

import os
import signal
import subprocess
import sys

import pytest

from harness.cli import app
from harness.run.lock import only_run
from methods.errors import UserError

HOLDER = """
import sys, time
from pathlib import Path
from harness.run.lock import only_run
with only_run(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that runs on `tmp_path`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


def test_the_second_run_refuses_with_one_line(holder, tiny_checkpoint, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert app.run_all(["--backbone", str(tiny_checkpoint), "--device", "cpu", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: another run is writing to {tmp_path}; ") and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_killed_run_leaves_no_lock(holder, tmp_path):
    with pytest.raises(UserError, match="another run"), only_run(tmp_path):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with only_run(tmp_path):
        pass
    with only_run(tmp_path):  # and neither does one that ended well
        pass


def test_a_failed_run_leaves_no_lock(tmp_path):
    with pytest.raises(ZeroDivisionError), only_run(tmp_path):
        raise ZeroDivisionError
    with only_run(tmp_path):
        pass
