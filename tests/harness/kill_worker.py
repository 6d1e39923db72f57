"""Kill and interrupt short runs at random moments and start them again; driven by test_kill.py.

    kill_worker.py FOLDER KILLS SEED ARGUMENT...

ARGUMENTs are run_all's, with {} for the name of the run in --out. FOLDER/reference gets an uninterrupted
run; FOLDER/1, 2, ... runs that were killed until they finished. FOLDER/kills.jsonl says how each was killed.
FOLDER/others.json: what came of runs that were interrupted, met on one folder, or had more budgets.
Everything heavy is imported and read once; each life of a run is a forked child, so that a kill -9 is one.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path


def die(folder: Path, how: str, where: str) -> None:
    with open(folder / "kills.jsonl", "a") as file:
        file.write(json.dumps({"how": how, "where": where}) + "\n")
    os.kill(os.getpid(), signal.SIGKILL)


def at_a_moment(folder: Path, dice: random.Random, duration: float) -> None:
    """Die after a random part of a run's duration, wherever it is then."""
    moment = dice.uniform(0, duration)

    def wait() -> None:
        time.sleep(moment)
        die(folder, "moment", f"{moment:.3f}")

    threading.Thread(target=wait, daemon=True).start()


def in_a_write(folder: Path, dice: random.Random, duration: float) -> None:
    """Die when a part of a journal's lines has reached the disk."""
    left, cut, real = dice.randint(1, 4), dice.randint(2, 40), os.fsync

    def fsync(handle: int) -> None:
        nonlocal left
        path = os.readlink(f"/proc/self/fd/{handle}")
        left -= path.endswith(".jsonl")  # else it may be all records and tables
        if left == 0:
            os.ftruncate(handle, max(os.fstat(handle).st_size - cut, 0))
            die(folder, "write", path)
        real(handle)

    os.fsync = fsync


def in_a_record(folder: Path, dice: random.Random, duration: float) -> None:
    """Die when a part of a record, of a cell or of a measurement, has reached the disk."""
    left, cut, real = dice.randint(1, 9), dice.randint(2, 400), os.fsync

    def fsync(handle: int) -> None:
        nonlocal left
        path = os.readlink(f"/proc/self/fd/{handle}")
        left -= path.endswith(".tmp") and ("/cells/" in path or "/efficiency/" in path)
        if left == 0:
            os.ftruncate(handle, max(os.fstat(handle).st_size - cut, 0))
            die(folder, "record", path)
        real(handle)

    os.fsync = fsync


def in_a_measurement(folder: Path, dice: random.Random, duration: float) -> None:
    """Die while latency is measured."""
    from harness.costs import latency

    left, real = dice.randint(1, 9), latency.measure_once

    def measure_once(*arguments):
        nonlocal left
        left -= 1
        if left == 0:
            die(folder, "latency", "measure_once")
        return real(*arguments)

    latency.measure_once = measure_once


def interrupt(dice: random.Random) -> None:
    """Ctrl-C shortly after one of a run's first three records: it is sure to be still going, however busy the
    machine."""
    left, pause, real = dice.randint(1, 3), dice.uniform(0, 0.05), os.replace
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

    def wait() -> None:
        time.sleep(pause)
        os.kill(os.getpid(), signal.SIGINT)

    def replace(source, target) -> None:
        nonlocal left
        real(source, target)
        left -= "/cells/" in str(target) and str(target).endswith(".json")
        if left == 0:
            left = -1
            threading.Thread(target=wait, daemon=True).start()

    os.replace = replace


def before_a_rename(folder: Path, dice: random.Random, duration: float) -> None:
    """Die between writing a record and putting it in its place."""
    left, real = dice.randint(1, 3), os.replace

    def replace(source, target) -> None:
        nonlocal left
        left -= str(target).endswith(".json")  # else it may be all journals and tables
        if left == 0:
            die(folder, "rename", str(target))
        real(source, target)

    os.replace = replace


def live(arguments: list[str], log: Path, harm=None) -> int:
    """One life of a run in a child; its exit code, negative for the signal that ended it."""
    return end_of(start(arguments, log, harm))[0]


def end_of(child: int) -> tuple[int, int]:
    """Exit code and highest resident set (KiB) of a child, once it has ended."""
    _, status, usage = os.wait4(child, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_maxrss


def start(arguments: list[str], log: Path, harm=None) -> int:
    """Begin one life of a run; the child's process id."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            sys.stdout.reconfigure(line_buffering=True)  # what was said before a kill counts
            if harm:
                harm()
            from harness.cli import app

            code = app.run_all(arguments)
        finally:
            os._exit(code)
    return child


def named(arguments: list[str], run: str) -> list[str]:
    return [argument.replace("{}", run) for argument in arguments]


def main(folder: Path, kills: int, seed: int, arguments: list[str]) -> None:
    import torch
    from transformers import LlavaForConditionalGeneration, LlavaProcessor  # noqa: F401

    from harness.cli import app
    from harness.report import figures, leaderboard  # noqa: F401
    from harness.run import measure_costs, runner, score_cell  # noqa: F401
    from harness.tasks import lmms, pruned_model  # noqa: F401
    from harness.tasks.environment import import_lmms_eval

    import_lmms_eval()
    import lmms_eval.evaluator  # noqa: F401

    figures.draw = lambda *arguments: None  # a second per life, and not looked at
    torch.set_num_threads(1)  # a forked child has no other threads
    log = folder / "log.txt"
    memory = {}
    # before anything is warm here, which would count as the runs' own memory
    for run, budgets in (("reference", ["16"]), ("budgets", ["8", "16", "32"])):
        place = arguments.index("--budget") + 1
        words = named([*arguments[:place], *budgets, *arguments[place + 1 :]], run)
        code, memory[len(budgets)] = end_of(start(words, log))
        assert code == 0, code
    # the same once more finds all done, and leaves what children need read and imported
    assert app.run_all(named(arguments, "reference")) == 0
    begin = time.monotonic()
    meeting = together(folder, arguments)
    duration = time.monotonic() - begin
    dice = random.Random(seed)
    done, run = 0, 1
    while True:
        harms = (at_a_moment, in_a_write, before_a_rename, in_a_record, in_a_measurement)
        choice = harms[done % len(harms)] if done < kills else None
        harm = choice and (lambda choice=choice: choice(folder, dice, duration))
        code = live(named(arguments, str(run)), log, harm)
        dice.random()  # the child drew from a copy
        if code == -signal.SIGKILL:
            done += 1
            continue
        assert code == 0, code
        if choice is None:
            break
        run += 1
    stopped = interrupted(folder, dice, arguments)
    found = {"interrupted": stopped, "together": meeting, "memory": memory}
    (folder / "others.json").write_text(json.dumps(found))


def interrupted(folder: Path, dice: random.Random, arguments: list[str]) -> list:
    """Exit codes and lines of a run that Ctrl-C ends, more than once, and that is then let go on."""
    found = []
    for number in range(2):
        log = folder / f"interrupted{number}.txt"
        code = live(named(arguments, "interrupted"), log, lambda: interrupt(dice))
        found.append([code, log.read_text()])
        dice.random()
    live(named(arguments, "interrupted"), folder / "log.txt")
    return found


def together(folder: Path, arguments: list[str]) -> list:
    """Exit codes and lines of two runs that meet on one folder."""
    logs = [folder / f"together{number}.txt" for number in range(2)]
    children = [start(named(arguments, "together"), log) for log in logs]
    return [[end_of(child)[0], log.read_text()] for child, log in zip(children, logs)]


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
