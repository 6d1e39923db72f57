"""Loading the small models that recordings of released code were made on (see `harness.parity.compare`)."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from harness.parity import drawn
from methods.clip_text import TextTower
from methods.errors import UserError


def load_recorded(folder: Path) -> LlavaForConditionalGeneration:
    """A LLaVA model in float32 from `config.json`, `clip_vision.`, `llama.` and `projector.safetensors`.

    The recordings reserve no token id for the image, so the vocabulary gets one more entry, the last one,
    which is `config.image_token_id` and is never generated. Generation ignores the end-of-sequence token.
    Raises UserError if a file is missing or does not fit.
    """
    try:
        told = json.loads((folder / "config.json").read_text())
        weights = {
            name: drawn.read(folder / f"{name}.safetensors") for name in ("clip_vision", "llama", "projector")
        }
    except (OSError, UserError) as error:
        raise UserError(f"no recorded model in {folder}: {error}") from error
    llama = dict(told["llama"])
    image_token = llama["vocab_size"]
    vision = CLIPVisionConfig(**told["clip"])
    text = LlamaConfig(**{**llama, "vocab_size": image_token + 1})
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        vision_feature_layer=told.get("vision_feature_layer", -2),
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
    )
    model = LlavaForConditionalGeneration(config)
    try:
        model.load_state_dict(_state(weights), strict=True)
    except (RuntimeError, KeyError) as error:
        raise UserError(f"the weights in {folder} do not fit their config.json: {error}") from error
    model.generation_config.update(eos_token_id=None, suppress_tokens=[image_token])
    return model.eval()


def load_recorded_qwen(folder: Path) -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL model in float32 from `config.json` and `model.safetensors`, as transformers 4 wrote them.

    Generation ignores the end-of-sequence token. Raises UserError if the files are missing or do not fit.
    """
    if not folder.is_dir():  # transformers would take the path for a name on the hub
        raise UserError(f"no recorded model in {folder}: no such folder")
    try:
        config = Qwen2_5_VLConfig.from_pretrained(folder, local_files_only=True)
        model, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            None,
            config=config,
            state_dict=drawn.read(folder / "model.safetensors"),
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, UserError) as error:
        raise UserError(f"no recorded model in {folder}: {str(error).splitlines()[0]}") from error
    wrong = [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in report[kind]]
    if wrong:
        raise UserError(f"the weights in {folder} do not fit their config.json: {wrong[0]}")
    model.generation_config.update(eos_token_id=None)
    return model.eval()


def load_recorded_text(folder: Path) -> TextTower:
    """CLIP's side of text in float32 from `config.json`, `clip_text.` and `visual_projection.safetensors`.

    Questions come as ids. Raises UserError if a file is missing or does not fit.
    """
    try:
        config = CLIPTextConfig(**json.loads((folder / "config.json").read_text())["clip_text"])
        weights = load_file(folder / "clip_text.safetensors")
        visual = load_file(folder / "visual_projection.safetensors")["weight"]
        text = CLIPTextModelWithProjection(config)
        text.load_state_dict(weights, strict=True)
    except OSError as error:
        raise UserError(f"no recorded text tower in {folder}: {error.strerror or error}") from error
    except (RuntimeError, KeyError) as error:
        raise UserError(f"the text tower in {folder} does not fit its config.json: {error}") from error
    linear = nn.Linear(visual.shape[1], visual.shape[0], bias=False)
    linear.weight.data = visual
    return TextTower(text, linear)


def _state(weights: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Names of transformers 5 (no `vision_model.` level, one projector), embeddings with the image's row."""
    state = {}
    for name, value in weights["clip_vision"].items():
        if not name.endswith("position_ids"):
            state["model.vision_tower." + name.removeprefix("vision_model.")] = value
    for name, value in weights["llama"].items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            value = nn.functional.pad(value, (0, 0, 0, 1))
        if "rotary_emb" not in name:
            inner = name.removeprefix("model.")
            state[name if name == "lm_head.weight" else f"model.language_model.{inner}"] = value
    for name, value in weights["projector"].items():
        layer, kind = name.split(".")
        state[f"model.multi_modal_projector.linear_{1 if layer == '0' else 2}.{kind}"] = value
    return state
