"""The tiny random Qwen2.5-VL of `backbones.random_checkpoint`, by the names that tests use."""

from pathlib import Path

from backbones.families.tiny.qwen import (  # noqa: F401
    LAYERS,
    MAX_TOKENS,
    MIN_TOKENS,
    UNIT,
    make_model,
    make_tokenizer,
)
from backbones.random_checkpoint import make


def make_checkpoint(path: Path) -> Path:
    return make("qwen2.5-vl", path)
