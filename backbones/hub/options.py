"""Options of loading a checkpoint. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LoadOptions:
    """How a checkpoint is found, placed and fed.

    Attributes:
        device_map: auto, balanced or sequential (accelerate); None: one device.
        quantize: weights of the language model in 8 or 4 bits (bitsandbytes); None: as they are.
        llava_inputs: `original` prepares images and prompts as LLaVA's own code does, `checkpoint` as the
            Hugging Face conversion does.
        min_pixels: an image of Qwen2-VL or Qwen2.5-VL with fewer is scaled up to so many; None: the
            checkpoint's.
        max_pixels: one with more is scaled down; None: the checkpoint's.
        revision: of a hub checkpoint; None: the main one.
        download: get from the hub what is missing.
    """

    device_map: str | None = None
    quantize: Literal["4bit", "8bit"] | None = None
    llava_inputs: Literal["original", "checkpoint"] = "checkpoint"
    min_pixels: int | None = None
    max_pixels: int | None = None
    revision: str | None = None
    download: bool = False
