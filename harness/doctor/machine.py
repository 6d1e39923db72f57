"""The machine: GPU memory for the weights, disk for results and downloads, optional packages."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path

from harness.doctor.findings import MISSING, NOTE, OK, Diagnosis

#: bytes of a weight by dtype, and of a quantised one with its scales
WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "8bit": 1.1, "4bit": 0.6}
#: for the CUDA context and the allocator's slack
OVERHEAD = 2 << 30
#: records, journals and figures of a run of all methods
RESULTS = 1 << 30


def memory(found_parameters: float, config, text_config: dict | None) -> Iterator[Diagnosis]:
    """GPU (or main) memory against weights, key-value cache and the vision cache.

    config: RunConfig. text_config: of the checkpoint's config.json; None: not known.
    """
    import torch

    from harness.costs.random_weights import CPU_PARAMETERS
    from harness.run.sweep import VISION_CACHE_BYTES

    weights = found_parameters * WEIGHT_BYTES[config.load.quantize or config.dtype]
    needed = weights + VISION_CACHE_BYTES + OVERHEAD + _cache(text_config, config)
    parts = (
        f"{weights / 1e9:.1f} GB of weights in {config.load.quantize or config.dtype}, "
        f"{needed / 1e9:.1f} GB with caches at batch size {config.batch_size}"
    )
    if config.device.partition(":")[0] == "cpu":
        level = OK if found_parameters <= CPU_PARAMETERS else MISSING
        fix = "" if level == OK else "run on a machine with a CUDA device (torch sees none, or --device cpu)"
        yield Diagnosis(level, "memory", f"CPU; {parts}" if level == OK else f"no GPU; {parts}", fix)
        return
    devices = range(torch.cuda.device_count()) if config.load.device_map else [config.device]
    free = sum(torch.cuda.mem_get_info(d)[0] for d in devices)
    names = ", ".join(torch.cuda.get_device_name(d) for d in devices)
    text = f"{names}: {free / 1e9:.1f} GB free; {parts}"
    if needed <= free:
        yield Diagnosis(OK, "memory", text)
    elif weights <= free:
        yield Diagnosis(NOTE, "memory", text, "should it run out: a smaller --batch-size")
    else:
        fix = "--quantize 8bit or 4bit, --device-map auto with several GPUs, or a larger GPU"
        yield Diagnosis(MISSING, "memory", text, fix)


def _cache(text: dict | None, config) -> float:
    """Bytes of keys and values at the batch size, for a prompt of 1,024 tokens."""
    if not text or "num_hidden_layers" not in text:
        return 0.0
    heads = text.get("num_attention_heads", 1)
    width = text.get("num_key_value_heads", heads) * (text.get("hidden_size", 0) // heads)
    return 2 * text["num_hidden_layers"] * width * 2 * 1024 * config.batch_size


def disk(out: Path, to_download: float) -> Iterator[Diagnosis]:
    """Room for the results, and for what is still to be downloaded (bytes)."""
    from huggingface_hub import constants

    for what, path, needed in (
        ("disk for results", out, RESULTS),
        ("disk for downloads", Path(constants.HF_HUB_CACHE), to_download),
    ):
        if not needed:
            continue
        there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
        free = shutil.disk_usage(there).free
        text = f"{free / 1e9:.0f} GB free at {path}, about {needed / 1e9:.0f} GB needed"
        fix = "" if free >= needed else "another --out, or HF_HOME on a larger disk"
        yield Diagnosis(OK if free >= needed else MISSING, what, text, fix)


def packages(config) -> Iterator[Diagnosis]:
    """Optional ones that the options need."""
    if config.load.quantize and importlib.util.find_spec("bitsandbytes") is None:
        fix = "pip install 'visual-token-pruning-bench[quantize]'"
        yield Diagnosis(MISSING, "bitsandbytes", f"--quantize {config.load.quantize} needs it", fix)
