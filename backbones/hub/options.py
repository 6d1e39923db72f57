"""Options of loading a checkpoint. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: lmms-eval 0.7.3's own adapter of Qwen2.5-VL scales images to this many pixels (256 to 2048 visual tokens)
QWEN_MIN_PIXELS, QWEN_MAX_PIXELS = 256 * 28 * 28, 1_605_632


@dataclass(frozen=True)
class LoadOptions:
    """device_map: auto, balanced or sequential (accelerate); None: one device. quantize: weights of the
    language model in 8 or 4 bits (bitsandbytes). llava_inputs: original prepares images and prompts as
    LLaVA's own code does, checkpoint as the Hugging Face conversion does. min_pixels, max_pixels: of
    Qwen2.5-VL's images; None: the checkpoint's. revision: of a hub checkpoint. download: get from the hub
    what is missing.
    """

    device_map: str | None = None
    quantize: Literal["4bit", "8bit"] | None = None
    llava_inputs: Literal["original", "checkpoint"] = "checkpoint"
    min_pixels: int | None = None
    max_pixels: int | None = None
    revision: str | None = None
    download: bool = False
