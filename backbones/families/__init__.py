"""Which adapter knows a model."""

from __future__ import annotations

from torch import nn

from backbones.families.family import Adapter
from backbones.families.llava import Llava
from backbones.families.qwen2_5_vl import Qwen2_5_VL
from methods.errors import UserError

#: by `config.model_type`
FAMILIES = {adapter.family: adapter for adapter in (Llava, Qwen2_5_VL)}


def adapter_for(model: nn.Module) -> Adapter:
    """The adapter of a model's family. Raises UserError if there is none."""
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in FAMILIES or not hasattr(model, "generate"):
        known = ", ".join(FAMILIES)
        raise UserError(
            f"a {type(model).__name__} of family {kind!r} cannot be pruned; "
            f"use a generative model of: {known}"
        )
    return FAMILIES[kind](model)
