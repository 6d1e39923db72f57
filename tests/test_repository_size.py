"""Machines with a GPU take a checkout of at most 64 MiB."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIMIT = 60 * 2**20


def test_tracked_files_are_at_most_60_mib():
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no git checkout here: {error}")
    files = [ROOT / name.decode() for name in listed.split(b"\0") if name]
    assert len(files) > 100, "this is another repository's listing"
    sizes = {file.relative_to(ROOT): file.stat().st_size for file in files if file.is_file()}
    largest = sorted(sizes, key=sizes.get)[:-6:-1]
    assert sum(sizes.values()) <= LIMIT, f"the largest are {', '.join(map(str, largest))}"
