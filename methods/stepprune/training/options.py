"""The options of `harness train`, `ablate` and `calibrate`, with all their defaults. Imports
nothing heavy, so that the commands' help answers at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from methods.errors import UserError

#: Table 4 (b): the method; alive weights alone, gamma = 1; a plain sum; the last step taken alone
Aggregation = Literal["full", "alive", "uniform", "last"]
#: groups of an ablation's rows: Table 4, switches that are ours, values that the paper leaves open
Rows = Literal["paper", "ours", "open"]


@dataclass(frozen=True)
class TrainOptions:
    """One run. Everything is in the checkpoint's description. Values that our copy of the paper does not
    give are open and ours: nearly all of them.

    start_from: a checkpoint whose weights are gone on from (ours), instead of random ones.

    Exactly one of target_tokens and length_weight is given. batch_size: questions a process and micro-step,
    `questions` of them on each image; accumulate: micro-steps a step. method: a learned method's name; its
    module `methods.<name>.learned` says which options it has no use for, and which defaults are its own.
    """

    out: Path
    method: str = "stepprune"
    backbone: str = "pocket-llava"
    target_tokens: float | None = None
    length_weight: float | None = None
    data: Path | None = None
    images: Path | None = None
    steps: int = 160
    batch_size: int = 32
    accumulate: int = 1
    questions: int = 4
    lr: float = 4e-4
    denoiser_lr: float = 1e-3
    warmup: int = 40
    weight_decay: float = 0.01
    clip: float = 1.0
    text_gate_until: float = 1.0
    #: low, because sharp gates give the policy noise for a gradient (docs/stepprune.md)
    sharpness: float = 0.2
    final_sharpness: float = 0.3
    gamma: float | None = None
    aggregation: Aggregation = "full"
    #: whether the encoder reads the prompt
    text: Literal["on", "off"] = "on"
    causal_encoder: bool = False
    decoder_layers: int = 1
    pointer: Literal["projection", "attention"] = "projection"
    temperature: float = 0.2
    max_steps: int | None = None
    chain: int | None = 1
    k_from: Literal["batch", "sample"] = "sample"
    slots: int | None = None
    start_from: Path | None = None
    seed: int = 0
    precision: Literal["no", "bf16", "fp16"] = "no"
    device: str = "auto"
    log_every: int = 10
    save_every: int = 100
    workers: int = 0
    resume: bool = False
    stop_at: int | None = None
    #: time a step against the frozen model alone when the run is over
    cost: bool = True

    def __post_init__(self):
        if (self.target_tokens is None) == (self.length_weight is None):
            raise UserError(
                "give one of --target-tokens N (tracks a mean) and --length-weight X (the paper's)"
            )
        if self.batch_size % self.questions:
            raise UserError(
                f"--batch-size {self.batch_size} is no multiple of --questions {self.questions}, those asked "
                "of each image"
            )
        if self.data is not None and self.images is None:
            raise UserError("--data needs --images, the folder of its images")

    @property
    def tokens(self) -> float:
        """What schedules and starting values are made for: the target, or 64 at a fixed lambda."""
        return self.target_tokens or 64.0

    @property
    def working_folder(self) -> Path:
        return self.out.with_name(f".{self.out.stem}.training")

    @property
    def log(self) -> Path:
        return self.out.with_suffix(".csv")


@dataclass(frozen=True)
class AblationOptions:
    """What `ablate` takes beside the options of each training.

    Attributes:
        folder: For the results.
        rows: Groups of variants; the method itself is always the first row.
        seeds: Trainings of each variant, with the training's seed and the next ones.
        steps: Of each training; fewer than a training's own default.
        target_tokens: Mean K wanted where neither it nor a length weight is given.
    """

    folder: Path
    rows: tuple[Rows, ...] = ("paper",)
    seeds: int = 1
    steps: int = 60
    target_tokens: float = 64.0


@dataclass(frozen=True)
class CalibrateOptions:
    """What `calibrate` takes.

    Attributes:
        checkpoint: A file, or the name of a shipped one.
        tokens: Means of K wanted.
        backbone: Name or folder.
        images: Held-out images, each with eight questions.
        device: cpu or cuda.
        method: A learned method's name.
    """

    checkpoint: str
    tokens: tuple[float, ...]
    backbone: str = "pocket-llava"
    images: int = 48
    device: str = "cpu"
    method: str = "stepprune"
