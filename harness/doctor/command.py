"""The command: options, order of the checks, exit code."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from harness.doctor.findings import MISSING, Finding, from_error
from methods.errors import UserError

DESCRIPTION = """\
Could this run start here, and what would it take? Takes the options of run_all.py and checks memory, disk,
the checkpoint, every data set's columns and first rows, the processor's places for an image, and, on the
loaded model, that keeping all tokens gives the unpruned model's answer. Prints what is missing with the
command that gets it, and an estimate of the time by datasheets. Looks at this machine only, unless you say
--online or --download.
"""

EXAMPLES = """\
examples:
  python -m harness doctor --backbone llava-1.5-7b --tasks paper --budget 192 128 64
  python -m harness doctor --backbone qwen2.5-vl-7b --tasks paper --data /data/mirror --price 2.5
  python -m harness doctor --backbone llava-1.5-7b --tasks paper --online     can the hub be reached?

without a GPU or a download, on a tiny random model and drawn data:
  python -m backbones.random_checkpoint llava-1.5 /tmp/tiny
  python -m harness.tasks.synthetic_mirror /tmp/mirror
  python -m harness doctor --backbone /tmp/tiny --tasks paper --data /tmp/mirror --budget 16

Exit code: 0 the run could start, 1 something is missing, 2 bad input.
"""


def add_command(commands) -> dict[str, Callable[[argparse.Namespace], int]]:
    """Add the parser to `python -m harness`'s; the handler of the command."""
    from harness.cli.app import _add_run_options

    parser = commands.add_parser(
        "doctor",
        help="could a run start here? what is missing, and how long would it take?",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    own = parser.add_argument_group("what to check")
    own.add_argument(
        "--online", action="store_true", help="ask the hub about the repositories, too (says so first)"
    )
    own.add_argument("--no-model", action="store_true", help="do not load the model")
    own.add_argument("--no-estimate", action="store_true", help="leave out the estimate of the time")
    own.add_argument("--price", type=float, metavar="X", help="of an hour of GPU time, for a cost estimate")
    _add_run_options(parser)
    return {"doctor": run}


def run(options: argparse.Namespace, say: Callable[[str], None] = print) -> int:
    """Print the findings as they come. Returns 0 if the run could start, else 1. Raises UserError for bad
    input."""
    from harness.cli.app import _config
    from harness.tasks.quiet import prepare_environment

    if options.price is not None and not (math.isfinite(options.price) and options.price > 0):
        raise UserError(f"--price {options.price}: give a positive number")
    prepare_environment(offline=not (options.online or options.download))
    from backbones.hub.find import find

    missing: list[Finding] = []

    def tell(finding: Finding) -> None:
        say(str(finding))
        if finding.level == MISSING:
            missing.append(finding)

    checkpoint = None
    try:
        checkpoint = find(options.backbone, options.revision, options.download, say)
        tell(_found(checkpoint))
    except UserError as error:
        tell(from_error("checkpoint", error))
    try:
        config = _config(options)
    except UserError:
        if checkpoint is None:  # its family decides what --tasks paper means
            say("the other checks need the checkpoint first")
            return 1
        raise
    _check(config, options, checkpoint, tell, missing, say)
    say(f"\n{len(missing)} missing: the run cannot start" if missing else "\nThe run can start.")
    return 1 if missing else 0


def _found(checkpoint) -> Finding:
    from backbones.hub.integrity import check_headers
    from harness.doctor.findings import OK

    tensors = check_headers(checkpoint.name, checkpoint.folder)
    where = checkpoint.repo or "folder"
    commit = f", revision {checkpoint.revision}" if checkpoint.revision else ""
    return Finding(
        OK,
        "checkpoint",
        f"{where}{commit} at {checkpoint.folder}: "
        f"every tensor of the model is in the files ({tensors}, by names and shapes)",
    )


def _check(config, options: argparse.Namespace, checkpoint, tell, missing: list[Finding], say) -> None:
    from backbones.hub.find import PATTERNS
    from backbones.hub.known import KNOWN
    from harness.doctor import data, estimate, machine, model, online
    from harness.tasks.sources import ORGANISATIONS, patterns

    for finding in machine.packages(config):
        tell(finding)
    known = KNOWN.get(config.backbone)
    if checkpoint is not None:
        text_config = _text_config(checkpoint.folder)
        parameters = count_parameters(checkpoint.folder)
    else:
        text_config, parameters = None, known.parameters if known else 0
    if parameters:
        for finding in machine.memory(parameters, config, text_config):
            tell(finding)
    to_download = known.weight_bytes if known and checkpoint is None else 0
    for finding in machine.disk(config.out, to_download):
        tell(finding)
    tables = []
    family = checkpoint.family if checkpoint else known.family if known else ""
    for found in data.check(config, family, say):
        if isinstance(found, Finding):
            tell(found)
        else:
            tables.append(found)
    if options.online:
        wanted = {}
        if checkpoint is None or checkpoint.repo:
            repo = checkpoint.repo if checkpoint else known.repo if known else config.backbone
            wanted[repo] = (repo, "model", config.load.revision, PATTERNS)
        for b in config.benchmarks if config.suite.split is None else ():
            repo = f"{ORGANISATIONS[0]}/{b.repository}"
            before = wanted[repo][3] if repo in wanted else ()
            wanted[repo] = (repo, "dataset", None, tuple(dict.fromkeys([*before, *patterns(b)])))
        for finding in online.check(list(wanted.values()), say):
            tell(finding)
    if not missing and not options.no_model:
        for finding in model.check(config):
            tell(finding)
    elif not options.no_model:
        say("note     model: not loaded, since something is missing")
    if not options.no_estimate:
        for finding in estimate.check(
            config, tables, checkpoint.folder if checkpoint else None, options.price
        ):
            tell(finding)


def _text_config(folder: Path) -> dict | None:
    """The language model's settings, defaults filled in; None if transformers does not know the family."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config().to_dict()
    except (OSError, ValueError, KeyError):
        return None


def count_parameters(folder: Path) -> int:
    """Numbers in the checkpoint's safetensors files, by their headers alone."""
    from safetensors import safe_open

    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            total += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    return total
