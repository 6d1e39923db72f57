"""What a command sets in its environment before torch is imported."""

import os
import subprocess
import sys

import pytest

CODE = """
import os, sys
from harness.cli import app
assert app.main(["--version"]) == 0 and "torch" not in sys.modules
print(os.environ.get("GOMP_SPINCOUNT"), os.environ.get("OMP_WAIT_POLICY"))
"""


@pytest.mark.parametrize(
    ("given", "set_to"),
    [
        ({}, "2000 None"),
        ({"OMP_WAIT_POLICY": "active"}, "None active"),
        ({"GOMP_SPINCOUNT": "5"}, "5 None"),
        ({"KMP_BLOCKTIME": "0"}, "None None"),
    ],
)
def test_waiting_threads_leave_the_processor_to_others_unless_the_user_says_otherwise(given, set_to):
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
    bare = {k: v for k, v in os.environ.items() if k not in names}
    done = subprocess.run([sys.executable, "-c", CODE], env=bare | given, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == set_to, done.stderr
