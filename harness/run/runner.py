"""Run the cells that are not done yet, measure efficiency, and write the leaderboard."""

from __future__ import annotations

import contextlib
import logging
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from harness.run import preflight, processes, reuse
from harness.run.config import Cell, Method, RunConfig
from harness.run.local import LocalEngine
from harness.run.lock import Place, only_run
from harness.run.processes import ALONE, Processes
from harness.run.session import Session
from harness.store import records
from harness.store.atomic import AT_THE_END
from methods.errors import UserError

LOG = logging.getLogger(__name__)
#: questions that cannot be asked which are told one by one
NAMED = 50


class CellEngine(Protocol):
    """Where cells are computed. session: what the run's cells share."""

    session: Session

    def compute(self, todo: Sequence[Cell]) -> Iterator[dict]:
        """Answer and score the cells; yields each record once it is on disk.

        Where it turns out that a question cannot be asked it is left out of the session's documents. The
        benchmark's cells, of which no record comes, are others then: ask for those.
        """
        ...

    def measure(self, methods: Sequence[Method]) -> list[dict]:
        """FLOPs and latency of the methods, vanilla first (see `efficiency.measure`)."""
        ...


@dataclass
class RunOutcome:
    """What a run did: the cells' and the efficiency records in table order, how many cells were re-used and
    computed, the records of what failed, and a line for each method that could not do a budget; `kept`: see
    `reuse.Finished`."""

    cells: list[dict]
    efficiency: list[dict]
    reused: int
    computed: int
    failed: list[dict]
    left_out: list[str]
    kept: dict[tuple, list[str]] = field(default_factory=dict)


def run(config: RunConfig, publish: Callable[[Session, RunOutcome], str]) -> int:
    """The whole of `run_all.py`.

    Args:
        config: what to run.
        publish: writes the tables and figures into `config.out`; returns the table for a terminal.

    Returns:
        The exit code: 0, or 1 if a cell failed or was left out.

    Raises:
        UserError: bad input.
    """
    with processes.joined() as team, contextlib.ExitStack() as held:
        if not team.first:  # the first process tells of all
            logging.getLogger("harness").setLevel(logging.WARNING)
        team.agreed(lambda: preflight.check(config))
        team.agreed(lambda: _claim(config.out, held), by_first=True)
        engine = team.agreed(lambda: _start(config, team, held))
        for line in engine.session.left_out:
            LOG.info(f"LEFT OUT {line}")
        for line in engine.session.unavailable:
            LOG.info(f"not available here: {line}")
        outcome = complete(engine, team)
        return team.gather(_publish(engine.session, outcome, publish) if outcome else 0)[0]


def _claim(out: Path, held: contextlib.ExitStack) -> None:
    check_writable(out)
    held.enter_context(only_run(out))
    for name in AT_THE_END:
        if (out / name).is_dir():
            raise UserError(f"{out / name} is a folder, where a file of this run belongs; move it away")


def _start(config: RunConfig, team: Processes, held: contextlib.ExitStack) -> CellEngine:
    if config.engine == "local":
        return LocalEngine(config, team)
    if team.size > 1:
        raise UserError("--engine ray starts its own processes; run it without accelerate launch or torchrun")
    from harness.run.ray_cluster import RayEngine

    return held.enter_context(contextlib.closing(RayEngine(config)))


def _publish(session: Session, outcome: RunOutcome, publish: Callable[[Session, RunOutcome], str]) -> int:
    """Write the tables and figures and sum up; the exit code."""
    out = session.config.out
    LOG.info("\n" + publish(session, outcome))
    drawn = ", and figures of what prunes" if (out / "accuracy_latency.png").exists() else ""
    LOG.info(f"\nIn {out}: leaderboard.md and leaderboard.csv with a column for each task{drawn}")
    for record in outcome.cells:
        reduced = record.get("run", {}).get("batch_size_reduced_to")
        if reduced:
            LOG.info(f"memory ran out: {_name(record)} was answered in batches of {reduced}")
    for failure in outcome.failed[:10]:
        LOG.info(f"FAILED {_name(failure)}: {failure['error'].strip().splitlines()[-1]}")
    if len(outcome.failed) > 10:
        LOG.info(f"... and {len(outcome.failed) - 10} more; the records hold the tracebacks")
    return 1 if outcome.failed or outcome.left_out else 0


def _name(record: dict) -> str:
    method = record["method"]
    return f"{record['task']} / {method['spec']} / {method['budget']}"


def check_writable(out: Path) -> None:
    """UserError unless files can be made in `out` (made if missing)."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write to {out} ({error.strerror}); choose another folder with --out"
        ) from error


def complete(engine: CellEngine, team: Processes = ALONE) -> RunOutcome | None:
    """Compute what is missing; every record of the run. None in all processes but the first."""
    session = engine.session
    config = session.config
    team.agreed(lambda: len(session.cells), by_first=True)  # draws Pocket-8 if need be
    for one in session.unaskable[:NAMED]:
        LOG.info(f"NOT ASKED {one}")
    if len(session.unaskable) > NAMED:
        LOG.info(
            f"... and {len(session.unaskable) - NAMED} more questions that cannot be asked; see the records"
        )
    found, made, first = reuse.Finished(), set(), True
    with contextlib.closing(Place(config.out)) as place:
        while todo := _to_do(session, found, team, first):
            first = False
            for record in _told(engine.compute(todo), todo):
                place.check()
                found.records[record["key"]] = record
                made.add(record["key"])
        cells = session.cells
        if not team.first:
            return None
        efficiency = _efficiency(engine, found, place)
    ordered = [found.records[c.key] for c in cells]
    failed = [r for r in (*ordered, *efficiency) if r["status"] == "failed"]
    computed = sum(c.key in made for c in cells)
    reused = len(cells) - computed
    return RunOutcome(ordered, efficiency, reused, computed, failed, session.left_out, found.kept)


def _to_do(session: Session, found: reuse.Finished, team: Processes, first: bool) -> list[Cell]:
    """The cells of the session that are not in `found`, once what is finished in `--out` has been added to
    it; says how many. first: False when questions turned out not to be askable, so that cells are others."""
    cells, config = session.cells, session.config

    def prepare() -> list[str]:
        unknown = [c for c in cells if c.key not in found.records]
        if first or (unknown and not config.fresh):
            earlier = reuse.cells(unknown, config)
            found.records |= earlier.records
            found.kept |= earlier.kept
        return [c.key for c in cells if c.key not in found.records]

    keys = set(team.agreed(prepare, by_first=True))
    todo = [c for c in cells if c.key in keys]
    team.agreed(lambda: _check_equal(len(todo), len(keys)))
    if not first and todo:
        LOG.info(f"{len(todo)} cells once more, without the questions that cannot be asked")
    elif first:
        LOG.info(
            f"{len(cells)} cells ({len(session.documents)} tasks x {len(session.methods)} methods and "
            f"budgets): {len(todo)} to compute"
            + (f", by {team.size} processes" if team.size > 1 else "")
            + f"; {len(cells) - len(todo)} finished earlier in {config.out} are re-used"
        )
    return todo


def _told(made: Iterator[dict], todo: Sequence[Cell]) -> Iterator[dict]:
    """The records as they come; a line for each task, with its first scores, when it is done."""
    left = Counter(cell.benchmark.name for cell in todo)
    titles = {cell.benchmark.name: cell.benchmark.title for cell in todo}
    total, done, start = len(left), 0, time.monotonic()
    failed: Counter = Counter()
    scores: dict[str, dict[str, list[float]]] = {task: {"vanilla": [], "pruned": []} for task in left}
    for record in made:
        yield record
        task = record["task"]
        left[task] -= 1
        failed[task] += record["status"] == "failed"
        if record["status"] == "done":
            which = "vanilla" if record["method"]["name"] == "vanilla" else "pruned"
            scores[task][which].append(record["metrics"]["score"])
        if left[task]:
            continue
        done += 1
        cells = sum(cell.benchmark.name == task for cell in todo)
        bad = f", {failed[task]} failed" if failed[task] else ""
        seen = "".join(f"; {which} {_span(own)}" for which, own in scores[task].items() if own)
        seconds = time.monotonic() - start
        LOG.info(f"{titles[task]}: {cells} cells{bad}; {done} of {total} tasks after {seconds:.0f} s{seen}")


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return low if low == high else f"{low} to {high}"


def _check_equal(mine: int, wanted: int) -> None:
    if mine != wanted:
        raise UserError(
            "the processes do not agree on the cells: they must have the same packages, checkpoint and data"
        )


def _efficiency(engine: CellEngine, found: reuse.Finished, place: Place) -> list[dict]:
    """One record per method: read if there, else measured together with vanilla in one interleaved
    session."""
    from harness.run import measure_costs

    session = engine.session
    wanted: dict[Method, tuple[Path, dict]] = {}
    for method in session.methods:
        own = measure_costs.identity_of(session, method)
        wanted[method] = measure_costs.record_path(session.config.out, method, records.digest(own)), own
    done = reuse.measurements(wanted, session.config, found)
    missing = [m for m in session.methods if m not in done]
    if missing:
        vanilla = session.methods[0]
        together = [vanilla, *(m for m in missing if m is not vanilla)]
        if not sys.stderr.isatty():
            LOG.info(f"timing the prefill of {len(together)} methods, {session.config.latency_repeats} times")
        results = engine.measure(together)
        place.check()
        for method, result in zip(together, results):
            if method in missing:
                path, own = wanted[method]
                done[method] = records.sealed(
                    {
                        **session.header(),
                        "kind": "efficiency",
                        "status": "failed" if "error" in result else "done",
                        "key": records.digest(own),
                        "task": "efficiency",
                        "method": {"spec": method.spec, "name": method.name, "budget": method.budget},
                        **result,
                        "identity": own,
                    }
                )
                records.write(path, done[method])
    return [done[m] for m in session.methods]
