"""What may stand around a model: wrappers of PEFT and torch. A pruner goes on the model inside."""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from methods.errors import UserError


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of torch.compile's, DistributedDataParallel's and PEFT's wrappers.

    Raises:
        UserError: a PEFT adapter puts virtual tokens into the prompt, whose columns the engine does not know.
    """
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):  # torch.compile's OptimizedModule
            model = model._orig_mod
        elif type(model).__module__.partition(".")[0] == "peft" and hasattr(model, "get_base_model"):
            if model.active_peft_config.is_prompt_learning:
                raise UserError(
                    f"a PEFT adapter of kind {model.active_peft_config.peft_type} adds tokens of its own to "
                    "the prompt; that cannot be pruned. Use LoRA, or take the adapter off"
                )
            model = model.get_base_model()
        else:
            return model


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile has been called on the model (unwrapped or not) or on a part of it."""
    return any(
        hasattr(module, "_orig_mod")
        or getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
        for module in model.modules()
    )


def uncompiled(model: nn.Module) -> contextlib.AbstractContextManager:
    """Inside, a compiled `model` runs as it was written: torch.compile gives no promise about hooks that come
    later, and to trace them anew for every pruner takes minutes."""
    return torch.compiler.set_stance("force_eager") if is_compiled(model) else contextlib.nullcontext()
