"""Command line of `latency`. Options only; what it does is imported when it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

DESCRIPTION = """\
Time the prefill of every method, from pixels to the first token's logits, split into vision tower, selection
(the method's own work) and LLM; and with it decoding, memory and energy. Methods are measured in turn in one
process, under fused attention; the table gives medians, beside estimates from GPU datasheets. What each
column means, and its limits: docs/efficiency.md.
"""

EXAMPLES = """\
examples:
  python -m harness latency --budget 64                        pocket-llava, here
  python -m harness latency --backbone llava-1.5-7b --random-weights --budget 192 128 64 --batch-size 1 4
                                                               true 7B shape on a GPU, nothing downloaded
  python -m harness latency --backbone llava-1.5-7b --estimate --budget 64
                                                               no GPU: what datasheets say of one
  python -m harness latency --backbone CHECKPOINT_FOLDER --methods fastv:k=3,visionzip --device cuda

A random-weights backbone is a name of `harness flops`, or the path of a config.json. Nothing is resumed: the
same command measures again and replaces its files. Exit code: 0 all well, 1 a method failed or was left out,
2 bad input.
"""


def add_commands(commands) -> dict[str, Callable[[argparse.Namespace], int]]:
    """Add the parser to `python -m harness`'s; the handler of the command."""
    from harness.cli.app import positive

    parser = commands.add_parser(
        "latency",
        help="prefill latency, decoding, memory and energy of every method",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what to measure")
    what.add_argument(
        "--backbone", default="pocket-llava", metavar="NAME", help="as in run, or a shape (see below)"
    )
    what.add_argument("--budget", nargs="+", default=["64"], metavar="N", help="as in run (default 64)")
    what.add_argument("--methods", default="all", metavar="LIST", help="as in run")
    what.add_argument("--seed", type=int, default=0, help="of random methods (default 0)")
    weights = what.add_mutually_exclusive_group()
    weights.add_argument(
        "--random-weights",
        action="store_true",
        help="build the backbone's true shape on the device itself, from its configuration: latency does not "
        "depend on the values",
    )
    weights.add_argument(
        "--estimate", action="store_true", help="measure nothing: rows say so, beside their estimates"
    )
    what.add_argument(
        "--text-tokens",
        type=positive,
        metavar="N",
        help="length of the text, with --random-weights and --estimate (default 62, as in flops); a "
        "checkpoint gets questions of the default data",
    )
    what.add_argument("--data", type=Path, metavar="DIR", help="as in run")

    how = parser.add_argument_group("how to measure")
    how.add_argument(
        "--batch-size",
        nargs="+",
        type=positive,
        default=[1],
        metavar="N",
        help="copies of a question at once, one or several sizes (default 1)",
    )
    how.add_argument(
        "--repeats",
        type=positive,
        metavar="N",
        help="prefills of each method (default 15 on CPU, 50 on a GPU)",
    )
    how.add_argument(
        "--decode-tokens",
        type=positive,
        default=16,
        metavar="N",
        help="tokens decoded after each (default 16)",
    )
    how.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 (default: cuda if there is one)")
    how.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights (default bfloat16 on a GPU, float32 on CPU)",
    )
    how.add_argument(
        "--profile", action="store_true", help="print torch's profile of one prefill of each method, too"
    )
    how.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="JSON file to write, and a table with the suffix .md beside it "
        "(default results/runs/latency/BACKBONE-DEVICE.json)",
    )
    return {"latency": _latency}


def _latency(options: argparse.Namespace) -> int:
    from harness.cli.app import resolve_device, split_specs
    from harness.report import latency_report
    from harness.run.config import parse_budget

    device = resolve_device(options.device)
    cpu = device.partition(":")[0] == "cpu"
    return latency_report.run(
        latency_report.Request(
            backbone=options.backbone,
            budgets=tuple(dict.fromkeys(parse_budget(b) for b in options.budget)),
            methods=tuple(split_specs(options.methods)),
            weights="random" if options.random_weights else "none" if options.estimate else "checkpoint",
            text_tokens=options.text_tokens,
            data=options.data,
            batch_sizes=tuple(dict.fromkeys(options.batch_size)),
            repeats=options.repeats or (15 if cpu else 50),
            decode_tokens=options.decode_tokens,
            device=device,
            dtype=options.dtype or ("float32" if cpu else "bfloat16"),
            seed=options.seed,
            profile=options.profile,
            out=options.out,
        )
    )
