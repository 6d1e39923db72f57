"""docs/commands.md says what the commands take."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_of_commands_is_up_to_date():
    made = subprocess.run(
        [sys.executable, "-m", "harness.cli.reference"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert page == made, "run: COLUMNS=100 python -m harness.cli.reference > docs/commands.md"
