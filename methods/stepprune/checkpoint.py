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
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from methods.errors import UserError
from methods.stepprune.gate import LocalDenoiser
from methods.stepprune.policy import Policy, PolicyConfig

SHIPPED = Path(__file__).parent / "checkpoints"
FORMAT = 1
#: of the weights in a file: six policies are shipped, and 10 bits of mantissa are enough for a selection
STORED = torch.float16


@dataclass
class Checkpoint:
    """A policy's files, its weights not yet read.

    config: of the policy. backbone: name it was trained on. calibration: pairs (mean K, stop bias), ascending
    in K. tokens: mean K on held-out data as it was trained, None if that was not measured. training: how it
    was made, for the record. visual_tokens: mean of an image's in that data, where images differ in it.
    weights_sha256: of the weights file, hexadecimal.
    """

    path: Path
    config: PolicyConfig
    backbone: str
    tokens: float | None = None
    calibration: list[tuple[float, float]] = field(default_factory=list)
    training: dict[str, object] = field(default_factory=dict)
    visual_tokens: float | None = None
    weights_sha256: str = ""

    def bias_for(self, tokens: float) -> float:
        """The stop bias for a mean of so many tokens, linear between calibrated means.

        Raises UserError outside of what was calibrated, naming the command that calibrates.
        """
        means = [k for k, _ in self.calibration]
        if not means or not means[0] <= tokens <= means[-1]:
            known = f"{means[0]:.1f} to {means[-1]:.1f}" if means else "none"
            raise UserError(
                f"stepprune: checkpoint {self.path.stem} is not calibrated to a mean of {tokens:g} tokens "
                f"(it is for {known}); run: python -m harness calibrate stepprune --backbone {self.backbone} "
                f"--checkpoint {self.path.name} --tokens {tokens:g}"
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
        total.update(json.dumps(asdict(self.config), sort_keys=True).encode())
        return total.hexdigest()[:16]

    def check(self, width: int, text_width: int) -> None:
        """Raises UserError unless the policy suits a model of these widths."""
        own = (self.config.width, self.config.text_width)
        if own != (width, text_width):
            raise UserError(
                f"stepprune: checkpoint {self.path.stem} was trained for {self.backbone} (vision width "
                f"{own[0]}, language width {own[1]}); this model has {width} and {text_width}. Train one for "
                "it: python -m harness train stepprune --backbone NAME"
            )

    def load(self) -> tuple[Policy, LocalDenoiser]:
        """Policy and denoiser, float32 on the CPU, in evaluation mode. Raises UserError for a file that is
        damaged, lacks tensors, or holds others than the configuration's or numbers that are not finite."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        policy, denoiser = Policy(self.config), LocalDenoiser(self.config.width)
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
        return UserError(f"stepprune: checkpoint {self.path.name} {why}; restore it or train anew")

    # ---- files

    def save(self, policy: Policy, denoiser: LocalDenoiser) -> None:
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
        body = {"format": FORMAT} | {f.name: getattr(self, f.name) for f in fields(self) if f.name != "path"}
        body["config"] = asdict(self.config)
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


def read(path: Path) -> Checkpoint:
    """The description of a checkpoint. path: its safetensors or JSON file. Raises UserError: a file is gone
    or damaged, or the weights are not those that the JSON was written for."""
    found = _described(path)
    if not found.weights_sha256:
        raise UserError(
            f"stepprune: {found.path.stem}.json does not say which weights are its own; if they are those in "
            f"{found.path.name}: python -m methods.stepprune.checkpoint {path.with_suffix('.safetensors')}"
        )
    stat = found.path.stat()
    if _sha256(found.path, stat.st_size, stat.st_mtime_ns) != found.weights_sha256:
        raise UserError(
            f"stepprune: {found.path.name} holds other weights than {found.path.stem}.json was written for "
            "(damaged, or another checkpoint's); restore both"
        )
    return found


def _described(path: Path) -> Checkpoint:
    """As `read`, whatever the weights are."""
    weights, description = path.with_suffix(".safetensors"), path.with_suffix(".json")
    for file in (weights, description):
        if not file.is_file():
            raise UserError(f"stepprune: no checkpoint {path}: {file.name} is missing")
    try:
        body = json.loads(description.read_text(encoding="utf-8"), parse_constant=_no_number)
        if body.pop("format") != FORMAT:
            raise UserError(f"stepprune: {description.name} is of another format; train the checkpoint again")
        body["config"] = PolicyConfig(**body["config"])
        body["calibration"] = sorted((_number(k), _number(b)) for k, b in body["calibration"])
        for name in ("tokens", "visual_tokens"):
            if body.get(name) is not None and _number(body[name]) <= 0:
                raise ValueError(f"{name} is {body[name]}")
        return Checkpoint(weights, **body)
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"stepprune: {description.name} is damaged ({reason}); restore it") from error


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


def default_path(options) -> Path:
    """Where a training run's checkpoint goes by default, and `shipped` finds it.

    options: with `backbone`, `target_tokens` and `length_weight`, one of the last two None.
    """
    target, weight = options.target_tokens, options.length_weight
    name = f"k{target:g}" if target is not None else f"lambda{weight:g}"
    return SHIPPED / Path(options.backbone).name / f"{name}.safetensors"


def shipped(backbone: str) -> list[Checkpoint]:
    """The checkpoints that come with the package for a backbone's name."""
    return [read(path) for path in sorted((SHIPPED / backbone).glob("*.safetensors"))]


def best_for(tokens: float, candidates: list[Checkpoint]) -> tuple[Checkpoint, float]:
    """The checkpoint whose own mean K is nearest (in ratio) to `tokens` among those calibrated to it, and
    its stop bias. Raises UserError if none is; ValueError for no candidates."""
    problem = None
    for candidate in sorted(candidates, key=lambda c: _ratio(c.tokens or c.config.max_steps, tokens)):
        try:
            return candidate, candidate.bias_for(tokens)
        except UserError as error:
            problem = problem or error
    if problem is None:
        raise ValueError("no candidates")
    raise problem


def _ratio(a: float, b: float) -> float:
    return max(a, b) / min(a, b)


if __name__ == "__main__":
    for _name in sys.argv[1:]:
        _described(Path(_name)).seal()
