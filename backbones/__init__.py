"""Models that methods are compared on, and the engine that puts a method on them.

    backbone = backbones.load("pocket-llava")        # or a checkpoint folder, LLaVA-1.5 or Qwen2.5-VL
    inputs = backbone.inputs([image], ["Is there a red circle?"])
    with FastV(budget=64)(backbone.model) as trace:
        backbone.model.generate(**inputs)

Nothing heavy is imported before `load`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from methods.errors import UserError

if TYPE_CHECKING:
    from backbones.backbone import Backbone

_HERE = Path(__file__).parent
#: folders of the shipped checkpoints by name
NAMED = {name: _HERE / "pocket" / "checkpoints" / name for name in ("pocket-llava", "pocket-qwen")}


def available() -> list[str]:
    """Names that `load` takes, beside folders."""
    return list(NAMED)


def load(name_or_path: str, device: str = "cpu", dtype: str = "float32") -> Backbone:
    """A backbone by name or from a local checkpoint folder (safetensors only; no code of the folder is run).

    Raises UserError if there is none, or if it cannot be used.
    """
    folder = NAMED.get(name_or_path, Path(name_or_path))
    if not (folder / "config.json").is_file():
        if name_or_path in NAMED:
            raise UserError(
                f"the checkpoint of {name_or_path} is missing from this installation; see backbones/pocket"
            )
        known = ", ".join(NAMED)
        raise UserError(
            f"unknown backbone {name_or_path!r}: neither a known name ({known}) nor a folder with config.json"
        )
    from backbones.backbone import from_folder

    return from_folder(folder, Path(name_or_path).name, device, dtype)
