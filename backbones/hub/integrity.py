"""Is a checkpoint whole? Every tensor of the model has to come from its files, with its shape, and be finite.

transformers fills in what is missing with random numbers and goes on; scores of such a model look like any
others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from methods.errors import UserError

#: buffers that a model computes itself; files of earlier releases hold them, today's do not. Tied weights
#: (`lm_head` of small models) are not among what transformers calls missing.
_COMPUTED = re.compile(r"(^|\.)(position_ids|inv_freq|original_inv_freq)$")
_LAYER = re.compile(r"(.*\.(?:layers|blocks))\.(\d+)\.")
FIX = "restore config.json and the weights, or download them anew"


@contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' own report and progress bar: `check_tensors` says what is wrong in one line."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def one_line(name: str, what: str = "checkpoint") -> Iterator[None]:
    """Whatever transformers and torch raise on damaged or odd files, as a UserError."""
    from safetensors import SafetensorError

    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of several libraries, by what is wrong
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        if isinstance(error, KeyError | AttributeError | TypeError):  # their texts say little alone
            reason = f"{type(error).__name__}: {reason}"
        if isinstance(error, SafetensorError):
            reason = f"a safetensors file is damaged ({reason}); restore it or download it anew"
        raise UserError(f"{what} {name} cannot be loaded: {reason}") from error


def check_tensors(name: str, model: nn.Module, info: Mapping[str, Iterable]) -> None:
    """Raises UserError unless every tensor of `model` was in the files of checkpoint `name`, and no others.

    Args:
        name: of the checkpoint, for the message.
        model: as `from_pretrained` gave it.
        info: what it gave beside it for `output_loading_info`.
    """
    missing, unexpected = (
        sorted(key for key in info[kind] if not _COMPUTED.search(key))
        for kind in ("missing_keys", "unexpected_keys")
    )
    shapes = [
        f"{key} {tuple(in_file)} instead of {tuple(wanted)}"
        for key, in_file, wanted in sorted(info["mismatched_keys"])
    ]
    found = [
        (missing, "of the model's tensors are not in its files"),
        (unexpected, "tensors in its files are not the model's"),
        (shapes, "tensors have another shape than config.json says"),
    ]
    if told := [f"{len(keys)} {what} ({_first_three(keys)})" for keys, what in found if keys]:
        told += _layers(model.state_dict(), missing, unexpected)
        raise UserError(f"checkpoint {name} is not whole: {'; '.join(told)}; {FIX}")


def _first_three(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")


def _layers(wanted: Iterable[str], missing: list[str], unexpected: list[str]) -> list[str]:
    """A word on each stack of layers that config.json and the files count differently."""
    wanted = set(wanted)
    stacks = [_counts(keys) for keys in (wanted, (wanted - set(missing)) | set(unexpected))]
    return [
        f"config.json says {n} layers in {stack}, the files have {stacks[1].get(stack, 0)}"
        for stack, n in sorted(stacks[0].items())
        if stacks[1].get(stack, 0) != n
    ]


def _counts(keys: Iterable[str]) -> dict[str, int]:
    """Layers of each stack that the tensors' names tell of."""
    found: dict[str, set[str]] = {}
    for match in filter(None, map(_LAYER.match, keys)):
        found.setdefault(match[1], set()).add(match[2])
    return {stack: len(numbers) for stack, numbers in found.items()}


def check_finite(name: str, model: nn.Module, folder: Path) -> None:
    """Raises UserError if a number of the model is infinite or NaN, in the dtype that it was loaded in.

    One pass over the weights and one host synchronisation per device. What the model does not hold as such
    (quantised weights, parts left on disk) is read from the files in `folder` instead.
    """
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    held = {k: t for k, t in tensors.items() if t.is_floating_point() and t.device.type != "meta"}
    bad = not_finite(held)
    if not bad and any(not t.is_floating_point() or t.device.type == "meta" for t in model.parameters()):
        bad = _not_finite_in_files(folder)
    if bad:
        dtype = str(next(iter(held.values())).dtype).removeprefix("torch.") if held else "their dtype"
        raise UserError(
            f"checkpoint {name}: {len(bad)} tensors hold numbers that are not finite in {dtype} "
            f"({_first_three(bad)}); {FIX}, or use another --dtype"
        )


@torch.no_grad()
def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of those that hold an infinite number or NaN, sorted."""
    verdicts: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        if tensor.numel() and tensor.is_floating_point():
            ends = torch.stack(torch.aminmax(tensor.detach()))  # NaN passes through
            verdicts.setdefault(tensor.device, []).append((key, ends.isfinite().all()))
    return sorted(
        key
        for pairs in verdicts.values()
        for (key, _), fine in zip(pairs, torch.stack([v for _, v in pairs]).tolist())
        if not fine
    )


def _not_finite_in_files(folder: Path) -> list[str]:
    from safetensors import safe_open

    bad: list[str] = []
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                bad += not_finite({key: file.get_tensor(key)})
    return sorted(bad)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that are read of a checkpoint folder: its index's shards, or the one file."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return [folder / "model.safetensors"]
    return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]


def check_headers(name: str, folder: Path) -> int:
    """`check_tensors` without reading a weight: names and shapes in the files' headers against a model on the
    meta device.

    Returns:
        How many tensors the files hold.

    Raises:
        UserError: as `check_tensors`, or a file cannot be read.
    """
    from safetensors import safe_open
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig

    tensors = {}
    with one_line(name):
        for path in weight_files(folder):
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    tensors[key] = torch.empty(file.get_slice(key).get_shape(), device="meta")
    with one_line(name), quietly():
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model, info = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)].from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            device_map={"": "meta"},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    check_tensors(name, model, info)
    return len(tensors)
