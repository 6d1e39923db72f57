"""Commands of the methods that are trained: `train`, `calibrate`, `ablate`, `bench-policy`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

import typer

from harness.bench.policy import BenchOptions
from harness.cli.command import command, defaults_of
from harness.cli.options import (
    HOW,
    LONGEST_TEXT,
    WHAT,
    BatchSizes,
    Device,
    Dtype,
    Seed,
    as_path,
    as_text,
    count,
    flag,
    number,
    one_of,
    option,
    real,
    whole,
)
from methods import learned
from methods.errors import UserError
from methods.stepprune.training.options import (
    AblationOptions,
    Aggregation,
    CalibrateOptions,
    Rows,
    TrainOptions,
)

#: for checkpoints that would replace a shipped one, or that no run shall find by itself; then METHOD/BACKBONE
LOCAL = Path("results/runs")

TRAIN = """\
examples:
  python -m harness train stepprune --backbone pocket-llava --target-tokens 64
  python -m harness train stepprune --target-tokens 64 --preset shipped    as the shipped ones
  python -m harness train stepprune --length-weight 0.02    the paper's way: lambda decides the mean
  python -m harness train diffprune --target-tokens 64    its one-shot sibling
  python -m harness train stepprune --target-tokens 64 --resume    go on with a run that was stopped
  python -m harness train diffprune --backbone llava-1.5-7b --target-tokens 64 --preset 2605.28051 \\
      --data captions.json --images images/    a real model; doctor --train says whether it fits
  accelerate launch -m harness train stepprune --target-tokens 64    one process per GPU

then: python run_all.py --methods stepprune:checkpoint=FILE,random --budget 64
"""
ABLATE = """\
examples:
  python -m harness ablate stepprune                                Table 4
  python -m harness ablate stepprune --rows paper open --seeds 3    and what the paper leaves open
  python -m harness ablate stepprune --steps 40 --batch-size 16 --slots 192 --max-steps 128 \\
      --warmup 16
"""
CALIBRATE = """\
example:
  python -m harness calibrate stepprune \\
      --checkpoint results/runs/stepprune/pocket-llava/k64.safetensors --tokens 48 96
"""
BENCH = """\
examples:
  python -m harness bench-policy stepprune --device cuda
  python -m harness bench-policy stepprune --steps 64 128 --batch-size 1 8 --report bench.json
"""

Method = Annotated[
    str,
    typer.Argument(
        metavar="METHOD",
        help=f"a learned method: {', '.join(learned.names())}",
        parser=one_of(*learned.names()),
    ),
]
Timed = Annotated[Literal["stepprune"], typer.Argument(metavar="METHOD", help="a learned method")]
Backbone = Annotated[str, option("--backbone", "name or checkpoint folder", "NAME", as_text, WHAT)]
Folder = Annotated[Path | None, option("--images", "folder of --data's images", "DIR", as_path, WHAT)]


@dataclass(frozen=True)
@defaults_of(TrainOptions)
class Training:
    """The options of a training: those of `TrainOptions` that a person sets."""

    backbone: Backbone
    target_tokens: Annotated[
        float | None,
        real("--target-tokens", "mean K wanted, held by a bias on the stop logit (ours)", WHAT, "N", above=0),
    ]
    length_weight: Annotated[
        float | None,
        real("--length-weight", "fixed lambda (the paper's), instead of a target", WHAT, least=0),
    ]
    length_mode: Annotated[
        Literal["held", "paper"] | None,
        option(
            "--length-mode",
            "a mean held by a bias (goes with --target-tokens), or a fixed lambda with the batch's running "
            "K-bar (with --length-weight)",
            panel=WHAT,
        ),
    ]
    supervise: Annotated[
        Literal["loss", "evidence"],
        option(
            "--supervise",
            "learn from the next-token loss, or from the patches that hold the answer (ours; drawn data v2)",
            panel=WHAT,
        ),
    ]
    drawn: Annotated[
        Literal["v1", "v2"] | None,
        option(
            "--drawn",
            "version of Pocket-8 without --data (default: what the backbone is asked; v2 has evidence)",
            panel=WHAT,
        ),
    ]
    data: Annotated[
        Path | None,
        option(
            "--data",
            "json: LLaVA's instruction format, or a list of objects with image and caption (default: "
            "Pocket-8)",
            "FILE",
            as_path,
            WHAT,
        ),
    ]
    images: Folder
    text: Annotated[
        Literal["on", "off"],
        option("--text", "whether the policy reads the prompt (diffprune: off by default)", panel=WHAT),
    ]
    aggregation: Annotated[Aggregation, option("--aggregation", "of scores, Table 4 (b)", panel=WHAT)]
    causal_encoder: Annotated[bool, flag("--causal-encoder", "Table 4 (a)", WHAT)]
    decoder_layers: Annotated[int, count("--decoder-layers", "of the pointer decoder", WHAT)]
    pointer: Annotated[
        Literal["projection", "attention"],
        option(
            "--pointer",
            "the logits: a projection of the decoder's output, or its last cross-attention's",
            panel=WHAT,
        ),
    ]
    temperature: Annotated[float, real("--temperature", "tau", WHAT, above=0)]
    max_steps: Annotated[int | None, count("--max-steps", "K_max (default: three times the target)", WHAT)]
    gamma: Annotated[
        float | None, real("--gamma", "decay (default: exp(-1/2 / target))", WHAT, above=0, most=1)
    ]
    sharpness: Annotated[float, real("--sharpness", "of SoftTopK at the start", WHAT, above=0)]
    final_sharpness: Annotated[float, real("--final-sharpness", "at the end", WHAT, above=0)]
    sharpen_until: Annotated[
        float, real("--sharpen-until", "share of steps in which sharpness rises", WHAT, above=0, most=1)
    ]
    text_gate_until: Annotated[
        float,
        real("--text-gate-until", "share of steps in which alpha rises to 1", WHAT, least=0, most=1),
    ]
    words_from: Annotated[
        Literal["patches", "random"],
        option(
            "--words-from",
            "where the words' projection starts: by least squares from the patches, or at random",
            panel=WHAT,
        ),
    ]
    k_from: Annotated[
        Literal["batch", "sample"] | None,
        option(
            "--k-from",
            "K-bar: the batch's running mean (the paper's; default at a fixed lambda) or each sample's "
            "(ours; default where a mean is held)",
            panel=WHAT,
        ),
    ]
    slots: Annotated[
        int | None, count("--slots", "places of an image that the LLM reads (default: all)", WHAT)
    ]
    chain: Annotated[int, count("--chain", "straight-through links followed; -1: all", WHAT, least=-1)]
    start_from: Annotated[
        Path | None,
        option("--start-from", "go on from this checkpoint's weights (ours)", "FILE", as_path, HOW),
    ]
    steps: Annotated[
        int, count("--steps", "of the optimiser; 0: not trained, only calibrated (a control)", HOW, least=0)
    ]
    batch_size: Annotated[int, count("--batch-size", "questions per process and micro-step", HOW)]
    accumulate: Annotated[int, count("--accumulate", "micro-steps per step", HOW)]
    questions: Annotated[int, count("--questions", "questions on each image of a batch", HOW)]
    lr: Annotated[float, real("--lr", "learning rate of the policy", HOW, above=0)]
    token_lr: Annotated[
        float,
        real(
            "--token-lr",
            "of the words' projection and the learned vectors, as a share of their size; 0: as --lr",
            HOW,
            least=0,
        ),
    ]
    denoiser_lr: Annotated[float, real("--denoiser-lr", "of the denoiser", HOW, above=0)]
    warmup: Annotated[int, count("--warmup", "steps of the learning rate's rise", HOW, 0, metavar="STEPS")]
    weight_decay: Annotated[float, real("--weight-decay", "of matrices", HOW, least=0)]
    clip: Annotated[float, real("--clip", "of the gradient's norm", HOW, above=0)]
    seed: Seed
    precision: Annotated[Literal["no", "bf16", "fp16"], option("--precision", "mixed precision", panel=HOW)]
    dtype: Annotated[Dtype, option("--dtype", "of the frozen model's weights", panel=HOW)]
    checkpointing: Annotated[
        bool, flag("--checkpointing", "compute the LLM's layers twice instead of keeping what they made", HOW)
    ]
    device: Annotated[
        Literal["auto", "cpu"], option("--device", "auto: the GPU that accelerate gives, if any", panel=HOW)
    ]
    workers: Annotated[int, count("--workers", "processes that draw or read images ahead", HOW, least=0)]
    log_every: Annotated[int, count("--log-every", "steps between two lines", HOW, metavar="STEPS")]
    save_every: Annotated[int, count("--save-every", "for --resume", HOW, metavar="STEPS")]

    def train_options(
        self, method: str, said: typer.Context, preset: str | None = None, **changes: object
    ) -> TrainOptions:
        """Of the method's training: what the command line says, else the preset, else the method's defaults.

        Args:
            method: name of a learned method.
            said: the command line.
            preset: name of one.
            changes: further options, `out` among them.

        Raises:
            UserError: the options do not fit together, or say nothing to the method.
        """
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        settings["chain"] = None if self.chain == -1 else self.chain
        given = {n: v for n, v in settings.items() if _given(said, n)}
        return TrainOptions(**settings | learned.settled(method, given, preset) | changes)


def _presets() -> str:
    """For the help: which method has which."""
    found = {name: ", ".join(learned.find(name).PRESETS) for name in learned.names()}
    return "; ".join(f"{name}: {own}" for name, own in found.items() if own)


def _given(said: typer.Context, name: str) -> bool:
    return said.get_parameter_source(name).name == "COMMANDLINE"


@dataclass(frozen=True)
class AblationTraining(Training):
    """The same with an ablation's own defaults."""

    steps: Annotated[int, count("--steps", "of the optimiser", HOW)] = AblationOptions.steps


@command("train", examples=TRAIN)
def train(
    said: typer.Context,
    method: Method,
    options: Training,
    out: Annotated[
        Path | None,
        option(
            "--out",
            "checkpoint to write (default: where run_all.py finds it; where a shipped one is, below "
            f"{LOCAL} instead)",
            "FILE",
            as_path,
            WHAT,
        ),
    ] = None,
    preset: Annotated[
        str | None,
        option("--preset", f"options by name, unless given: {_presets()}", "NAME", as_text, HOW),
    ] = None,
    resume: Annotated[
        bool, flag("--resume", "go on with the run of the same --out", HOW)
    ] = TrainOptions.resume,
    stop_at: Annotated[
        int | None, count("--stop-at", "pause there (schedules follow --steps)", HOW, metavar="STEP")
    ] = TrainOptions.stop_at,
) -> int:
    """Train a learned method's policy on a frozen backbone.

    The vision tower and the language model stay as they are. Writes the checkpoint, its description and
    calibration (.json), a log of every step (.csv), learning curves (.png) and a summary with the gap
    between training and inference. Give --target-tokens or --length-weight.
    """
    settings = options.train_options(method, said, preset, out=out, resume=resume, stop_at=stop_at)
    _check_files(settings)
    from harness.pocket.supplies import PocketSupplies
    from methods.stepprune.training.train import train

    train(_destined(settings), PocketSupplies())
    return 0


def _check_files(settings: TrainOptions) -> None:
    """Raises UserError for a backbone, data or checkpoint that is not there, before anything is loaded."""
    from backbones.hub.find import find

    for name, path in (("--data", settings.data), ("--start-from", settings.start_from)):
        if path is not None and not path.is_file():
            raise UserError(f"{name} {path}: there is no such file")
    if settings.images is not None and not settings.images.is_dir():
        raise UserError(f"--images {settings.images}: there is no such folder")
    find(settings.backbone)


def _destined(settings: TrainOptions) -> TrainOptions:
    """With the checkpoint's place: `--out`, or where run_all.py finds it by itself; if a shipped one lies
    there, or no run shall find it, that of local runs (`--methods METHOD:checkpoint=FILE` takes it there)."""
    from methods.stepprune import checkpoint

    if settings.out is not None:
        return settings
    method = learned.find(settings.method)
    settings = dataclasses.replace(settings, out=checkpoint.default_path(settings, method))
    shipped = settings.out.exists() and not settings.working_folder.exists()
    if shipped or not method.serves(settings):
        local = LOCAL / settings.method / settings.out.parent.name / settings.out.name
        settings = dataclasses.replace(settings, out=local)
    return settings


@command("ablate", examples=ABLATE)
def ablate(
    said: typer.Context,
    method: Method,
    options: AblationTraining,
    folder: Annotated[
        Path | None,
        option("--folder", "for results (default: results/METHOD/ablations)", "DIR", as_path, WHAT),
    ] = None,
    rows: Annotated[
        list[str],
        option(
            "--rows",
            "variants: the paper's Table 4, switches that are ours, values that the paper leaves open",
            "|".join(get_args(Rows)) + "...",
            one_of(*get_args(Rows)),
            WHAT,
        ),
    ] = AblationOptions.rows,
    seeds: Annotated[
        int, count("--seeds", "train each with so many, --seed and the next ones", HOW)
    ] = AblationOptions.seeds,
) -> int:
    """Train and compare variants of a learned method (Table 4).

    Every variant is trained in the same way and calibrated to the same mean number of tokens, then
    compared on held-out questions. A row that is finished is not trained again. Without --target-tokens
    and --length-weight the target is 64 tokens.
    """
    folder = folder or Path("results") / method / "ablations"
    changes: dict[str, object] = {"out": folder / f"{method}.safetensors"}
    if not _given(said, "steps"):
        changes["steps"] = AblationOptions.steps
    if options.target_tokens is None and options.length_weight is None:
        changes["target_tokens"] = AblationOptions.target_tokens
    settings = options.train_options(method, said, **changes)
    _check_files(settings)
    from harness.pocket.supplies import PocketSupplies
    from methods.stepprune.training import ablate

    chosen = AblationOptions(folder, tuple(dict.fromkeys(rows)), seeds)
    return ablate.main(chosen, settings, PocketSupplies())


@command("calibrate", examples=CALIBRATE)
def calibrate(
    method: Method,
    checkpoint: Annotated[str, option("--checkpoint", "file, or name of a shipped one", "FILE", as_text)],
    tokens: Annotated[
        list[float], option("--tokens", "means wanted, one or several", "N...", number(above=0))
    ],
    backbone: Backbone = CalibrateOptions.backbone,
    images: Annotated[int, count("--images", "held-out images", HOW)] = CalibrateOptions.images,
    device: Device = CalibrateOptions.device,
) -> int:
    """Calibrate a checkpoint to further mean token counts."""
    from backbones.hub.find import find
    from harness.pocket.supplies import PocketSupplies
    from harness.run.device import resolve
    from methods.stepprune.training import calibrate

    find(backbone)

    options = CalibrateOptions(checkpoint, tuple(tokens), backbone, images, resolve(device), method)
    return calibrate.run(options, PocketSupplies())


@command("bench-policy", examples=BENCH)
def bench_policy(
    method: Timed,
    width: Annotated[int, count("--width", "of the vision tower", WHAT)] = BenchOptions.width,
    text_width: Annotated[
        int, count("--text-width", "of the language model", WHAT)
    ] = BenchOptions.text_width,
    visual_tokens: Annotated[
        int, count("--visual-tokens", "of an image", WHAT, most=LONGEST_TEXT)
    ] = BenchOptions.visual_tokens,
    text_tokens: Annotated[
        int, count("--text-tokens", "of a question", WHAT, most=LONGEST_TEXT)
    ] = BenchOptions.text_tokens,
    steps: Annotated[
        list[int], option("--steps", "steps taken, one or several numbers", "N...", whole(), WHAT)
    ] = BenchOptions.steps,
    batch_size: BatchSizes = BenchOptions.batch_size,
    device: Device = BenchOptions.device,
    dtype: Annotated[Dtype, option("--dtype", "of the weights", panel=HOW)] = BenchOptions.dtype,
    repeats: Annotated[int, count("--repeats", "calls timed", HOW)] = BenchOptions.repeats,
    report: Annotated[Path | None, option("--report", "JSON file to write", "FILE", as_path, HOW)] = None,
) -> int:
    """Time a learned method's selection at real size, with random weights."""
    from harness.bench import policy

    return policy.run(
        BenchOptions(
            width,
            text_width,
            visual_tokens,
            text_tokens,
            tuple(steps),
            tuple(batch_size),
            device,
            dtype,
            repeats,
            report,
        )
    )
