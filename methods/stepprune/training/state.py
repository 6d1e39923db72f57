"""What a run needs to go on as if it had not stopped: safetensors and JSON, nothing pickled."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from methods.errors import UserError

T = TypeVar("T")


def save(folder: Path, module: nn.Module, optimiser: torch.optim.Optimizer, facts: dict[str, object]) -> None:
    """Weights, the optimiser's moments, and JSON-able facts; the folder is replaced in one step."""
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in module.state_dict().items()}, new / "weights.safetensors")
    moments = {
        f"{i}.{key}": value.contiguous()
        for i, own in optimiser.state_dict()["state"].items()
        for key, value in own.items()
    }
    save_file(moments, new / "moments.safetensors")
    (new / "facts.json").write_text(json.dumps(facts))
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def load(folder: Path, module: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, object] | None:
    """Restore in place; the facts, or None if there is nothing to restore. Raises UserError, before anything
    is restored, for a file that is truncated or missing."""
    old = folder.with_name(folder.name + ".old")
    if not folder.exists() and old.exists():  # stopped between two renames
        os.replace(old, folder)
    if not folder.exists():
        return None
    weights = _read(folder / "weights.safetensors", load_file)
    flat = _read(folder / "moments.safetensors", load_file)
    facts = _read(folder / "facts.json", lambda path: json.loads(path.read_text()))
    module.load_state_dict(weights)
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in flat.items():
        i, _, key = name.partition(".")
        moments.setdefault(int(i), {})[key] = value
    optimiser.load_state_dict({"state": moments, "param_groups": optimiser.state_dict()["param_groups"]})
    return facts


def _read(path: Path, reader: Callable[[Path], T]) -> T:
    try:
        return reader(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"the training state cannot be restored: {path} is damaged ({error}); move {path.parent} away "
            "and train anew, without --resume"
        ) from error
