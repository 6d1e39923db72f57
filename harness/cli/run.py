"""`run` (what run_all.py does) and `sweep-bench`; and how the options of a run become a `RunConfig`."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from pathlib import Path
from typing import Annotated, get_args, get_origin, get_type_hints

import typer

from harness.cli.command import command
from harness.cli.options import RunOptions, as_path, flag, option, split_specs
from harness.cli.terminal import WIDTH
from harness.run.config import RunConfig
from methods.errors import UserError

EXAMPLES = """\
examples:
  python run_all.py --budget 64                     every method, keeping 64 of 576 visual tokens
  python run_all.py --budget 192 128 64             three budgets, one leaderboard with three blocks
  python run_all.py --budget 64 --methods fastv:k=3 one method (and vanilla, which ratios refer to)
  python run_all.py --budget 64 --tasks pope,gqa --limit 20      a quick look
  python run_all.py --list                          what there is to choose from

the paper's tables (a GPU; weights and data from the Hugging Face cache, a mirror --data DIR, or
--download):
  python run_all.py --backbone llava-1.5-7b --tasks paper --budget 192 128 64
  python run_all.py --backbone qwen2.5-vl-7b --tasks paper --budget 0.333 0.222 0.111
  python run_all.py --backbone llava-1.5-13b --tasks paper:gqa,pope --quantize 4bit --budget 64
  python -m harness doctor --backbone llava-1.5-7b --tasks paper     could it run? what is missing?

on several GPUs or machines (the answers of a cell split between processes; cells split between
workers):
  accelerate launch --num_processes 4 run_all.py --budget 64      one process per GPU
  torchrun --nproc_per_node 2 run_all.py --budget 64 --device cpu
  python run_all.py --budget 64 --engine ray --address auto       one worker per GPU of the cluster

Finished cells and answers are kept below --out. The same command again re-uses them and says so; a
killed run goes on where it stopped, on one process or many. Only one run at a time writes to a
folder. A damaged file is named, moved aside (NAME.broken) and computed anew. When memory runs out,
batches are halved, down to one question; if that does not fit, the cell is marked failed and the
others go on.

Exit code: 0 all well, 1 a cell failed (the others are in the table), 2 bad input.
"""


def show_version(asked: bool) -> None:
    """For `--version`: print it and stop."""
    if asked:
        from importlib.metadata import version

        from harness.store.records import package_versions

        others = ", ".join(f"{name} {number}" for name, number in package_versions().items())
        print(f"visual-token-pruning-bench {version('visual-token-pruning-bench')} ({others})")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", help="print versions and exit", callback=show_version, is_eager=True)
]


@command("run", examples=EXAMPLES)
def run(
    options: RunOptions,
    list: Annotated[
        bool, flag("--list", "list methods with their parameters, tasks and backbones, and exit")
    ] = False,
    version: Version = False,
) -> int:
    """Compare visual-token pruning methods on one multimodal language model.

    Accuracy on eight tasks (scored by lmms-eval's own code), FLOPs, and prefill latency, all measured
    here. The default backbone and the default data are part of this repository; --tasks paper runs the
    benchmarks themselves. Nothing is asked of the network unless you say --download.
    """
    if list:
        return list_all()
    from harness.run import runner

    return runner.run(config_of(options), _publish)


def _publish(session, outcome) -> str:
    """`leaderboard.publish`, imported when a run is done: bad input is refused sooner so."""
    from harness.report import leaderboard

    return leaderboard.publish(session, outcome)


@command("sweep-bench", examples="example:\n  python -m harness sweep-bench --budget 192 128 64 --limit 8\n")
def sweep_bench(
    options: RunOptions,
    report: Annotated[
        Path | None, option("--report", "JSON file to write (default OUT/sweep_bench.json)", "FILE", as_path)
    ] = None,
) -> int:
    """How much faster a sweep is than its cells one by one at batch size 1.

    Takes the options of run, on this machine alone.
    """
    from harness.bench import sweep

    if options.engine != "local":
        raise UserError("sweep-bench times this machine; leave --engine out")
    config = config_of(options)
    return sweep.run(config, report or config.out / "sweep_bench.json")


# ---- options to configuration


def config_of(options: RunOptions) -> RunConfig:
    """The configuration that the options mean. Raises UserError if they contradict each other, or name a
    backbone, task or device that is not there."""
    from harness.run.device import resolve

    if options.engine == "local" and (options.address or options.workers):
        raise UserError("--address and --workers say where Ray runs; add --engine ray, or leave them out")
    if options.fresh and options.keep_results:
        raise UserError("--fresh computes everything again, --keep-results nothing; leave one of them out")
    methods = tuple(split_specs(options.methods))
    suite, benchmarks = chosen_tasks(options)
    load = load_options(options, suite)
    device = options.device if options.engine == "ray" else resolve(options.device)
    limit = (
        suite.default_limit if options.limit is None else None if options.limit == "all" else options.limit
    )
    same = {f.name for f in dataclasses.fields(RunConfig)} & {f.name for f in dataclasses.fields(RunOptions)}
    given = {name: getattr(options, name) for name in same}
    return RunConfig(
        **given
        | {
            "budgets": tuple(dict.fromkeys(options.budget)),
            "benchmarks": benchmarks,
            "methods": methods,
            "out": options.out or default_out(options.backbone, suite, options.blind),
            "suite": suite,
            "limit": limit,
            "limits": dict(suite.default_limits) if options.limit is None else {},
            "load": load,
            "device": device,
            "dtype": options.dtype or default_dtype(suite, device),
        }
    )


def load_options(options: RunOptions, suite):
    """`backbones.hub.options.LoadOptions` of the arguments; the paper's benchmarks bring the conventions that
    published numbers were made with. UserError if they contradict each other."""
    from backbones.hub.options import LoadOptions
    from harness.tasks.suites import PAPER

    if options.min_pixels and options.max_pixels and options.min_pixels > options.max_pixels:
        raise UserError(f"--min-pixels {options.min_pixels} is more than --max-pixels {options.max_pixels}")
    inputs = dict(family_of(options).published_inputs()) if suite is PAPER else {}
    for name in ("llava_inputs", "min_pixels", "max_pixels"):
        if (given := getattr(options, name)) is not None:
            inputs[name] = given
    return LoadOptions(
        device_map=options.device_map,
        quantize=options.quantize,
        revision=options.revision,
        download=options.download,
        **inputs,
    )


def chosen_tasks(options: RunOptions):
    """`--tasks` -> (suite, benchmarks); the columns of a table depend on the backbone's family."""
    from harness.tasks.suites import PAPER, POCKET8, paper_columns, parse_suite, parse_tasks, pocket_columns

    if options.tasks is None:
        return POCKET8, tuple(pocket_columns(family_of(options)))
    suite, names = parse_suite(options.tasks)
    if suite is PAPER and names == PAPER.name:
        return suite, tuple(paper_columns(family_of(options)))
    return suite, tuple(parse_tasks(names))


def family_of(options: RunOptions):
    """`backbones.families.family.Family` of the backbone: its short name tells, or else its config.json."""
    from backbones.hub.find import find
    from backbones.hub.known import short_names

    short = short_names()
    if options.backbone in short:
        return short[options.backbone].family
    return find(options.backbone, options.revision, options.download).family


def default_out(backbone: str, suite, blind: bool) -> Path:
    """The folder of a run's results when `--out` is not given."""
    own = "" if suite.synthetic else f"-{suite.name}"
    return Path("results", "runs", Path(backbone).name + own + "-blind" * blind)


def default_dtype(suite, device: str) -> str:
    """What `--dtype` is when it is not given. `auto` is still there with Ray alone, for a cluster's GPUs."""
    return "bfloat16" if not suite.synthetic and device.partition(":")[0] in ("cuda", "auto") else "float32"


# ---- --list


def list_all() -> int:
    import backbones
    from backbones import families
    from backbones.hub.known import short_names
    from harness.tasks.suites import BENCHMARKS, paper_columns
    from methods import registry

    print("methods (--methods NAME:parameter=value,...):")
    for name, cls in registry.available().items():
        _entry(f"  {name:13} ", _first_sentence(cls))
        if parameters := _parameters(cls):
            _entry(" " * 16, parameters)
    print("tasks (--tasks):")
    for b in BENCHMARKS.values():
        _entry(f"  {b.name:13} ", f"{b.title}: {b.why}")
    _entry(f"  {'paper':13} ", "the benchmarks themselves, in the columns of the backbone's table:")
    for family in families.known().values():
        if family.paper_columns:
            _entry(" " * 16, f"{family.title}: {', '.join(b.name for b in paper_columns(family))}")
    print("backbones (--backbone):")
    for name in backbones.available():
        print(f"  {name}")
    for name, short in short_names().items():
        size = short.checkpoint.weight_bytes / 1e9
        _entry(f"  {name:13} ", f"{short.checkpoint.repo} on the hub, {size:.0f} GB of weights")
    titles = ", ".join(family.title for family in families.known().values())
    _entry("  ", f"or a checkpoint folder or hub id of one of the families {titles}")
    return 0


def _entry(label: str, text: str) -> None:
    print(
        textwrap.fill(text, WIDTH, initial_indent=label, subsequent_indent=" " * 16, break_on_hyphens=False)
    )


def _first_sentence(thing: object) -> str:
    return re.split(r"(?<=\.)\s", " ".join((thing.__doc__ or "").split()), maxsplit=1)[0]


def _parameters(cls: type) -> str:
    """A method's parameters with their defaults, and what else they take where that is a short list."""
    hints, found = get_type_hints(cls), []
    for f in dataclasses.fields(cls):
        if not f.init or f.name == "budget":
            continue
        others = [o for o in _choices(hints[f.name]) if o != f.default]
        default = (
            "none"
            if f.default is None
            else str(f.default).lower()
            if isinstance(f.default, bool)
            else f.default
        )
        found.append(f"{f.name}={default}" + (f" (or {', '.join(map(str, others))})" if others else ""))
    return "; ".join(found)


def _choices(hint: object) -> tuple:
    from typing import Literal

    return get_args(hint) if get_origin(hint) is Literal else ()
