"""The direction of imports: run_all -> harness -> backbones -> methods, and the rooms of the harness."""

from pathlib import Path

import pytest
from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

ROOT = Path(__file__).resolve().parents[1]


def test_no_import_runs_backwards(capsys, monkeypatch):
    monkeypatch.setattr("logging.config.dictConfig", lambda settings: None)  # it disables all loggers
    status = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True, show_timings=False)
    assert status == EXIT_STATUS_SUCCESS, capsys.readouterr().out


def test_pruner_call_is_the_only_exception():
    """Whoever adds another exception, or leaves one that is no longer needed, is told."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    ignored = {line for contract in contracts for line in contract.get("ignore_imports", ())}
    assert ignored == {"methods.base -> backbones.engine.hooks"}
    assert {c.get("unmatched_ignore_imports_alerting", "error") for c in contracts} == {"error"}
