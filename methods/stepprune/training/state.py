"""What a run needs to go on as if it had not stopped: safetensors and JSON, nothing pickled."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn


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
    """Restore in place; the facts, or None if there is nothing to restore."""
    old = folder.with_name(folder.name + ".old")
    if not folder.exists() and old.exists():  # stopped between two renames
        os.replace(old, folder)
    if not folder.exists():
        return None
    module.load_state_dict(load_file(folder / "weights.safetensors"))
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in load_file(folder / "moments.safetensors").items():
        i, _, key = name.partition(".")
        moments.setdefault(int(i), {})[key] = value
    optimiser.load_state_dict({"state": moments, "param_groups": optimiser.state_dict()["param_groups"]})
    return json.loads((folder / "facts.json").read_text())
