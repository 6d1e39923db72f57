"""`doctor`: could a run start here?"""

from __future__ import annotations

from typing import Annotated

from harness.cli.command import command
from harness.cli.options import RunOptions, flag, one_of, option, real
from harness.cli.run import config_of
from methods import learned
from methods.errors import UserError

EXAMPLES = """\
examples:
  python -m harness doctor --backbone llava-1.5-7b --tasks paper --budget 192 128 64
  python -m harness doctor --backbone qwen2.5-vl-7b --tasks paper --data /data/mirror --price 2.5
  python -m harness doctor --train diffprune --backbone llava-1.5-7b --dtype bfloat16    fits?
  python -m harness doctor --backbone llava-1.5-7b --tasks paper --online    can the hub be reached?

without a GPU or a download, on a tiny random model and drawn data:
  python -m backbones.random_checkpoint llava-1.5 /tmp/tiny
  python -m harness.tasks.synthetic_mirror /tmp/mirror
  python -m harness doctor --backbone /tmp/tiny --tasks paper --data /tmp/mirror --budget 16

Exit code: 0 the run could start, 1 something is missing, 2 bad input.
"""
OWN = "what to check"


@command("doctor", examples=EXAMPLES)
def doctor(
    options: RunOptions,
    online: Annotated[
        bool, flag("--online", "ask the hub about the repositories, too (says so first)", OWN)
    ] = False,
    no_model: Annotated[bool, flag("--no-model", "do not load the model", OWN)] = False,
    no_estimate: Annotated[bool, flag("--no-estimate", "leave out the estimate of the time", OWN)] = False,
    train: Annotated[
        str | None,
        option(
            "--train",
            f"instead: what training a learned method ({', '.join(learned.names())}) takes of a GPU's memory",
            "METHOD",
            one_of(*learned.names()),
            OWN,
        ),
    ] = None,
    memory: Annotated[float, real("--memory", "of that GPU, in GB", OWN, above=0)] = 48.0,
    price: Annotated[
        float | None, real("--price", "of an hour of GPU time, for a cost estimate", OWN, above=0)
    ] = None,
) -> int:
    """Could a run start here, what is missing, and how long would it take?

    Takes the options of run and checks memory, disk, the checkpoint, every data set's columns and first
    rows, the processor's places for an image, and, on the loaded model, that keeping all tokens gives
    the unpruned model's answer. Prints what is missing with the command that gets it, and an estimate
    of the time. Looks at this machine only, unless you say --online or --download.

    With --train it says instead, from the shapes alone, how much memory the training of a learned method
    takes, and how many questions at once fit.
    """
    if train is not None:
        from harness.doctor import training
        from harness.doctor.findings import MISSING

        dtype, budget = options.dtype or "float32", options.budget[0]
        found = list(training.check(train, options.backbone, budget, dtype, memory))
        print(*found, sep="\n")
        return int(any(f.level == MISSING for f in found))
    from harness.doctor.examination import Examination
    from harness.run import preflight
    from harness.tasks.environment import prepare_environment

    prepare_environment(offline=not (online or options.download))
    examination = Examination(online, not no_model, not no_estimate, price)
    checkpoint = examination.find(options.backbone, options.revision, options.download)
    try:
        config = config_of(options)
    except UserError:
        if checkpoint is None:  # its family decides what --tasks paper means
            print("the other checks need the checkpoint first")
            return 1
        raise
    preflight.check_place(config.out)
    preflight.check_methods(config.methods, config.budgets, config.seed)
    if checkpoint is not None:
        preflight.check_budgets(config)
    return examination.run(config, checkpoint)
