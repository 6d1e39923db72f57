"""Reading the small models that recordings of released code were made on (see `harness.parity.compare`)."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from backbones.families.tiny import llava, qwen
from harness.parity import drawn
from methods.clip_text import TextTower
from methods.errors import UserError


def load_recorded(folder: Path, form: str = "llava") -> nn.Module:
    """A recorded model in float32 that ignores the end-of-sequence token.

    Args:
        folder: `config.json`, and the weights: `clip_vision.`, `llama.` and `projector.safetensors`, or
            `model.safetensors` for Qwen2.5-VL.
        form: llava or qwen.

    Raises:
        UserError: a file is missing or does not fit.
    """
    if not folder.is_dir():
        raise UserError(f"no recorded model in {folder}: no such folder")
    module = {"llava": llava, "qwen": qwen}[form]
    try:
        told = json.loads((folder / "config.json").read_text())
        weights = {name: drawn.read(folder / f"{name}.safetensors") for name in module.RECORDED_FILES}
    except (OSError, UserError) as error:
        raise UserError(f"no recorded model in {folder}: {error}") from error
    try:
        return module.recorded(told, weights)
    except (RuntimeError, KeyError, ValueError) as error:
        raise UserError(f"the weights in {folder} do not fit their config.json: {error}") from error


def load_recorded_text(folder: Path) -> TextTower:
    """CLIP's side of text in float32 from `config.json`, `clip_text.` and `visual_projection.safetensors`.

    Questions come as ids. Raises UserError if a file is missing or does not fit.
    """
    try:
        config = CLIPTextConfig(**json.loads((folder / "config.json").read_text())["clip_text"])
        weights = drawn.read(folder / "clip_text.safetensors")
        visual = drawn.read(folder / "visual_projection.safetensors")["weight"]
        text = CLIPTextModelWithProjection(config)
        text.load_state_dict(weights, strict=True)
    except (OSError, UserError) as error:
        raise UserError(f"no recorded text tower in {folder}: {error}") from error
    except (RuntimeError, KeyError) as error:
        raise UserError(f"the text tower in {folder} does not fit its config.json: {error}") from error
    linear = nn.Linear(visual.shape[1], visual.shape[0], bias=False)
    linear.weight.data = visual
    return TextTower(text, linear)
