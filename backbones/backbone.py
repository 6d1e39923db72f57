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
from backbones.engine.vision_cache import VisionCache, vision_cache
from backbones.families import adapter_for
from backbones.families.family import Family


@dataclass
class Backbone:
    """What `backbones.load` gives.

    name: as it was asked for (a folder's own name, never its path).
    folder: where it was loaded from.
    facts: what `describe` adds: repository, revision, and the options of loading that change answers.
    """

    name: str
    model: torch.nn.Module
    processor: object
    folder: Path
    facts: Mapping[str, object] = field(default_factory=dict, kw_only=True)

    @cached_property
    def _adapter(self):
        return adapter_for(self.model)

    @property
    def family(self) -> Family:
        return self._adapter.family

    @property
    def num_visual_tokens(self) -> int:
        """Visual tokens of an image, unpruned; the most that an image can have where they differ."""
        if self._adapter.visual_tokens is not None:
            return self._adapter.visual_tokens
        return self.family.most_visual_tokens(self.processor)

    @property
    def num_layers(self) -> int:
        """Decoder layers of the language model."""
        return len(self._adapter.layers)

    def inputs(self, images: Sequence, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Model inputs for one user turn each, an image (PIL) or a list of them ahead of a text: left-padded
        [B, n], on its device.

        Raises ValueError if there are not as many images (or lists) as prompts.
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images for {len(prompts)} prompts")
        rows = [own if isinstance(own, list | tuple) else [own] for own in images]
        texts = [
            self.processor.apply_chat_template(
                [
                    {
                        "role": "user",
                        "content": [*[{"type": "image"}] * len(own), {"type": "text", "text": prompt}],
                    }
                ],
                add_generation_prompt=True,
            )
            for own, prompt in zip(rows, prompts)
        ]
        batch = self.processor(
            images=[image.convert("RGB") for own in rows for image in own] or None,
            text=texts,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        device = self.model.device
        moved = {k: v.to(device) for k, v in batch.items()}
        if "pixel_values" in moved:
            moved["pixel_values"] = moved["pixel_values"].to(self.model.dtype)
        return moved

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
        model in turn (once more if one needs a signal that was not asked for before; once a raster size)."""
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
