"""Checkpoints with a short name. Imports nothing heavy: `run_all.py --list` reads it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Checkpoint:
    """repo: its id on the hub. family: its model_type. parameters: as published. weight_bytes: of the
    safetensors files there, 2 a parameter."""

    repo: str
    family: str
    parameters: float

    @property
    def weight_bytes(self) -> float:
        return 2 * self.parameters


KNOWN = {
    "llava-1.5-7b": Checkpoint("llava-hf/llava-1.5-7b-hf", "llava", 7.06e9),
    "llava-1.5-13b": Checkpoint("llava-hf/llava-1.5-13b-hf", "llava", 13.35e9),
    "qwen2.5-vl-3b": Checkpoint("Qwen/Qwen2.5-VL-3B-Instruct", "qwen2_5_vl", 3.75e9),
    "qwen2.5-vl-7b": Checkpoint("Qwen/Qwen2.5-VL-7B-Instruct", "qwen2_5_vl", 8.29e9),
}
