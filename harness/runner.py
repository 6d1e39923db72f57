"""Run the cells that are not done yet, measure efficiency, and write the leaderboard."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import records
from harness.config import Cell, RunConfig
from harness.errors import UserError
from harness.session import Session


@dataclass
class Outcome:
    """What a run did: the cells' and the efficiency records in table order, how many cells were re-used and
    computed, the records of what failed, and a line for each method that could not do a budget."""

    cells: list[dict]
    efficiency: list[dict]
    reused: int
    computed: int
    failed: list[dict]
    left_out: list[str]


def run(config: RunConfig, say: Callable[[str], None] = print) -> int:
    """The whole of `run_all.py`. Returns 0, or 1 if a cell failed or was left out. Raises UserError for bad
    input."""
    check_writable(config.out)
    session = Session(config)
    for line in session.left_out:
        say(f"LEFT OUT {line}")
    for line in session.unavailable:
        say(f"not available here: {line}")
    outcome = complete(session, say)
    from harness import leaderboard

    say("\n" + leaderboard.publish(session, outcome))
    say(f"\nIn {config.out}: leaderboard.md, leaderboard.csv, accuracy_budget.png, accuracy_latency.png")
    for failure in outcome.failed[:10]:
        method = failure["method"]
        last_line = failure["error"].strip().splitlines()[-1]
        say(f"FAILED {failure['task']} / {method['spec']} / {method['budget']}: {last_line}")
    if len(outcome.failed) > 10:
        say(f"... and {len(outcome.failed) - 10} more; the records hold the tracebacks")
    return 1 if outcome.failed or outcome.left_out else 0


def check_writable(out: Path) -> None:
    """UserError unless files can be made in `out` (made if missing)."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write to {out} ({error.strerror}); choose another folder with --out"
        ) from error


def complete(session: Session, say: Callable[[str], None]) -> Outcome:
    """Compute what is missing; every record of the run."""
    config, cells = session.config, session.cells
    found = {cell.key: _finished(cell, config) for cell in cells}
    todo = [c for c in cells if found[c.key] is None]
    reused = len(cells) - len(todo)
    say(
        f"{len(cells)} cells ({len(session.documents)} tasks x {len(session.methods)} methods and budgets): "
        f"{reused} finished earlier in {config.out} are re-used, {len(todo)} to compute"
    )
    for record in _compute(session, todo):
        found[record["key"]] = record
    efficiency = _efficiency(session)
    ordered = [found[c.key] for c in cells]
    failed = [r for r in (*ordered, *efficiency) if r["status"] == "failed"]
    return Outcome(ordered, efficiency, reused, len(todo), failed, session.left_out)


def _finished(cell: Cell, config: RunConfig) -> dict | None:
    path = cell.record_path(config.out)
    if config.fresh or not path.exists():
        return None
    record = records.read(path)
    return record if record["status"] == "done" else None


def _compute(session: Session, todo: Sequence[Cell]) -> Iterator[dict]:
    """Answer and score the cells, task by task; yields each record once it is on disk."""
    if not todo:
        return
    from tqdm import tqdm

    from harness.sweep import answer_all

    config = session.config
    with tqdm(total=len(todo), desc="cells", unit="cell", position=0, disable=None) as overall:
        for documents in session.documents:
            cells = [c for c in todo if c.benchmark is documents.benchmark]
            if not cells:
                continue
            if config.fresh:
                for cell in cells:
                    cell.journal_path(config.out).unlink(missing_ok=True)
            task = session.task(documents)
            seats = session.seats(documents, cells, config.out)
            questions = list(map(seats[0].model.question, task.instances))
            pending = sum(len(s.model.missing(questions)) for s in seats)
            title = documents.benchmark.title
            with tqdm(
                total=pending, desc=title, unit="answer", position=1, leave=False, disable=None
            ) as inner:

                def progress(seat, answers: int, bar=inner) -> None:
                    method = seat.cell.method
                    bar.set_postfix_str(f"{method.spec} {method.budget or ''}", refresh=False)
                    bar.update(answers)

                answer_all(session.backbone, task, seats, config.batch_size, time.perf_counter, progress)
            for seat in seats:
                yield _close(session, seat, task, documents)
                overall.update()


def _close(session: Session, seat, task, documents) -> dict:
    """Score one answered cell and write its record; a failure in the scoring is the cell's failure."""
    from harness import accuracy

    if seat.error is None:
        try:
            record = accuracy.cell_record(session, seat, task, documents)
        except UserError:
            raise
        except Exception:
            seat.error = traceback.format_exc(limit=-4)
    if seat.error is not None:
        record = accuracy.failure_record(session, seat)
    records.write(seat.cell.record_path(session.config.out), record)
    return record


def _efficiency(session: Session) -> list[dict]:
    """One record a method: read if there, else measured together with vanilla in one interleaved session."""
    from harness import efficiency

    config = session.config
    paths = {m: efficiency.record_path(config.out, m, efficiency.key(session, m)) for m in session.methods}
    found = {m: records.read(p) for m, p in paths.items() if p.exists() and not config.fresh}
    missing = [m for m in session.methods if m not in found or found[m]["status"] != "done"]
    if missing:
        from tqdm import tqdm

        vanilla = session.methods[0]
        together = [vanilla, *(m for m in missing if m is not vanilla)]
        probes = efficiency.choose(session.probes())
        with tqdm(
            total=config.latency_repeats * len(together), desc="latency", unit="prefill", disable=None
        ) as bar:
            measured = efficiency.measure(config, session.backbone, together, probes, bar.update)
        for method, result in zip(together, measured):
            if method in missing:
                found[method] = {
                    **session.header(),
                    "kind": "efficiency",
                    "status": "failed" if "error" in result else "done",
                    "task": "efficiency",
                    "method": {"spec": method.spec, "name": method.name, "budget": method.budget},
                    **result,
                }
                records.write(paths[method], found[method])
    return [found[m] for m in session.methods]
