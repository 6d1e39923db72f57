"""A pruner in a package of its own, as the README shows it: installed by pip, found by entry point, run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def readme_example() -> str:
    """The README's complete method, without the decorator that only a file in `methods/` needs."""
    (example,) = re.findall(r"```python\n(# methods/brightest\.py\n.*?)```", README, re.S)
    assert len(example.splitlines()) < 30
    return re.sub(r"@register\n|from methods\.registry import register\n", "", example)


def readme_entry_point() -> str:
    return re.search(r"\[project\.entry-points\.visual_token_pruners\]\n.*\n", README)[0]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder to put on the path, into which pip has installed the example as `my_package`."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    (source / "my_package").mkdir()
    (source / "my_package" / "__init__.py").touch()
    (source / "my_package" / "brightest.py").write_text(readme_example())
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "my-package"\nversion = "1.0"\n' + readme_entry_point()
    )
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-build-isolation", "--no-deps", "--target", site, source], check=True)
    return site


def run_all(site: Path, *arguments) -> str:
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, str(ROOT / "run_all.py"), *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_an_installed_package_takes_part(installed, tmp_path):
    assert re.search(r"^  brightest +Keep the patches", run_all(installed, "--list"), re.M)
    out = tmp_path / "run"
    run_all(
        installed, "--methods", "brightest", "--tasks", "pope", "--limit", 2, "--budget", 40,
        "--latency-repeats", 1, "--out", out,
    )  # fmt: skip
    table = pd.read_csv(out / "leaderboard.csv").set_index("method")
    assert table.loc["brightest", "kept"] == 40
    assert table.loc["brightest", "gflops"] < table.loc["vanilla", "gflops"]
