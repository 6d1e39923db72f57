"""Load a checkpoint with options: several devices, quantised weights, image and prompt conventions."""

from __future__ import annotations

import importlib.util
import logging

import torch

from backbones.backbone import Backbone
from backbones.hub import find as finding
from backbones.hub import integrity
from backbones.hub.options import LoadOptions
from methods.errors import UserError

_OFFLINE = {"local_files_only": True, "trust_remote_code": False}


def load(
    name: str,
    options: LoadOptions | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> Backbone:
    """See `backbones.load`."""
    options = options or LoadOptions()
    kind = getattr(torch, dtype, None)
    if kind not in (torch.float32, torch.bfloat16, torch.float16):
        raise UserError(f"dtype {dtype!r} is unknown; use float32, bfloat16 or float16")
    found = finding.find(name, options.revision, options.download)
    backbone = Backbone(
        found.name,
        _model(found, options, device, kind),
        _processor(found),
        found.folder,
        facts=_facts(found, options),
    )
    _check_image_token(backbone)
    # an unsupported family shows here, before any work is done
    backbone.facts |= backbone.family.prepare(backbone.name, backbone.processor, options)
    return backbone


def _model(
    found: finding.FoundCheckpoint, options: LoadOptions, device: str, dtype: torch.dtype
) -> torch.nn.Module:
    """The whole model in evaluation mode: on one device, or, by accelerate as it is read, over several or
    quantised."""
    from transformers import AutoModelForImageTextToText

    placed: dict[str, object] = {}
    if options.device_map or options.quantize:
        placed["device_map"] = options.device_map or {"": device}
    if options.quantize:
        left = found.family.not_quantised
        placed["quantization_config"] = _quantization(options.quantize, dtype, list(left))
    with integrity.one_line(found.name), integrity.quietly():
        model, info = AutoModelForImageTextToText.from_pretrained(
            found.folder,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are told, not raised: `check_tensors` refuses them
            **_OFFLINE,
            **placed,
        )
        integrity.check_tensors(found.name, model, info)
        if not placed:
            model = model.to(device)
    integrity.check_finite(found.name, model, found.folder)
    return model.eval()


def _check_image_token(backbone: Backbone) -> None:
    """Raises UserError unless processor and model mean the same token by an image's place."""
    processor, there = backbone.processor, getattr(backbone.model.config, "image_token_id", None)
    token = getattr(processor, "image_token", None)
    here = processor.tokenizer.convert_tokens_to_ids(token) if token else None
    if None not in (here, there) and here != there:
        raise UserError(
            f"checkpoint {backbone.name}: {token} is token {here} of its tokenizer, config.json says "
            f"{there}; restore both, they do not belong together"
        )


def _processor(found: finding.FoundCheckpoint):
    from transformers import AutoProcessor

    with integrity.one_line(found.name, "the processor of checkpoint"):
        return AutoProcessor.from_pretrained(found.folder, **_OFFLINE)


def _facts(found: finding.FoundCheckpoint, options: LoadOptions) -> dict[str, object]:
    facts: dict[str, object] = {}
    if found.repo or found.revision:
        facts |= {"repository": found.repo, "revision": found.revision}
    if options.quantize:
        facts["quantized"] = options.quantize
    return facts


def _quantization(kind: str, dtype: torch.dtype, left: list[str]):
    """bitsandbytes' configuration.

    Args:
        kind: 4bit or 8bit.
        dtype: that products are computed in.
        left: modules that keep their dtype.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"--quantize {kind} needs bitsandbytes: pip install 'visual-token-pruning-bench[quantize]'"
        )
    from transformers import BitsAndBytesConfig

    # it says at every call that 8-bit products are in float16
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=left)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=left,
    )
