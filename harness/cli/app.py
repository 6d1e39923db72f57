"""Command lines: `run_all.py` and `python -m harness`. Nothing heavy is imported before the arguments are
read.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from harness.run.processes import launched, local_rank
from methods.errors import UserError

DESCRIPTION = """\
Compare visual-token pruning methods on one multimodal language model: accuracy on eight tasks (scored by
lmms-eval's own code), FLOPs, and prefill latency, all measured here. The default backbone and the default
data are part of this repository; --tasks paper runs the benchmarks themselves. Nothing is asked of the
network unless you say --download.
"""

EXAMPLES = """\
examples:
  python run_all.py --budget 64                       every method, keeping 64 of 576 visual tokens
  python run_all.py --budget 192 128 64               three budgets, one leaderboard with three blocks
  python run_all.py --budget 64 --methods fastv:k=3   one method (and vanilla, which ratios refer to)
  python run_all.py --budget 64 --tasks pope,gqa --limit 20      a quick look
  python run_all.py --list                            what there is to choose from

the paper's tables (a GPU; weights and data from the Hugging Face cache, a mirror --data DIR, or --download):
  python run_all.py --backbone llava-1.5-7b --tasks paper --budget 192 128 64
  python run_all.py --backbone qwen2.5-vl-7b --tasks paper --budget 0.333 0.222 0.111
  python run_all.py --backbone llava-1.5-13b --tasks paper:gqa,pope --quantize 4bit --budget 64
  python -m harness doctor --backbone llava-1.5-7b --tasks paper     could it run here? what is missing?

on several GPUs or machines (the answers of a cell split between processes; cells split between workers):
  accelerate launch --num_processes 4 run_all.py --budget 64      one process a GPU
  torchrun --nproc_per_node 2 run_all.py --budget 64 --device cpu
  python run_all.py --budget 64 --engine ray --address auto       one worker a GPU of the cluster

Finished cells and answers are kept below --out. The same command again re-uses them and says so; a killed run
goes on where it stopped, on one process or many. Only one run at a time writes to a folder. A damaged file is
named, moved aside (NAME.broken) and computed anew. When memory runs out, batches are halved, down to one
question; if that does not fit, the cell is marked failed and the others go on.

Exit code: 0 all well, 1 a cell failed (the others are in the table), 2 bad input.
"""


def run_all(arguments: Sequence[str] | None = None) -> int:
    """The command behind run_all.py. Returns its exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    return _guard(lambda: _run(options))


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m harness COMMAND`: `run` is run_all.py, the others are tools around it."""
    parser = argparse.ArgumentParser(prog="python -m harness", description="Tools around run_all.py.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_run_options(commands.add_parser("run", help="what run_all.py does", **_run_text()))

    parity = commands.add_parser("parity", help="check the methods against recordings of the authors' code")
    parity.add_argument(
        "--golden", type=Path, required=True, metavar="DIR", help="folder with the recordings"
    )

    bench = commands.add_parser(
        "sweep-bench", help="how much faster a sweep is than its cells one by one at batch size 1"
    )
    _add_run_options(bench)
    bench.add_argument(
        "--report", type=Path, metavar="FILE", help="JSON file to write (default OUT/sweep_bench.json)"
    )

    _add_flops_options(
        commands.add_parser("flops", help="FLOPs of every method at true 7B and 13B shapes, without weights")
    )
    _add_check_options(
        commands.add_parser("check", help="published numbers and our own under watch; exit code 1: one fails")
    )

    adaptive = commands.add_parser(
        "adaptive", help="what a method that chooses its own number of tokens spends them on (Fig. 4)"
    )
    adaptive.add_argument("folder", type=Path, metavar="RUN_FOLDER", help="a run with the method's cells")
    adaptive.add_argument("--method", default="stepprune", metavar="SPEC", help="(default stepprune)")
    adaptive.add_argument("--data", type=Path, metavar="DIR", help="as in run")
    adaptive.add_argument("--out", type=Path, metavar="DIR", help="for the report (default: the run)")

    overlay = commands.add_parser("overlay", help="draw what methods keep of an image, over the image")
    overlay.add_argument("--backbone", default="pocket-llava", metavar="NAME", help="as in run")
    overlay.add_argument("--methods", default="stepprune,visionzip,fastv", metavar="LIST", help="as in run")
    overlay.add_argument("--budget", default="64", metavar="N", help="as in run (default 64)")
    overlay.add_argument(
        "--images",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="(default: two drawn scenes)",
    )
    overlay.add_argument("--question", metavar="TEXT", help="asked about every image")
    overlay.add_argument("--device", default="cpu", metavar="NAME", help="cpu or cuda (default cpu)")
    overlay.add_argument(
        "--out", type=Path, default=Path("overlay.png"), metavar="FILE", help="(default overlay.png)"
    )

    from harness.cli import efficiency, policies
    from harness.doctor import command as doctor

    others = (
        efficiency.add_commands(commands) | policies.add_commands(commands) | doctor.add_command(commands)
    )
    options = parser.parse_args(arguments)
    return _guard(lambda: (_COMMANDS | others)[options.command](options))


def _add_flops_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backbone",
        default="llava-1.5-7b",
        metavar="NAME",
        help="one of backbones/shapes, or the path of a config.json",
    )
    parser.add_argument("--budget", nargs="+", default=["192", "128", "64"], metavar="N", help="as in run")
    parser.add_argument("--methods", default="all", metavar="LIST", help="as in run")
    parser.add_argument(
        "--text-tokens", type=positive, default=62, metavar="N", help="length of the text (default 62)"
    )
    parser.add_argument(
        "--image-size", type=positive, metavar="PX", help="side of the image, for backbones that take any"
    )
    parser.add_argument(
        "--visual-only-macs",
        action="store_true",
        help="also the theoretical column of other papers: LLM layers on visual tokens alone, 1 per MAC",
    )


def _add_check_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders", nargs="*", type=Path, metavar="RUN_FOLDER", help="default: the runs committed in results/"
    )
    parser.add_argument(
        "--baseline", type=Path, metavar="DIR", help="run to compare with (default: the committed one)"
    )
    parser.add_argument("--all", action="store_true", help="print what agrees, too")
    parser.add_argument("--github", action="store_true", help="print annotations for GitHub's checks as well")


def _flops(options: argparse.Namespace) -> int:
    from harness.report import flops_report
    from harness.run.config import parse_budget

    budgets, specs = [parse_budget(b) for b in options.budget], split_specs(options.methods)
    return flops_report.run(
        options.backbone, budgets, specs, options.text_tokens, options.image_size, options.visual_only_macs
    )


def _check(options: argparse.Namespace) -> int:
    from harness import check

    return check.run(options.folders, options.baseline, options.github, options.all)


def _parity(options: argparse.Namespace) -> int:
    from harness.parity import compare as parity

    return parity.main(options.golden)


def _adaptive(options: argparse.Namespace) -> int:
    from harness.report import adaptive

    return adaptive.run(options.folder, options.method, options.data, options.out)


def _overlay(options: argparse.Namespace) -> int:
    from harness.report import overlay
    from harness.run.config import parse_budget

    methods, budget = split_specs(options.methods), parse_budget(options.budget)
    return overlay.run(
        options.backbone, methods, budget, options.out, options.images, options.question, options.device
    )


def _sweep_bench(options: argparse.Namespace) -> int:
    from harness.bench import sweep

    if options.engine != "local":
        raise UserError("sweep-bench times this machine; leave --engine out")
    config = _config(options)
    return sweep.run(config, options.report or config.out / "sweep_bench.json")


def _run(options: argparse.Namespace) -> int:
    if options.list:
        return _list()
    from harness.run import runner

    return runner.run(_config(options))


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "run": _run,
    "parity": _parity,
    "sweep-bench": _sweep_bench,
    "adaptive": _adaptive,
    "overlay": _overlay,
    "flops": _flops,
    "check": _check,
}


def _guard(command: Callable[[], int]) -> int:
    """Bad input becomes one line and exit code 2; Ctrl-C says how to go on."""
    try:
        return command()
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _run_text() -> dict:
    return {
        "description": DESCRIPTION,
        "epilog": EXAMPLES,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="run_all.py", **_run_text())
    _add_run_options(parser)
    return parser


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to compare")
    what.add_argument(
        "--budget",
        nargs="+",
        default=["64"],
        metavar="N",
        help="visual tokens to keep of an image, one or several (default 64); below 1: a fraction, as 0.111",
    )
    what.add_argument(
        "--backbone",
        default="pocket-llava",
        metavar="NAME",
        help="name, checkpoint folder, or hub id of the LLaVA-1.5 or Qwen2.5-VL family (default "
        "pocket-llava; --list names the others)",
    )
    what.add_argument(
        "--revision", metavar="REV", help="branch, tag or commit of a hub checkpoint (default: its main)"
    )
    what.add_argument(
        "--methods",
        default="all",
        metavar="LIST",
        help="all, or comma-separated methods with their parameters: fastv,visionzip or fastv:k=3,random",
    )
    what.add_argument(
        "--tasks",
        metavar="LIST",
        help="all, or comma-separated tasks: pope,gqa, on Pocket-8. paper: the benchmarks themselves, in the "
        "columns of the paper's table for the backbone; paper:pope,gqa: some of them (docs/benchmarks.md). "
        "Default: Pocket-8 in those columns, eight for LLaVA-1.5 and five for Qwen2.5-VL",
    )
    what.add_argument(
        "--limit",
        default=None,
        metavar="N",
        help="about N documents a task, a fixed slice with question groups kept whole; all: every document "
        "(default: the slice named in the table's caption)",
    )
    what.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder of parquet files (default: the shipped Pocket-8, drawn on first use); with --tasks "
        "paper: a mirror of the hub's data sets, DIR/lmms-lab-encoder/POPE/... (default: the Hugging Face "
        "cache)",
    )
    what.add_argument(
        "--blind",
        action="store_true",
        help="replace every image by a grey one: what guessing from the question alone scores",
    )
    what.add_argument(
        "--seed", type=int, default=0, help="seed of random methods and of the bootstrap (default 0)"
    )
    what.add_argument("--list", action="store_true", help="list methods, tasks and backbones, and exit")

    how = parser.add_argument_group("how to run")
    how.add_argument(
        "--batch-size",
        type=positive,
        default=8,
        metavar="N",
        help="questions at once; answers do not depend on it (default 8)",
    )
    how.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 (default: cuda if there is one)")
    how.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights (default float32; with --tasks paper on a GPU bfloat16)",
    )
    _add_load_options(how)
    how.add_argument(
        "--max-new-tokens",
        type=positive,
        metavar="N",
        help="cap on an answer's length (default: 16 for Pocket-8; for --tasks paper each task's own limit)",
    )
    how.add_argument(
        "--latency-repeats",
        type=positive,
        default=15,
        metavar="N",
        help="prefills timed for each method and budget (default 15)",
    )
    how.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for results (default results/runs/BACKBONE[-paper][-blind])",
    )
    how.add_argument(
        "--fresh",
        action="store_true",
        help="compute everything again, replacing earlier results of these cells",
    )

    where = parser.add_argument_group("where to run")
    where.add_argument(
        "--engine",
        default="local",
        choices=("local", "ray"),
        help="local: here, in one process or in those of a launcher (default); ray: cells spread over a Ray "
        "cluster, one worker a GPU, or a CPU where there is no GPU (pip install '.[cluster]')",
    )
    where.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="Ray cluster to use, or auto for the one of this machine (default: a local one for this run)",
    )
    where.add_argument(
        "--workers", type=positive, metavar="N", help="Ray workers (default: every GPU, or every CPU)"
    )


def positive(text: str) -> int:
    """For argparse: a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _config(options: argparse.Namespace):
    from harness.run.config import RunConfig, parse_budget

    budgets = tuple(dict.fromkeys(parse_budget(b) for b in options.budget))
    if options.engine == "local" and (options.address or options.workers):
        raise UserError("--address and --workers say where Ray runs; add --engine ray, or leave them out")
    suite, benchmarks = chosen_tasks(options)
    device = options.device if options.engine == "ray" else resolve_device(options.device)
    return RunConfig(
        budgets=budgets,
        benchmarks=benchmarks,
        methods=tuple(split_specs(options.methods)),
        out=options.out or default_out(options.backbone, suite, options.blind),
        backbone=options.backbone,
        suite=suite,
        data=options.data,
        limit=_limit(options.limit, suite.default_limit),
        limits=dict(suite.default_limits) if options.limit is None else {},
        load=load_options(options, suite),
        batch_size=options.batch_size,
        device=device,
        dtype=options.dtype or default_dtype(suite, device),
        fresh=options.fresh,
        seed=options.seed,
        latency_repeats=options.latency_repeats,
        max_new_tokens=options.max_new_tokens,
        blind=options.blind,
        engine=options.engine,
        address=options.address,
        workers=options.workers,
    )


def _add_load_options(group) -> None:
    """How a checkpoint is found, loaded and spoken to; `load_options` reads them."""
    group.add_argument(
        "--download",
        action="store_true",
        help="get checkpoint and data from the hub where the cache lacks them, saying so first",
    )
    group.add_argument(
        "--device-map",
        choices=("auto", "balanced", "sequential"),
        help="spread the model over all GPUs (accelerate), in place of one --device",
    )
    group.add_argument(
        "--quantize",
        choices=("8bit", "4bit"),
        help="language model's weights in 8 or 4 bits; needs a GPU and the extra [quantize] (bitsandbytes)",
    )
    group.add_argument(
        "--llava-inputs",
        choices=("original", "checkpoint"),
        help="LLaVA's images and prompts as its own code makes them (padded to squares, its system sentence: "
        "the default with --tasks paper), or as the Hugging Face checkpoint does (the default otherwise)",
    )
    group.add_argument(
        "--min-pixels",
        type=positive,
        metavar="N",
        help="least pixels of Qwen2.5-VL's images (default with --tasks paper: lmms-eval's 200704, 256 "
        "visual tokens; otherwise the checkpoint's)",
    )
    group.add_argument(
        "--max-pixels",
        type=positive,
        metavar="N",
        help="most pixels (default with --tasks paper: lmms-eval's 1605632, 2048 tokens)",
    )


def load_options(options: argparse.Namespace, suite):
    """`backbones.hub.options.LoadOptions` of the arguments; the paper's benchmarks bring the conventions that
    published numbers were made with. UserError if they contradict each other."""
    from backbones.hub.options import QWEN_MAX_PIXELS, QWEN_MIN_PIXELS, LoadOptions
    from harness.tasks.suites import PAPER

    paper = suite is PAPER
    if options.min_pixels and options.max_pixels and options.min_pixels > options.max_pixels:
        raise UserError(f"--min-pixels {options.min_pixels} is more than --max-pixels {options.max_pixels}")
    qwen = paper and _family(options) == "qwen2_5_vl"
    least, most = (QWEN_MIN_PIXELS, QWEN_MAX_PIXELS) if qwen else (None, None)
    return LoadOptions(
        device_map=options.device_map,
        quantize=options.quantize,
        llava_inputs=options.llava_inputs or ("original" if paper else "checkpoint"),
        min_pixels=options.min_pixels or least,
        max_pixels=options.max_pixels or most,
        revision=options.revision,
        download=options.download,
    )


def chosen_tasks(options: argparse.Namespace):
    """`--tasks` -> (suite, benchmarks); the columns of a table depend on the backbone's family."""
    from harness.tasks.suites import PAPER, POCKET8, paper_columns, parse_suite, parse_tasks, pocket_columns

    if options.tasks is None:
        return POCKET8, tuple(pocket_columns(_family(options)))
    suite, names = parse_suite(options.tasks)
    if suite is PAPER and names == PAPER.name:
        return suite, tuple(paper_columns(_family(options)))
    return suite, tuple(parse_tasks(names))


def _family(options: argparse.Namespace) -> str:
    """Of the backbone: its short name tells, or else its config.json."""
    from backbones.hub.find import find
    from backbones.hub.known import KNOWN

    if options.backbone in KNOWN:
        return KNOWN[options.backbone].family
    return find(options.backbone, options.revision, options.download).family


def default_out(backbone: str, suite, blind: bool) -> Path:
    """The folder of a run's results when `--out` is not given."""
    own = "" if suite.synthetic else f"-{suite.name}"
    return Path("results", "runs", Path(backbone).name + own + "-blind" * blind)


def default_dtype(suite, device: str) -> str:
    """What `--dtype` is when it is not given. `auto` is still there with Ray alone, for a cluster's GPUs."""
    return "bfloat16" if not suite.synthetic and device.partition(":")[0] in ("cuda", "auto") else "float32"


def split_specs(text: str) -> list[str]:
    """`"fastv:k=3,schedule=average,random"` -> `["fastv:k=3,schedule=average", "random"]`.

    A comma separates both methods and parameters: a piece with `=` and no `:` belongs to the method before
    it.
    """
    specs: list[str] = []
    for piece in filter(None, (p.strip() for p in text.split(","))):
        if "=" in piece and ":" not in piece:
            if not specs:
                raise UserError(f"--methods {text}: {piece!r} stands before any method; write METHOD:{piece}")
            specs[-1] += ("," if ":" in specs[-1] else ":") + piece
        else:
            specs.append(piece)
    if not specs:
        raise UserError("--methods names no method; --list shows them")
    return specs


def _limit(text: str | None, default: int | None) -> int | None:
    if text is None:
        return default
    if text == "all":
        return None
    if text.isdigit() and int(text) > 0:
        return int(text)
    raise UserError(f"--limit {text}: give a number of documents of at least 1, or all")


def resolve_device(text: str) -> str:
    """`--device` as torch takes it; `auto`: a GPU if there is one. Raises UserError for one there is not."""
    import torch

    if launched() and torch.cuda.is_available() and text in ("auto", "cuda"):
        number, there = local_rank(), torch.cuda.device_count()
        if number >= there:
            raise UserError(
                f"process {number + 1} on this machine has no GPU of its own (torch sees {there}); launch "
                f"{there} here, or pass --device cpu"
            )
        torch.cuda.set_device(number)
        return f"cuda:{number}"
    if text == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise UserError(f"--device {text}: unknown; use cpu, cuda or cuda:0") from error
    if device.type == "cuda" and not (
        torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
    ):
        raise UserError(
            f"--device {text}: torch sees {torch.cuda.device_count()} CUDA devices; use --device cpu"
        )
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {text}: only cpu and cuda are supported")
    return text


def _list() -> int:
    import backbones
    from backbones.hub.known import KNOWN
    from harness.tasks.suites import BENCHMARKS, PAPER_COLUMNS
    from methods import registry

    print("methods (--methods NAME:parameter=value,...):")
    for name, cls in registry.available().items():
        print(f"  {name:13} {_first_sentence(cls)}")
    print("tasks (--tasks):")
    for b in BENCHMARKS.values():
        print(f"  {b.name:12} {b.title}: {b.why}")
    print("  paper        the benchmarks themselves, in the columns of the backbone's table:")
    for family, columns in PAPER_COLUMNS.items():
        print(f"               {family}: {', '.join(columns)}")
    print("backbones (--backbone):")
    for name in backbones.available():
        print(f"  {name}")
    for name, checkpoint in KNOWN.items():
        size = checkpoint.weight_bytes / 1e9
        print(f"  {name:13}  {checkpoint.repo} on the hub, {size:.0f} GB of weights")
    print("  or a checkpoint folder or hub id of the families LLaVA-1.5 and Qwen2.5-VL")
    return 0


def _first_sentence(thing: object) -> str:
    return re.split(r"(?<=\.)\s", " ".join((thing.__doc__ or "").split()), maxsplit=1)[0]
