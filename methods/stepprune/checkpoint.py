"""Reading and writing policies: one safetensors file, and a JSON file of the same name beside it.

The JSON holds the policy's configuration, what it was trained on and how, the calibration (which stop bias
gives which mean K on held-out data), and the SHA-256 of its weights file, so that no other weights pass under
its name. For a file from before it did:

    python -m methods.stepprune.checkpoint FILE.safetensors...
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import sys
from bisect import bisect_left
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from methods.errors import UserError
from methods.stepprune.gate import LocalDenoiser
from methods.stepprune.policy import PolicyConfig

FORMAT = 1
#: of the weights in a file: six policies are shipped, and 10 bits of mantissa are enough for a selection
STORED = torch.float16


class Config(Protocol):
    """Shape of a learned method's policy, a frozen dataclass: its kind is the kind of a checkpoint.

    Attributes:
        method: name of the method.
        width: d, of the vision tower.
        text_width: D, of the language model.
        text: whether the policy reads the prompt.
    """

    method: ClassVar[str]
    width: int
    text_width: int
    text: bool

    def build(self) -> nn.Module:
        """A policy of this shape, with random weights."""

    def described(self) -> dict[str, object]:
        """JSON-able, as a checkpoint's description and digest have it."""


@dataclass
class Checkpoint:
    """A policy's files, its weights not yet read.

    Attributes:
        path: of the weights.
        config: of the policy.
        backbone: name it was trained on.
        tokens: mean K on held-out data as it was trained; None: not measured.
        calibration: pairs (mean K, bias), ascending in K; the bias is on StepPrune's stop logit, or
            DiffPrune's threshold of scores.
        training: how it was made, for the record.
        visual_tokens: mean of an image's in the held-out data, where images differ in it.
        weights_sha256: of the weights file, hexadecimal.
    """

    path: Path
    config: Config
    backbone: str
    tokens: float | None = None
    calibration: list[tuple[float, float]] = field(default_factory=list)
    training: dict[str, object] = field(default_factory=dict)
    visual_tokens: float | None = None
    weights_sha256: str = ""

    @property
    def method(self) -> str:
        return self.config.method

    def bias_for(self, tokens: float) -> float:
        """The bias for a mean of so many tokens, linear between calibrated means.

        Raises UserError outside of what was calibrated, naming the command that calibrates.
        """
        means = [k for k, _ in self.calibration]
        if not means or not means[0] <= tokens <= means[-1]:
            known = f"{means[0]:.1f} to {means[-1]:.1f}" if means else "none"
            raise UserError(
                f"{self.method}: checkpoint {self.path.stem} is not calibrated to a mean of {tokens:g} "
                f"tokens (it is for {known}); run: python -m harness calibrate {self.method} --backbone "
                f"{self.backbone} --checkpoint {self.path.name} --tokens {tokens:g}"
            )
        i = bisect_left(means, tokens)
        (k1, b1) = self.calibration[i]
        if k1 == tokens:
            return b1
        (k0, b0) = self.calibration[i - 1]
        return b0 + (b1 - b0) * (tokens - k0) / (k1 - k0)

    def digest(self) -> str:
        """16 hex digits over weights and configuration."""
        total = hashlib.sha256(self.path.read_bytes())
        total.update(json.dumps(self.config.described(), sort_keys=True).encode())
        return total.hexdigest()[:16]

    def check(self, width: int, text_width: int) -> None:
        """Raises UserError unless the policy suits a model of these widths."""
        own = (self.config.width, self.config.text_width)
        if own != (width, text_width):
            raise UserError(
                f"{self.method}: checkpoint {self.path.stem} was trained for {self.backbone} (vision width "
                f"{own[0]}, language width {own[1]}); this model has {width} and {text_width}. Train one for "
                f"it: python -m harness train {self.method} --backbone NAME"
            )

    def load(self) -> tuple[nn.Module, LocalDenoiser]:
        """Policy and denoiser, float32 on the CPU, in evaluation mode. Raises UserError for a file that is
        damaged, lacks tensors, or holds others than the configuration's or numbers that are not finite."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        policy, denoiser = self.config.build(), LocalDenoiser(self.config.width)
        wanted = {f"policy.{k}": v for k, v in policy.state_dict().items()}
        wanted |= {f"denoiser.{k}": v for k, v in denoiser.state_dict().items()}
        try:
            weights = load_file(self.path)
        except (OSError, SafetensorError) as error:
            raise self._unusable(f"cannot be read ({str(error).splitlines()[0]})") from error
        shared = wanted.keys() & weights.keys()
        for keys, what in (
            (wanted.keys() - shared, "lacks"),
            (weights.keys() - shared, "holds what is not the policy's:"),
            (
                {k for k in shared if weights[k].shape != wanted[k].shape},
                "has other shapes than its JSON says:",
            ),
            ({k for k in shared if not weights[k].isfinite().all()}, "holds numbers that are not finite in"),
        ):
            if keys:
                raise self._unusable(f"{what} {', '.join(sorted(keys)[:3])} ({len(keys)} tensors)")
        for name, module in (("policy", policy), ("denoiser", denoiser)):
            module.load_state_dict(
                {k.removeprefix(f"{name}."): v for k, v in weights.items() if k.startswith(f"{name}.")}
            )
        return policy.eval(), denoiser.eval()

    def _unusable(self, why: str) -> UserError:
        return UserError(f"{self.method}: checkpoint {self.path.name} {why}; restore it or train anew")

    # ---- files

    def save(self, policy: nn.Module, denoiser: LocalDenoiser) -> None:
        """Write both files, each in one atomic step, weights first. See `round_as_stored`."""
        from safetensors.torch import save_file

        self.path.parent.mkdir(parents=True, exist_ok=True)
        state = {f"policy.{k}": v for k, v in policy.state_dict().items()}
        state |= {f"denoiser.{k}": v for k, v in denoiser.state_dict().items()}
        temporary = self.path.with_suffix(".tmp")
        save_file({k: _stored(v).cpu().contiguous() for k, v in state.items()}, temporary)
        os.chmod(temporary, 0o644)  # safetensors writes for the owner alone
        os.replace(temporary, self.path)
        self.seal()

    def seal(self) -> None:
        """Note the weights file's SHA-256 as it is now, and write the JSON file."""
        self.weights_sha256 = hashlib.sha256(self.path.read_bytes()).hexdigest()
        self.save_description()

    def save_description(self) -> None:
        """Write the JSON file alone."""
        body = {"format": FORMAT, "method": self.method}
        body |= {f.name: getattr(self, f.name) for f in fields(self) if f.name != "path"}
        body["config"] = self.config.described()
        temporary = self.path.with_suffix(".json.tmp")
        temporary.write_text(json.dumps(body, indent=1) + "\n")
        os.replace(temporary, self.path.with_suffix(".json"))


def _stored(value: Tensor) -> Tensor:
    """A weight as its file has it; the scalar, the stop bias, keeps its precision."""
    return value.detach().to(STORED if value.ndim else torch.float32)


@torch.no_grad()
def round_as_stored(module: nn.Module) -> None:
    """Give every parameter the value that a file would give back, so that what is calibrated and measured
    from here on is what the file does."""
    for parameter in module.parameters():
        parameter.copy_(_stored(parameter))


def read(path: Path, kind: type[Config] = PolicyConfig) -> Checkpoint:
    """The description of a checkpoint of this kind.

    Args:
        path: its safetensors or JSON file.
        kind: of policy.

    Raises:
        UserError: a file is gone or damaged, is another method's, or the weights are not those that the JSON
            was written for.
    """
    found = _described(path, kind)
    if not found.weights_sha256:
        raise UserError(
            f"{kind.method}: {found.path.stem}.json does not say which weights are its own; if they are "
            f"those in {found.path.name}: python -m methods.stepprune.checkpoint {found.path}"
        )
    stat = found.path.stat()
    if _sha256(found.path, stat.st_size, stat.st_mtime_ns) != found.weights_sha256:
        raise UserError(
            f"{kind.method}: {found.path.name} holds other weights than {found.path.stem}.json was written "
            "for (damaged, or another checkpoint's); restore both"
        )
    return found


def _described(path: Path, kind: type[Config] = PolicyConfig) -> Checkpoint:
    """As `read`, whatever the weights are."""
    name = kind.method
    if not path.name:  # "/", "."
        raise UserError(f"{name}: checkpoint {path} is a folder; name a file in it")
    weights, description = path.with_suffix(".safetensors"), path.with_suffix(".json")
    for file in (weights, description):
        if not file.is_file():
            raise UserError(f"{name}: no checkpoint {path}: {file.name} is missing")
    try:
        body = json.loads(description.read_text(encoding="utf-8"), parse_constant=_no_number)
        if body.pop("format") != FORMAT:
            raise UserError(f"{name}: {description.name} is of another format; train the checkpoint again")
        # older files do not say: StepPrune was the only learned method
        if (theirs := body.pop("method", PolicyConfig.method)) != name:
            raise UserError(f"{name}: {description.name} describes a policy of {theirs}; name it there")
        body["config"] = kind(**body["config"])
        body["calibration"] = sorted((_number(k), _number(b)) for k, b in body["calibration"])
        for key in ("tokens", "visual_tokens"):
            if body.get(key) is not None and _number(body[key]) <= 0:
                raise ValueError(f"{key} is {body[key]}")
        return Checkpoint(weights, **body)
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{name}: {description.name} is damaged ({reason}); restore it") from error


def _no_number(text: str) -> float:
    raise ValueError(f"{text} where a number should be")


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} where a number should be")
    return value


@functools.lru_cache(maxsize=64)
def _sha256(path: Path, size: int, modified: int) -> str:
    """Of the file as it was then: `read` runs whenever a policy is put on a model."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def folder(kind: type[Config]) -> Path:
    """Where the policies of a kind lie that are found without being named, each in its backbone's folder."""
    return Path(sys.modules[kind.__module__].__file__).parent / "checkpoints"


#: StepPrune's
SHIPPED = Path(__file__).parent / "checkpoints"


def default_path(options, method) -> Path:
    """Where `shipped` finds what a training makes. options: of the training. method: a `Learned`."""
    return (
        folder(method.kind()) / Path(options.backbone).name / f"{method.checkpoint_name(options)}.safetensors"
    )


def shipped(backbone: str, kind: type[Config] = PolicyConfig) -> list[Checkpoint]:
    """The checkpoints of a kind that are found for a backbone's name."""
    return [read(path, kind) for path in sorted((folder(kind) / backbone).glob("*.safetensors"))]


def _called(model: nn.Module) -> str:
    """What a user calls the model: the hub id of a snapshot in the cache, whose folder is named after its
    commit; else the folder's name."""
    folder = Path(model.config.name_or_path)
    if folder.parent.name == "snapshots":
        return folder.parents[1].name.removeprefix("models--").replace("--", "/", 1)
    return folder.name


def suiting(
    model: nn.Module, named: str | None, kind: type[Config], text: bool | None = None
) -> list[Checkpoint]:
    """The checkpoints that a method may use on a model.

    Args:
        model: Hugging Face's.
        named: the file that a person named; None: those found for the model's name.
        kind: of policy.
        text: whether the policy shall read the prompt; None: either.

    Raises:
        UserError: there is none, naming the command that trains one, or one is for another model.
    """
    backbone, method = _called(model), kind.method
    found = [read(Path(named), kind)] if named is not None else shipped(Path(backbone).name, kind)
    others = [c for c in found if text is not None and c.config.text != text]
    if others and named is not None:
        reads = "does not read the prompt" if text else "reads the prompt"
        raise UserError(
            f"{method}: checkpoint {others[0].path.stem} {reads}; set text={str(not text).lower()}"
        )
    found = [c for c in found if c not in others]
    if not found:
        how = f" --text {'on' if text else 'off'}" if text is not None else ""
        raise UserError(
            f"{method}: no checkpoint for {backbone} is shipped; train one: python -m harness train {method} "
            f"--backbone {backbone} --target-tokens N{how} --out FILE, then use {method}:checkpoint=FILE"
        )
    vision, text_width = model.config.vision_config, model.config.get_text_config().hidden_size
    width = getattr(vision, "out_hidden_size", vision.hidden_size)  # a merger is part of the tower
    for candidate in found:
        candidate.check(width, text_width)
    return found


def visual_tokens(model: nn.Module, budget: int | float, candidates: list[Checkpoint]) -> int | None:
    """Of an image, on average, to make a mean number of a budget that is a share; None if nobody knows.

    Raises:
        UserError: nobody knows, and the budget is a share.
    """
    known = [getattr(model.config, "image_seq_length", None), *(c.visual_tokens for c in candidates)]
    found = next(filter(None, known), None)
    if found is None and isinstance(budget, float):
        raise UserError(
            f"{candidates[0].method}: budget {budget} is a share of images whose sizes differ, and no "
            "checkpoint says what it was calibrated on; give the mean number of tokens instead"
        )
    return None if found is None else round(found)


def best_for(tokens: float, candidates: list[Checkpoint]) -> tuple[Checkpoint, float]:
    """The checkpoint whose own mean K is nearest (in ratio) to `tokens` among those calibrated to it, and
    its stop bias. Raises UserError if none is; ValueError for no candidates."""
    problem = None
    for candidate in nearest(tokens, candidates):
        try:
            return candidate, candidate.bias_for(tokens)
        except UserError as error:
            problem = problem or error
    if problem is None:
        raise ValueError("no candidates")
    raise problem


def nearest(tokens: float, candidates: list[Checkpoint]) -> list[Checkpoint]:
    """By how near their own mean K is to `tokens`, in ratio; those of which it is not known come last."""
    return sorted(candidates, key=lambda c: _ratio(c.tokens, tokens) if c.tokens else math.inf)


def _ratio(a: float, b: float) -> float:
    return max(a, b) / min(a, b)


if __name__ == "__main__":
    for _name in sys.argv[1:]:
        _described(Path(_name)).seal()
