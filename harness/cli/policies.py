"""Command lines of the methods that are trained: `train`, `calibrate`, `ablate`, `bench-policy`. Options
only; what they do is imported when they run.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

METHODS = ("stepprune",)
#: for checkpoints that would replace a shipped one
LOCAL = Path("results/runs/stepprune")
AGGREGATIONS = ("full", "alive", "uniform", "last")


TRAIN = """\
Train the policy of a learned method; the vision tower and the language model stay as they are. Writes the
checkpoint, its description and calibration (.json), a log of every step (.csv), learning curves (.png) and a
summary with the gap between training and inference.
"""
TRAIN_EXAMPLES = """\
examples:
  python -m harness train stepprune --backbone pocket-llava --target-tokens 64
  python -m harness train stepprune --target-tokens 64 --slots 288 --max-steps 160    faster; as shipped
  python -m harness train stepprune --length-weight 0.02    the paper's way: lambda decides the mean
  python -m harness train stepprune --target-tokens 64 --resume    go on with a run that was stopped
  python -m harness train stepprune --backbone llava-1.5-7b --target-tokens 64 --precision bf16 \\
      --data llava_v1_5_mix665k.json --images images/    LLaVA's instruction data
  accelerate launch -m harness train stepprune --target-tokens 64    one process a GPU

then: python run_all.py --methods stepprune:checkpoint=FILE,random --budget 64
"""
ABLATE = """\
Train variants of a learned method in the same way, calibrate each to the same mean number of tokens, and
compare them on held-out questions. A row that is finished is not trained again.
"""
ABLATE_EXAMPLES = """\
examples:
  python -m harness ablate stepprune                                    Table 4
  python -m harness ablate stepprune --rows paper open --seeds 3        and what the paper leaves open
  python -m harness ablate stepprune --steps 40 --batch-size 16 --slots 192 --max-steps 128 --warmup 16
"""


def add_commands(commands) -> dict[str, Callable[[argparse.Namespace], int]]:
    """Add the parsers to `python -m harness`'s; the handler of each command."""
    from harness.cli.app import positive

    train = commands.add_parser(
        "train", help="train a learned method on a frozen backbone", **_text(TRAIN, TRAIN_EXAMPLES)
    )
    _method(train)
    train.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="checkpoint to write (default: where run_all.py finds it; where a shipped one is, below "
        f"{LOCAL} instead)",
    )
    _training(train, steps=160, length_required=True)
    train.add_argument("--resume", action="store_true", help="go on with the run of the same --out")
    train.add_argument("--stop-at", type=int, metavar="STEP", help="pause there (schedules follow --steps)")

    ablate = commands.add_parser(
        "ablate",
        help="train and compare variants of a learned method (Table 4)",
        **_text(ABLATE, ABLATE_EXAMPLES),
    )
    _method(ablate)
    ablate.add_argument(
        "--folder", type=Path, default=Path("results/stepprune/ablations"), metavar="DIR", help="for results"
    )
    ablate.add_argument(
        "--rows",
        nargs="+",
        choices=("paper", "ours", "open"),
        default=["paper"],
        help="variants: the paper's Table 4 (default), switches that are ours, values that the paper leaves "
        "open",
    )
    ablate.add_argument(
        "--seeds",
        type=positive,
        default=1,
        metavar="N",
        help="train each with so many, --seed and the next ones",
    )
    _training(ablate, steps=60, length_required=False)

    calibrate = commands.add_parser("calibrate", help="calibrate a checkpoint to further mean token counts")
    _method(calibrate)
    calibrate.add_argument(
        "--checkpoint", required=True, metavar="FILE", help="file, or name of a shipped one"
    )
    calibrate.add_argument("--backbone", default="pocket-llava", metavar="NAME")
    calibrate.add_argument("--tokens", type=float, nargs="+", required=True, metavar="N", help="means wanted")
    calibrate.add_argument("--images", type=int, default=48, metavar="N", help="held-out images (default 48)")
    calibrate.add_argument("--device", default="cpu")

    bench = commands.add_parser("bench-policy", help="time a learned method's selection at real size")
    _method(bench)
    bench.add_argument("--width", type=int, default=1024, help="of the vision tower (default 1024)")
    bench.add_argument("--text-width", type=int, default=4096, help="of the language model (default 4096)")
    bench.add_argument("--visual-tokens", type=int, default=576)
    bench.add_argument("--text-tokens", type=int, default=62)
    bench.add_argument("--steps", type=int, nargs="+", default=[64], help="steps taken (default 64)")
    bench.add_argument("--batch-size", type=int, nargs="+", default=[1])
    bench.add_argument("--device", default="auto")
    bench.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    bench.add_argument("--repeats", type=int, default=20)
    bench.add_argument("--report", type=Path, metavar="FILE", help="JSON file to write")
    return {"train": _train, "ablate": _ablate, "calibrate": _calibrate, "bench-policy": _bench}


def _text(description: str, examples: str) -> dict[str, object]:
    return {
        "description": description,
        "epilog": examples,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }


def _method(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("method", choices=METHODS)


def _training(parser: argparse.ArgumentParser, steps: int, length_required: bool) -> None:
    what = parser.add_argument_group("what to train")
    what.add_argument("--backbone", default="pocket-llava", metavar="NAME", help="name or checkpoint folder")
    length = what.add_mutually_exclusive_group(required=length_required)
    length.add_argument(
        "--target-tokens",
        type=float,
        metavar="N",
        help="mean K wanted, held by a bias on the stop logit (ours)"
        + ("" if length_required else ", default 64"),
    )
    length.add_argument("--length-weight", type=float, metavar="X", help="fixed lambda (the paper's)")
    what.add_argument(
        "--data", type=Path, metavar="FILE", help="json in LLaVA's instruction format (default: Pocket-8)"
    )
    what.add_argument("--images", type=Path, metavar="DIR", help="folder of --data's images")
    what.add_argument("--aggregation", choices=AGGREGATIONS, default="full", help="of scores, Table 4 (b)")
    what.add_argument("--causal-encoder", action="store_true", help="Table 4 (a)")
    what.add_argument("--decoder-layers", type=int, default=1, metavar="N", help="(default 1)")
    what.add_argument(
        "--pointer",
        choices=("projection", "attention"),
        default="projection",
        help="the logits: a projection of the decoder's output (default), or its last cross-attention's",
    )
    what.add_argument("--temperature", type=float, default=0.2, help="tau (default 0.2)")
    what.add_argument("--max-steps", type=int, help="K_max (default: three times the target)")
    what.add_argument("--gamma", type=float, help="decay (default: exp(-1/2 / target))")
    what.add_argument("--sharpness", type=float, default=0.2, help="of SoftTopK at the start (default 0.2)")
    what.add_argument("--final-sharpness", type=float, default=0.3, help="at the end (default 0.3)")
    what.add_argument(
        "--text-gate-until",
        type=float,
        default=1.0,
        metavar="X",
        help="share of steps in which alpha rises to 1 (default 1)",
    )
    what.add_argument(
        "--k-from",
        choices=("batch", "sample"),
        default="sample",
        help="K-bar: the batch's running mean (the paper's) or each sample's (ours, default)",
    )
    what.add_argument("--slots", type=int, help="places of an image that the LLM reads (default: all)")
    what.add_argument("--chain", type=int, default=1, help="straight-through links followed; -1: all")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--start-from", type=Path, metavar="FILE", help="go on from this checkpoint's weights (ours)"
    )
    how.add_argument("--steps", type=int, default=steps, help=f"(default {steps})")
    how.add_argument(
        "--batch-size",
        type=int,
        default=32,
        metavar="N",
        help="questions a process and micro-step (default 32)",
    )
    how.add_argument("--accumulate", type=int, default=1, metavar="N", help="micro-steps a step (default 1)")
    how.add_argument(
        "--questions", type=int, default=4, metavar="N", help="questions on each image of a batch (default 4)"
    )
    how.add_argument("--lr", type=float, default=4e-4, metavar="X", help="of the policy (default 4e-4)")
    how.add_argument("--denoiser-lr", type=float, default=1e-3, metavar="X", help="(default 1e-3)")
    how.add_argument("--warmup", type=int, default=40, metavar="STEPS", help="(default 40)")
    how.add_argument("--weight-decay", type=float, default=0.01, metavar="X", help="(default 0.01)")
    how.add_argument(
        "--clip", type=float, default=1.0, metavar="X", help="of the gradient's norm (default 1)"
    )
    how.add_argument("--seed", type=int, default=0, help="of weights, questions and noise (default 0)")
    how.add_argument("--precision", choices=("no", "bf16", "fp16"), default="no", help="mixed precision")
    how.add_argument("--device", choices=("auto", "cpu"), default="auto")
    how.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="processes that draw or read images ahead (default 0)",
    )
    how.add_argument("--log-every", type=int, default=10, metavar="STEPS", help="(default 10)")
    how.add_argument(
        "--save-every", type=int, default=100, metavar="STEPS", help="for --resume (default 100)"
    )


def train_options(options: argparse.Namespace, **changes):
    """The namespace's entries that are settings of a run. Raises UserError if they do not fit together."""
    from methods.stepprune.training.train import TrainOptions

    names = {f.name for f in dataclasses.fields(TrainOptions)}
    settings = {k: v for k, v in vars(options).items() if k in names} | changes
    settings["chain"] = None if settings["chain"] < 0 else settings["chain"]
    return TrainOptions(**settings)


def _train(options: argparse.Namespace) -> int:
    from methods.stepprune.training.train import train

    train(_destined(options))
    return 0


def _destined(options: argparse.Namespace):
    """`train_options` with the checkpoint's place: `--out`, or where run_all.py finds it by itself; if a
    shipped one lies there, that of local runs (`--methods stepprune:checkpoint=FILE` takes it from there)."""
    from methods.stepprune import checkpoint

    if options.out is not None:
        return train_options(options)
    settings = train_options(options, out=checkpoint.default_path(options))
    shipped = settings.out.exists() and not settings.working_folder.exists()
    if shipped:
        settings = dataclasses.replace(settings, out=LOCAL / settings.out.relative_to(checkpoint.SHIPPED))
    return settings


def _ablate(options: argparse.Namespace) -> int:
    from methods.stepprune.training import ablate

    if options.target_tokens is None and options.length_weight is None:
        options.target_tokens = 64.0
    return ablate.main(options, train_options(options, out=options.folder / "stepprune.safetensors"))


def _calibrate(options: argparse.Namespace) -> int:
    from methods.stepprune.training import calibrate

    return calibrate.run(options)


def _bench(options: argparse.Namespace) -> int:
    from methods.stepprune import bench

    return bench.run(options)
