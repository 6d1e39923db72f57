"""Load a checkpoint with options: several devices, quantised weights, image and prompt conventions."""

from __future__ import annotations

import importlib.util
import json
import logging

import torch

from backbones.backbone import Backbone
from backbones.hub import find as finding
from backbones.hub import integrity
from backbones.hub.options import LoadOptions
from methods.errors import UserError

#: LLaVA's own code (arXiv 2310.03744; conversation template vicuna_v1) puts this ahead of the first turn
SYSTEM_SENTENCE = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
#: parts that stay in the run's dtype: methods read the tower, and quantising these saves next to nothing
_NOT_QUANTISED = ["model.vision_tower", "model.multi_modal_projector", "model.visual", "lm_head"]
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
    backbone.family  # noqa: B018  an unsupported family shows here, before any work is done
    backbone.facts |= _prepare(backbone, options)
    return backbone


def _model(found: finding.Found, options: LoadOptions, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """The whole model in evaluation mode: on one device, or, by accelerate as it is read, over several or
    quantised."""
    from transformers import AutoModelForImageTextToText

    placed: dict[str, object] = {}
    if options.device_map or options.quantize:
        placed["device_map"] = options.device_map or {"": device}
    if options.quantize:
        placed["quantization_config"] = _quantization(options.quantize, dtype)
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


def _processor(found: finding.Found):
    from transformers import AutoProcessor

    with integrity.one_line(found.name, "the processor of checkpoint"):
        return AutoProcessor.from_pretrained(found.folder, **_OFFLINE)


def _facts(found: finding.Found, options: LoadOptions) -> dict[str, object]:
    facts: dict[str, object] = {}
    if found.repo or found.revision:
        facts |= {"repository": found.repo, "revision": found.revision}
    if options.quantize:
        facts["quantized"] = options.quantize
    return facts


def _quantization(kind: str, dtype: torch.dtype):
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"--quantize {kind} needs bitsandbytes: pip install 'visual-token-pruning-bench[quantize]'"
        )
    from transformers import BitsAndBytesConfig

    # it says at every call that 8-bit products are in float16
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=_NOT_QUANTISED)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=_NOT_QUANTISED,
    )


def _prepare(backbone: Backbone, options: LoadOptions) -> dict[str, object]:
    """Change the processor as the options say; what a record must tell of it beside its digests."""
    llava = backbone.family == "llava"
    if llava and (options.min_pixels or options.max_pixels):
        raise UserError(f"--min-pixels, --max-pixels: {backbone.name} takes images of one size only")
    if llava:
        return _original_inputs(backbone.processor) if options.llava_inputs == "original" else {}
    limit_pixels(backbone.processor.image_processor, options.min_pixels, options.max_pixels)
    return {}


def _original_inputs(processor) -> dict[str, object]:
    """Images and prompts as LLaVA's own code makes them: images padded to squares with the mean colour, where
    the Hugging Face conversion crops; its sentence ahead of the first turn, which the conversion left out."""
    from transformers import LlavaImageProcessor

    own = processor.image_processor
    processor.image_processor = LlavaImageProcessor(
        do_pad=True,
        size=dict(own.size),
        crop_size=dict(own.crop_size),
        resample=own.resample,
        image_mean=own.image_mean,
        image_std=own.image_std,
        rescale_factor=own.rescale_factor,
    )
    literal = json.dumps(SYSTEM_SENTENCE + " ")
    processor.chat_template = "{{ " + literal + " }}" + (processor.chat_template or "")
    return {"system_sentence": SYSTEM_SENTENCE}


def limit_pixels(image_processor, least: int | None, most: int | None) -> None:
    """Qwen2.5-VL scales every image to a number of pixels between these; each visual token is 28 x 28 of
    them. None leaves the checkpoint's own. Raises UserError if the least is above the most."""
    size = dict(image_processor.size)
    size |= {"shortest_edge": least} if least else {}
    size |= {"longest_edge": most} if most else {}
    if size["shortest_edge"] > size["longest_edge"]:
        raise UserError(
            f"--min-pixels {size['shortest_edge']} is more than --max-pixels {size['longest_edge']}"
        )
    image_processor.size = type(image_processor.size)(**size)
