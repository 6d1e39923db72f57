"""Shapes of the true-size backbones, `backbones/shapes/*.json`: what FLOPs depend on, without weights."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from harness.errors import UserError

FOLDER = Path(__file__).resolve().parent.parent / "backbones" / "shapes"


@dataclass(frozen=True)
class Shape:
    """One backbone. names: what a checkpoint of it may be called, lower case. image_pixels: (height, width)
    that the tower sees. text_before_image: tokens of the chat template ahead of the image. body: the keyword
    arguments of its Hugging Face configuration.
    """

    name: str
    title: str
    names: tuple[str, ...]
    image_pixels: tuple[int, int]
    text_before_image: int
    body: dict

    @property
    def family(self) -> str:
        return self.body["model_type"]

    @functools.cached_property
    def config(self) -> SimpleNamespace:
        """The configuration as attributes, without Hugging Face's classes (and their import)."""
        return json.loads(json.dumps(self.body), object_hook=lambda d: SimpleNamespace(**d))

    @property
    def layers(self) -> int:
        return self.config.text_config.num_hidden_layers

    def grid(self, pixels: tuple[int, int] | None = None) -> tuple[int, int]:
        """Rows and columns of visual tokens of an image of that many pixels (default: image_pixels)."""
        vision = self.config.vision_config
        unit = vision.patch_size * getattr(vision, "spatial_merge_size", 1)
        height, width = pixels or self.image_pixels
        return height // unit, width // unit

    def pixels_of(self, grid: tuple[int, int]) -> tuple[int, int]:
        """The inverse of `grid`."""
        vision = self.config.vision_config
        unit = vision.patch_size * getattr(vision, "spatial_merge_size", 1)
        return grid[0] * unit, grid[1] * unit

    @property
    def visual_tokens(self) -> int:
        rows, columns = self.grid()
        return rows * columns

    def model(self):
        """The unmodified Hugging Face model on the meta device: true shapes, no memory, no download."""
        import torch
        import transformers

        architecture = {
            "llava": (transformers.LlavaConfig, "LlavaForConditionalGeneration"),
            "qwen2_5_vl": (transformers.Qwen2_5_VLConfig, "Qwen2_5_VLForConditionalGeneration"),
        }
        config, cls = architecture[self.family]
        config = config.from_dict(json.loads(json.dumps(self.body)))
        config._attn_implementation = "sdpa"
        with torch.device("meta"):
            return getattr(transformers, cls)(config).eval()


def available() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load(name: str) -> Shape:
    """The shape of that name or one of its other names. Raises UserError that lists the known ones."""
    for known in available():
        shape = _read(known)
        if name.lower() in (known, *shape.names):
            return shape
    raise UserError(f"no shape of backbone {name!r}; known: {', '.join(available()) or 'none'}")


def named_like(checkpoint: str) -> Shape | None:
    """The shape that a checkpoint (a name, a hub name or a folder) is of, by its last part; None: unknown."""
    last = Path(checkpoint).name.lower()
    return next((s for s in map(_read, available()) if last in (s.name, *s.names)), None)


@functools.cache
def _read(name: str) -> Shape:
    path = FOLDER / f"{name}.json"
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        return Shape(
            name, body["title"], tuple(body["names"]), tuple(body["image_pixels"]),
            body["text_before_image"], body["config"],
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no shape of a backbone ({error!r})") from error
