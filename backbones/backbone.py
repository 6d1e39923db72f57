"""A loaded checkpoint with its processor, as the harness uses it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from backbones import digests
from backbones.engine import questions
from backbones.engine.vision_cache import VisionCache, vision_cache
from backbones.families import adapter_for
from backbones.families.family import Family
from backbones.images import upright
from backbones.prompts import tokenised


@dataclass
class Backbone:
    """What `backbones.load` gives.

    Attributes:
        name: as it was asked for (a folder's own name, never its path).
        model: Hugging Face's, in evaluation mode.
        processor: Hugging Face's, of the same checkpoint.
        folder: where it was loaded from.
        facts: what `describe` adds: repository, revision, and the options of loading that change answers.
    """

    name: str
    model: torch.nn.Module
    processor: object
    folder: Path
    facts: Mapping[str, object] = field(default_factory=dict, kw_only=True)

    @cached_property
    def adapter(self):
        """What is known of the loaded model: `backbones.families.family.Adapter`."""
        return adapter_for(self.model)

    @property
    def family(self) -> Family:
        """The facts of the model's family."""
        return self.adapter.family

    @property
    def num_visual_tokens(self) -> int:
        """Visual tokens of an image, unpruned; the most that an image can have where they differ."""
        if self.adapter.visual_tokens is not None:
            return self.adapter.visual_tokens
        return self.family.most_visual_tokens(self.processor)

    @property
    def num_layers(self) -> int:
        """Decoder layers of the language model."""
        return len(self.adapter.layers)

    def inputs(self, images: Sequence, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Model inputs for one user turn each: images ahead of a text.

        Args:
            images: for each prompt an image (PIL, a file or its bytes) or a list of them, which may be empty.
            prompts: what the user says. Text that spells a special token (`<image>`, `</s>`, `<|im_end|>`) is
                text, and never becomes that token.

        Returns:
            Left-padded [B, n], on the model's device.

        Raises:
            ValueError: not as many images (or lists) as prompts.
            BadImage: an image cannot be decoded.
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images for {len(prompts)} prompts")
        rows = [own if isinstance(own, list | tuple) else [own] for own in images]
        rows = [[upright(image) for image in own] for own in rows]
        batch = tokenised(self.processor, rows, prompts)
        questions.note(self.model, batch["input_ids"], batch["attention_mask"], prompts)
        device = self.model.device
        moved = {k: v.to(device) for k, v in batch.items()}
        if "pixel_values" in moved:
            moved["pixel_values"] = moved["pixel_values"].to(self.model.dtype)
        return moved

    def refuses(self, width: int, height: int) -> str:
        """Why the processor takes no image of this size, in one line; empty if it does. Qwen2.5-VL takes none
        with a ratio of the sides above 200."""
        count = getattr(self.processor.image_processor, "get_number_of_image_patches", None)
        try:
            if count is not None:
                count(height, width)
        except ValueError as error:
            return f"{width} x {height} pixels: {str(error).splitlines()[0]}"
        return ""

    def describe(self) -> dict[str, object]:
        """What a record needs to tell this backbone from others; JSON-able, no paths."""
        template = getattr(self.processor, "chat_template", None) or ""
        image_processor = self.processor.image_processor
        return {
            "name": self.name,
            "family": self.family.model_type,
            "weights": self._weights_digest,
            "config": config_digest(self.model.config.to_diff_dict()),
            "generation": config_digest(self.model.generation_config.to_diff_dict()),
            "tokenizer": _tokenizer_digest(self.folder),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "attention": self.model.config.get_text_config()._attn_implementation,
            "visual_tokens": self.num_visual_tokens,
            "layers": self.num_layers,
            **self.family.pixel_limits(self.processor),
            "image_padding": image_padding(image_processor),
            "image_processor": config_digest(image_processor.to_dict()),
            "chat_template": hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()[:16],
            **self.facts,
        }

    @cached_property
    def _weights_digest(self) -> str:
        return weights_digest(self.folder)

    @contextmanager
    def vision_cache(self, max_bytes: int) -> Iterator[VisionCache]:
        """Inside, each distinct image goes through the vision tower once for all pruners that are put on the
        model in turn (once more if one needs a signal that was not asked for before; once a raster size).

        Args:
            max_bytes: of signals that are remembered.
        """
        with vision_cache(self.model, max_bytes) as cache:
            yield cache


def image_padding(image_processor) -> str:
    """`square` if images are padded to squares (as LLaVA's own code does), else what is done instead."""
    if getattr(image_processor, "do_pad", False):
        return "square"
    return "centre crop" if getattr(image_processor, "do_center_crop", False) else "none"


def config_digest(body: dict) -> str:
    """16 hex digits of the SHA-256 of canonical JSON."""
    return hashlib.sha256(json.dumps(body, sort_keys=True, default=str).encode()).hexdigest()[:16]


def weights_digest(folder: Path) -> str:
    """16 hex digits over all bytes of the safetensors files."""
    return digests.of_files((path.name, path) for path in sorted(folder.glob("*.safetensors")))


def _tokenizer_digest(folder: Path) -> str:
    """16 hex digits over the files that make tokens of text."""
    names = ("*token*.json", "vocab.*", "merges.txt", "*.model")
    found = {path for name in names for path in folder.glob(name)}
    return digests.of_files((path.name, path) for path in sorted(found))
