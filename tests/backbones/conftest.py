"""Fixtures of the engine's tests; the helpers are in engine_helpers.py, where tests can import them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from engine_helpers import batch, model  # noqa: F401
