"""What earlier runs left in a folder: finished records, answers, and why some of it is not re-used."""

from __future__ import annotations

import glob
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness.run import identity
from harness.run.config import Cell, Method, RunConfig
from harness.store import atomic, journal, records
from methods.errors import UserError

LOG = logging.getLogger(__name__)
#: parts of an identity that a user does not choose by an option, and what they are called
_FOUND = {
    "answers.backbone.weights": "the checkpoint's weights",
    "answers.backbone.config": "the checkpoint's config.json",
    "answers.backbone.tokenizer": "the checkpoint's tokenizer",
    "answers.backbone.generation": "the checkpoint's generation_config.json",
    "answers.backbone.chat_template": "the checkpoint's chat template",
    "answers.backbone.image_processor": "the checkpoint's image processor",
    "answers.task.data": "the data set",
}


@dataclass
class Finished:
    """What of the run is done already.

    Attributes:
        records: by key, the finished records.
        kept: by (spec, budget) of a method, the source files that have changed since records that
            `--keep-results` re-uses were written.
    """

    records: dict[str, dict] = field(default_factory=dict)
    kept: dict[tuple, list[str]] = field(default_factory=dict)


def cells(wanted: Sequence[Cell], config: RunConfig) -> Finished:
    """The finished cells in `config.out`. What a killed run or a damaged disk left behind is put right and
    told; also why cells that were finished once are computed anew."""
    for path in atomic.remove_unfinished(config.out):
        LOG.info(f"removed {path}: a run was killed while it wrote this; nothing else was lost")
    found, history = Finished(), _History(config, "measured", {c.method.spec for c in wanted})
    for cell in wanted:
        path, answers = cell.record_path(config.out), cell.journal_path(config.out)
        if config.fresh:
            journal.remove(answers)
            continue
        record = records.read_or_move_aside(path, "cell")
        if not (record and record["status"] == "done"):
            record = history.kept(path, "cell", cell.method, cell.identity, found)
        if record:
            found.records[cell.key] = record
        else:
            for line in journal.mend(answers):
                LOG.info(line)
    history.tell()
    return found


def measurements(
    wanted: Mapping[Method, tuple[Path, dict]], config: RunConfig, found: Finished
) -> dict[Method, dict]:
    """The finished measurements in `config.out`; wanted: each one's file and identity. Adds to
    `found.kept`."""
    if config.fresh:
        return {}
    done: dict[Method, dict] = {}
    history = _History(config, "timed", {m.spec for m in wanted})
    for method, (path, own) in wanted.items():
        record = records.read_or_move_aside(path, "efficiency")
        if not (record and record["status"] == "done"):
            record = history.kept(path, "efficiency", method, own, found)
        if record:
            done[method] = record
    history.tell()
    return done


class _History:
    """Compares what is wanted with records of the same method that other code, weights or data gave."""

    def __init__(self, config: RunConfig, verb: str, specs: set[str]):
        self._keep, self._verb, self._specs = config.keep_results, verb, specs
        #: (what is done anew or was done, because of what) -> specs
        self._anew: dict[tuple[str, tuple[str, ...]], set[str]] = {}
        self._kept: dict[tuple[str, tuple[str, ...]], set[str]] = {}

    def kept(
        self, path: Path, kind: records.Kind, method: Method, wanted: Mapping, found: Finished
    ) -> dict | None:
        """The latest finished record that differs in code alone, if such are to be kept. Notes the reason if
        there is one that differs in what no option says."""
        best: tuple[str, dict, list[str], list[str]] | None = None
        for other in sorted(path.parent.glob(f"{glob.escape(method.slug)}_*.json")):
            try:
                record = records.read(other, kind)
            except UserError:  # nobody asked for it
                continue
            if record["status"] != "done" or "identity" not in record or other == path:
                continue
            if (record["method"]["spec"], record["method"]["budget"]) != (method.spec, method.budget):
                continue
            files, others = identity.changed(record["identity"], wanted)
            reasons = _reasons(others)
            if reasons is not None and (best is None or best[0] < record["written"]):
                best = record["written"], record, files, reasons
        if best is None:
            return None
        _, record, files, reasons = best
        same_answers = "answers" in wanted and record["identity"]["answers"] == wanted["answers"]
        verb = "scored" if same_answers else self._verb
        if self._keep and files and not reasons:
            self._kept.setdefault((verb, tuple(files)), set()).add(method.spec)
            noted = found.kept.setdefault((method.spec, method.budget), [])
            noted += [name for name in files if name not in noted]
            return record
        self._anew.setdefault((verb, (*files, *reasons)), set()).add(method.spec)
        return None

    def tell(self) -> None:
        """One line for each set of reasons."""
        for (verb, reasons), specs in self._anew.items():
            LOG.info(f"{self._who(specs)} {verb} anew: {listed(reasons)} changed")
        for (verb, reasons), specs in self._kept.items():
            LOG.info(f"{self._who(specs)} kept as {verb} before {listed(reasons)} changed (--keep-results)")

    def _who(self, specs: set[str]) -> str:
        return "all methods" if specs == self._specs and len(specs) > 1 else ", ".join(sorted(specs))


def _reasons(others: Sequence[str]) -> list[str] | None:
    """What has changed beside code, in words; None if an option has: it is another cell then."""
    reasons = []
    for path in others:
        name = path if path.startswith("answers.") else f"answers.{path}"
        if name.startswith("answers.packages."):
            reasons.append(name.removeprefix("answers.packages."))
        elif name in _FOUND:
            reasons.append(_FOUND[name])
        else:
            return None
    return reasons


def listed(names: Sequence[str], most: int = 4) -> str:
    """`a, b, c, d and 3 more`."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
