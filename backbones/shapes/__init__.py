"""Shapes of the true-size backbones, the JSON files in this folder: what FLOPs depend on, without weights."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from methods.errors import UserError

if TYPE_CHECKING:
    from backbones.families.family import Family

#: tokens ahead of the image in Vicuna's chat template, for a config.json, which does not tell
TEXT_BEFORE_IMAGE = 35
FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Shape:
    """One backbone.

    Attributes:
        name: by which it is asked for.
        title: for tables.
        names: what a checkpoint of it may be called, lower case.
        image_pixels: (height, width) that the tower sees.
        text_before_image: tokens of the chat template ahead of the image.
        body: the keyword arguments of its Hugging Face configuration.
    """

    name: str
    title: str
    names: tuple[str, ...]
    image_pixels: tuple[int, int]
    text_before_image: int
    body: dict

    @property
    def family(self) -> Family:
        """Raises UserError if it is not known."""
        from backbones import families  # and with them torch, without which much can be told of a shape

        return families.of_type(self.body["model_type"])

    @functools.cached_property
    def config(self) -> SimpleNamespace:
        """The configuration as attributes, without Hugging Face's classes (and their import)."""
        return json.loads(json.dumps(self.body), object_hook=lambda d: SimpleNamespace(**d))

    @property
    def layers(self) -> int:
        return self.config.text_config.num_hidden_layers

    def grid(self, pixels: tuple[int, int] | None = None) -> tuple[int, int]:
        """Rows and columns of visual tokens of an image of that many pixels (default: image_pixels)."""
        unit = self.family.unit(self.config.vision_config)
        height, width = pixels or self.image_pixels
        return height // unit, width // unit

    def pixels_of(self, grid: tuple[int, int]) -> tuple[int, int]:
        """The inverse of `grid`."""
        unit = self.family.unit(self.config.vision_config)
        return grid[0] * unit, grid[1] * unit

    @property
    def visual_tokens(self) -> int:
        rows, columns = self.grid()
        return rows * columns

    def model(self):
        """The unmodified Hugging Face model on the meta device: true shapes, no memory, no download."""
        import torch

        config_class, model_class = self.family.architecture()
        config = config_class.from_dict(json.loads(json.dumps(self.body)))
        config._attn_implementation = "sdpa"
        with torch.device("meta"):
            return model_class(config).eval()


def available() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load(name: str) -> Shape:
    """The shape of that name or one of its other names, or of the model whose config.json is named. Raises
    UserError that lists the known ones."""
    if name.endswith(".json"):
        return from_config_file(Path(name))
    for known in available():
        shape = _read(known)
        if name.lower() in (known, *shape.names):
            return shape
    raise UserError(
        f"no shape of backbone {name!r}; known: {', '.join(available()) or 'none'}; or give the path of a "
        "config.json"
    )


def from_config_file(path: Path) -> Shape:
    """The shape of a Hugging Face config.json; its name is the folder's. Raises UserError if it is none."""
    from backbones import families

    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        config = families.of_type(body["model_type"]).architecture()[0].from_dict(body)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no config.json of a known family ({error!r})") from error
    return of_config(config, path.resolve().parent.name)


def of_config(config, name: str, text_before_image: int = TEXT_BEFORE_IMAGE) -> Shape:
    """The shape of a model with a Hugging Face configuration whose images have one size."""
    body = json.loads(json.dumps(config.to_dict(), default=str))
    if "image_size" not in body["vision_config"]:
        raise UserError(f"{name}: a {config.model_type} takes images of any size; use a shape that names one")
    side = body["vision_config"]["image_size"]
    return Shape(name, name, (), (side, side), text_before_image, body)


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
