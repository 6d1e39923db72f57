"""Machines with a GPU take a checkout of at most 64 MiB; `results/` holds bundles, not runs."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIMIT = 60 * 2**20


def tracked() -> list[Path]:
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no git checkout here: {error}")
    files = [Path(name.decode()) for name in listed.split(b"\0") if name]
    assert len(files) > 100, "this is another repository's listing"
    return files


def test_tracked_files_are_at_most_60_mib():
    sizes = {file: (ROOT / file).stat().st_size for file in tracked() if (ROOT / file).is_file()}
    largest = sorted(sizes, key=sizes.get)[:-6:-1]
    assert sum(sizes.values()) <= LIMIT, f"the largest are {', '.join(map(str, largest))}"


def test_results_are_fewer_than_120_files():
    found = [file for file in tracked() if file.parts[0] == "results"]
    assert len(found) < 120, "a run worth keeping goes in as a bundle: python -m harness bundle RUN"
