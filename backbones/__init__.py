"""Models that methods are compared on, and the engine that puts a method on them.

    backbone = backbones.load("pocket-llava")        # or "llava-1.5-7b", a folder, a hub id
    inputs = backbone.inputs([image], ["Is there a red circle?"])
    with FastV(budget=64)(backbone.model) as trace:
        backbone.model.generate(**inputs)

Nothing heavy is imported before `load`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from backbones.backbone import Backbone
    from backbones.hub.options import LoadOptions

_HERE = Path(__file__).parent
#: folders of the shipped checkpoints by name
NAMED = {name: _HERE / "pocket" / "checkpoints" / name for name in ("pocket-llava", "pocket-qwen")}


def available() -> list[str]:
    """Names of the shipped checkpoints."""
    return list(NAMED)


def load(
    name: str,
    options: LoadOptions | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> Backbone:
    """The one loader: a shipped checkpoint, a short name, a checkpoint folder, or a hub id.

    Args:
        name: one of `available()`, a short name of `backbones.hub.known`, a folder with config.json, or
            owner/name on the Hugging Face hub (read from this machine's cache).
        options: devices, quantisation, conventions of images and prompts, download; None: all as by default.
        device: of all weights, where `options.device_map` does not spread them.
        dtype: float32, bfloat16 or float16.

    The network is asked only with `options.download`, after a warning in the log.

    Raises:
        UserError: no such checkpoint, not whole (a tensor of the model is not in its files, has another
            shape or is not finite), of no known family, or an option does not suit it. Safetensors alone are
            read, and no code of the checkpoint is run.
    """
    from backbones.hub.load import load as read

    return read(name, options, device, dtype)
