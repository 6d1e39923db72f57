"""The direction of imports: run_all -> harness -> backbones -> methods, and the rooms of the harness."""

from pathlib import Path

from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

ROOT = Path(__file__).resolve().parents[1]


def test_no_import_runs_backwards(capsys, monkeypatch):
    monkeypatch.setattr("logging.config.dictConfig", lambda settings: None)  # it disables all loggers
    status = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True, show_timings=False)
    assert status == EXIT_STATUS_SUCCESS, capsys.readouterr().out
