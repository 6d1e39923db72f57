"""The options of `harness train`, `ablate` and `calibrate`, with all their defaults. Imports
nothing heavy, so that the commands' help answers at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from methods.errors import UserError

#: Table 4 (b): the method; alive weights alone, gamma = 1; a plain sum; the last step taken alone
Aggregation = Literal["full", "alive", "uniform", "last"]
#: groups of an ablation's rows: Table 4, switches that are ours, values that the paper leaves open
Rows = Literal["paper", "ours", "open"]

#: DiffPrune's printed settings (arXiv 2605.28051); 4,000 steps are about an epoch over a tenth of
#: ImageNet-1K. Types, checkpointing and the lack of a warm-up are ours.
SETTINGS_OF_2605_28051: Mapping[str, object] = {
    "lr": 2e-4,
    "denoiser_lr": 2e-4,
    "warmup": 0,
    "batch_size": 32,
    "questions": 1,
    "steps": 4000,
    "sharpness": 0.25,
    "final_sharpness": 5.0,
    "sharpen_until": 0.5,
    "precision": "bf16",
    "dtype": "bfloat16",
    "checkpointing": True,
}


@dataclass(frozen=True)
class TrainOptions:
    """One training. Everything is in the checkpoint's description. Values that our copy of the paper does
    not give are open and ours: nearly all of them.

    Exactly one of `target_tokens` and `length_weight` is given.

    Attributes:
        out: file of the checkpoint.
        method: a learned method's name; its module `methods.<name>.learned` says which options it has no use
            for, and which defaults are its own.
        backbone: a name for `backbones.load`; frozen.
        target_tokens: mean number of tokens wanted, per question.
        length_weight: fixed lambda (the paper's), instead of a target.
        length_mode: follows from these two: `held`, a mean that a bias on the stop logit holds (ours), or
            `paper`, a fixed lambda, whose K-bar is the batch's running mean.
        supervise: what the policy learns from: the next-token loss (the paper's), or the patches that hold
            the answer, where the data says which (ours: what the architecture can do, whatever that loss
            teaches).
        drawn: version of the drawn data where `data` is None; None: the one that has evidence if that is
            wanted, else what the backbone is asked.
        data: LLaVA's instruction format, or objects with `image` and `caption`; None: drawn.
        images: folder of the images that `data` names.
        steps: of the optimiser; 0: not trained, only calibrated (a control).
        batch_size: questions per process and micro-step.
        accumulate: micro-steps per step.
        questions: on each image of a batch.
        lr: learning rate of the policy.
        denoiser_lr: of the denoiser.
        warmup: steps in which the rates rise.
        weight_decay: of matrices.
        clip: most that the gradient's norm may be.
        token_lr: rate of W_p and of the learned vectors (stop, start, text offset) as a share of their own
            size as they start: at `lr` AdamW moved them by 1 to 3 % in a whole run. 0: `lr`, as any other
            parameter.
        text_gate_until: share of the steps in which alpha rises to 1. Early, so that words count while the
            learning rate is high (the paper's section 3.2; 4.1 says: over the whole run, with which the
            policies came to ignore the question).
        words_from: where W_p starts: by least squares between the tower's rows and the projected patches, so
            that a word begins near the patches that it names; or at random.
        sharpness: of SoftTopK at the start; low, because sharp gates give the policy noise for a gradient
            (docs/stepprune.md).
        final_sharpness: at the end.
        sharpen_until: share of the steps in which it rises.
        gamma: decay; None: exp(-1/2 / target).
        aggregation: of the steps' scores, Table 4 (b).
        text: whether the encoder reads the prompt.
        causal_encoder: Table 4 (a).
        decoder_layers: of the pointer decoder.
        pointer: the logits: a projection of the decoder's output, or its last cross-attention's.
        temperature: tau.
        max_steps: K_max; None: three times the target.
        chain: straight-through links that are followed; None: all.
        k_from: where K-bar comes from; None: `sample` where a mean is held (the LM loss answers for every
            sample's length), `batch` at a fixed lambda, as in the paper.
        slots: places of an image that the language model reads; None: all.
        start_from: a checkpoint whose weights are gone on from (ours), instead of random ones.
        seed: of everything that is random.
        precision: mixed precision.
        dtype: of the frozen model's weights; the policy's are float32.
        checkpointing: compute the language model's layers again in the backward pass instead of keeping what
            they computed.
        device: "auto": the GPU that accelerate gives, if any; or "cpu".
        log_every: steps between two lines of the log.
        save_every: steps between two states for `resume`.
        workers: processes that draw or read images ahead.
        resume: go on from the saved state.
        stop_at: the step at which to stop before the end, its state saved; None: run to the end.
        cost: time one step against the frozen model alone when the run is over.

    Raises:
        UserError: options do not fit together.
    """

    out: Path
    method: str = "stepprune"
    backbone: str = "pocket-llava"
    target_tokens: float | None = None
    length_weight: float | None = None
    length_mode: Literal["held", "paper"] | None = None
    supervise: Literal["loss", "evidence"] = "loss"
    drawn: Literal["v1", "v2"] | None = None
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
    token_lr: float = 0.01
    text_gate_until: float = 0.1
    words_from: Literal["patches", "random"] = "patches"
    sharpness: float = 0.2
    final_sharpness: float = 0.3
    sharpen_until: float = 1.0
    gamma: float | None = None
    aggregation: Aggregation = "full"
    text: Literal["on", "off"] = "on"
    causal_encoder: bool = False
    decoder_layers: int = 1
    pointer: Literal["projection", "attention"] = "projection"
    temperature: float = 0.2
    max_steps: int | None = None
    chain: int | None = 1
    k_from: Literal["batch", "sample"] | None = None
    slots: int | None = None
    start_from: Path | None = None
    seed: int = 0
    precision: Literal["no", "bf16", "fp16"] = "no"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    checkpointing: bool = False
    device: str = "auto"
    log_every: int = 10
    save_every: int = 100
    workers: int = 0
    resume: bool = False
    stop_at: int | None = None
    cost: bool = True

    def __post_init__(self):
        if (self.target_tokens is None) == (self.length_weight is None):
            raise UserError(
                "give one of --target-tokens N (tracks a mean) and --length-weight X (the paper's)"
            )
        mode = "held" if self.length_weight is None else "paper"
        if self.length_mode not in (None, mode):
            needs = "--target-tokens" if self.length_mode == "held" else "--length-weight"
            raise UserError(f"--length-mode {self.length_mode} goes with {needs}")
        drawn = "v2" if self.supervise == "evidence" else None
        if self.supervise == "evidence" and (self.data is not None or self.drawn == "v1"):
            raise UserError(
                "--supervise evidence needs data that has it: leave out --data, and --drawn or v2"
            )
        # what follows from other options is settled here, so that a checkpoint's description says it
        object.__setattr__(self, "length_mode", mode)
        object.__setattr__(self, "drawn", self.drawn or drawn)
        object.__setattr__(self, "k_from", self.k_from or {"held": "sample", "paper": "batch"}[mode])
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
