"""What a run needs to go on as if it had not stopped: safetensors and JSON, nothing pickled."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from methods.errors import UserError
from methods.stepprune.training.options import TrainOptions

T = TypeVar("T")

#: options that a training may go on with otherwise than it was begun: none of them changes its result
_FREE = ("out", "resume", "stop_at", "device", "workers", "cost", "save_every", "log_every")


def settings(options: TrainOptions) -> dict[str, object]:
    """The options that decide what a training gives, JSON-able."""
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items() if k not in _FREE}
    return json.loads(json.dumps(plain))


@contextlib.contextmanager
def only_training(options: TrainOptions) -> Iterator[None]:
    """Inside, no other training writes what belongs to `options.out`: the second raises UserError at once.

    The operating system holds the lock for the process, so a killed training leaves none behind. Of several
    processes that train together the first holds it.
    """
    from filelock import FileLock, Timeout

    if int(os.environ.get("RANK", 0)) > 0:
        yield
        return
    path = options.working_folder.with_name(options.working_folder.name + ".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        lock.acquire(blocking=False)
    except Timeout as error:
        raise UserError(
            f"another training is writing {options.out}; wait until it is done, or give another --out"
        ) from error
    except OSError as error:
        raise UserError(f"cannot write to {path.parent} ({error.strerror}); give another --out") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


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


def load(
    folder: Path, module: nn.Module, optimiser: torch.optim.Optimizer, wanted: dict[str, object] | None = None
) -> dict[str, object] | None:
    """Restore in place; the facts, or None if there is nothing to restore. wanted: `settings` of the training
    that goes on. Raises UserError, before anything is restored, for a file that is truncated or missing, and
    if the training was begun with other settings."""
    old = folder.with_name(folder.name + ".old")
    if not folder.exists() and old.exists():  # stopped between two renames
        os.replace(old, folder)
    if not folder.exists():
        return None
    weights = _read(folder / "weights.safetensors", load_file)
    flat = _read(folder / "moments.safetensors", load_file)
    facts = _read(folder / "facts.json", lambda path: json.loads(path.read_text()))
    begun = facts.get("settings", {})
    other = [f"{k} {begun[k]}, not {v}" for k, v in (wanted or {}).items() if k in begun and begun[k] != v]
    if other:
        raise UserError(
            f"--resume: this training was begun with {'; '.join(other)}; give the options that it was begun "
            "with, or another --out"
        )
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
