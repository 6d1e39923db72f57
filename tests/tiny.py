"""The tiny random LLaVA-1.5 of `backbones.random_checkpoint`, by the names that tests use."""

from pathlib import Path

from backbones.families.tiny.llava import (  # noqa: F401
    IMAGE_SIZE,
    LAYERS,
    TEMPLATE,
    VISUAL_TOKENS,
    make_model,
    make_tokenizer,
)
from backbones.random_checkpoint import make


def make_checkpoint(path: Path) -> Path:
    return make("llava-1.5", path)
