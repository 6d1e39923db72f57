"""Compute cells here: in this process, or in the processes that a launcher started together."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from harness.run.config import Cell, Method, RunConfig
from harness.run.processes import ALONE, Processes
from harness.run.session import Session
from harness.store import journal

if TYPE_CHECKING:
    from harness.run.sweep import SweepEntry


class LocalEngine:
    """session: what the cells share. Making one raises UserError as Session does."""

    def __init__(self, config: RunConfig, team: Processes = ALONE):
        self.session, self.team = Session(config), team

    def compute(self, todo: Sequence[Cell]) -> Iterator[dict]:
        """See `runner.CellEngine`. Task by task; yields in the first process alone."""
        if not todo:
            return
        from tqdm import tqdm

        from harness.run import score_cell

        hidden = None if self.team.first else True  # None: hidden where there is no terminal
        with tqdm(total=len(todo), desc="cells", unit="cell", position=0, disable=hidden) as overall:
            for documents in self.session.documents:
                cells = [c for c in todo if c.benchmark is documents.benchmark]
                if not cells:
                    continue
                entries, refused = self._answered(documents, cells, hidden)
                if refused:
                    self.session.leave_out(documents, refused)
                    continue
                if not self.team.first:
                    continue
                for entry in entries:
                    yield score_cell.close(
                        self.session, entry, self.session.task(documents), documents, self.team.size
                    )
                    overall.update()

    def _answered(
        self, documents, cells: Sequence[Cell], hidden: bool | None
    ) -> tuple[list[SweepEntry], dict[int, str]]:
        """The cells' entries with all answers in their journals (in the first process), or with an error;
        and, by row, why questions cannot be asked."""
        from tqdm import tqdm

        from harness.run.sweep import answer_all

        session, team = self.session, self.team
        task = session.task(documents)
        rank = team.rank if team.size > 1 else None
        entries = session.entries(documents, cells, session.config.out, rank)
        questions = list(map(entries[0].model.question, task.instances))
        pending = sum(len(s.model.missing(questions)) for s in entries)
        title = documents.benchmark.title
        refused: dict[int, str] = {}
        with tqdm(total=pending, desc=title, unit="answer", position=1, leave=False, disable=hidden) as inner:

            def progress(entry: SweepEntry, answers: int) -> None:
                method = entry.cell.method
                inner.set_postfix_str(f"{method.spec} {method.budget or ''}", refresh=False)
                inner.update(answers)

            answer_all(
                session.backbone,
                task,
                entries,
                session.config.batch_size,
                time.perf_counter,
                progress,
                part=(team.rank, team.size),
                refused=refused,
            )
        if team.size > 1:
            _bring_together(entries, team, session.config)
        return entries, dict(pair for own in team.gather(list(refused.items())) for pair in own)

    def measure(self, methods: Sequence[Method]) -> list[dict]:
        """FLOPs and latency of the methods, vanilla first (see `measure_costs.measure`)."""
        from tqdm import tqdm

        from harness.run import measure_costs
        from harness.run.probes import choose

        session = self.session
        total = session.config.latency_repeats * len(methods)
        with tqdm(total=total, desc="latency", unit="prefill", disable=None) as bar:
            probes = choose(session.probes())
            return measure_costs.measure(session.config, session.backbone, methods, probes, bar.update)


def _bring_together(entries: Sequence[SweepEntry], team: Processes, config: RunConfig) -> None:
    """Everybody's answers and reports into the first process's journals and entries."""
    everybody = team.gather([asdict(entry.report) for entry in entries])
    if not team.first:
        return
    from harness.run.sweep import Report

    for place, entry in enumerate(entries):
        for reports in everybody[1:]:
            entry.report.add(Report(**reports[place]))
        path = entry.cell.journal_path(config.out)
        problems = list(journal.mend(path))
        if problems:
            raise OSError(" ".join(problems))
        entry.model.journal = journal.Journal(path)
