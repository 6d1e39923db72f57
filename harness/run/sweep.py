"""Answer one benchmark for many cells at once, sharing what they have in common.

Order of computation: batches of questions grouped by image; for each batch the images are decoded and
preprocessed once, and each cell's pruner answers it in turn inside of the backbone's vision cache, so the
vision tower runs once per image for all methods that read the same tower output.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

from harness.run import out_of_memory
from harness.run.config import Cell
from harness.store.journal import Answer
from harness.tasks.answering import Question, batches, taken_apart
from harness.tasks.pruned_model import PrunedModel
from methods.errors import BadSelection, UserError

#: enough for a batch of every family's images and all signals; older images go first
VISION_CACHE_BYTES = 2 << 30


class _Refused(Exception):
    """Single questions cannot be made into model inputs. places: theirs."""

    def __init__(self, places: Collection[int]):
        super().__init__(f"questions {sorted(places)} cannot be made into inputs")
        self.places = frozenset(places)


@dataclass
class Report:
    """How answering a cell went: seconds spent in it, answers computed, the traceback if it failed, and the
    batch size that it came down to because memory ran out (None: it did not).
    """

    seconds: float = 0.0
    computed: int = 0
    error: str | None = None
    reduced: int | None = None

    def add(self, other: Report) -> None:
        """Take in what another process did for the cell at the same time."""
        self.seconds = max(self.seconds, other.seconds)
        self.computed += other.computed
        self.error = self.error or other.error
        self.reduced = min((r for r in (self.reduced, other.reduced) if r), default=None)


@dataclass
class SweepEntry:
    """A cell in the sweep, its adapter, and how it went."""

    cell: Cell
    model: PrunedModel
    report: Report = field(default_factory=Report)


def answer_all(
    backbone,
    task,
    entries: Sequence[SweepEntry],
    batch_size: int,
    clock: Callable[[], float],
    progress: Callable[[SweepEntry, int], None] = lambda entry, answers: None,
    cache_bytes: int | None = VISION_CACHE_BYTES,
    part: tuple[int, int] = (0, 1),
    refused: dict[int, str] | None = None,
) -> None:
    """Fill the entries' journals with every missing answer of this part; `progress` hears how many were
    tried.

    Otherwise as `answered`.
    """
    for entry, tried, _ in answered(backbone, task, entries, batch_size, clock, cache_bytes, part, refused):
        progress(entry, tried)


def answered(
    backbone,
    task,
    entries: Sequence[SweepEntry],
    batch_size: int,
    clock: Callable[[], float],
    cache_bytes: int | None = VISION_CACHE_BYTES,
    part: tuple[int, int] = (0, 1),
    refused: dict[int, str] | None = None,
) -> Iterator[tuple[SweepEntry, int, list[Answer]]]:
    """Compute the entries' missing answers batch by batch and journal them; yields each entry that had its
    turn, how many questions it was asked, and its answers (fewer if it failed).

    task: a lmms-eval task whose requests are built. cache_bytes None: no vision cache. part: (i, n), for
    every n-th batch beginning with the i-th; n processes that start from equal journals share the work so.
    refused: takes, by row, why a question cannot be made into model inputs, while the others are answered;
    None: that is an exception like any other.

    Out of memory: the entry's batches are halved, down to one question. A cell is abandoned on its first
    other exception (its `error` holds the traceback); the others go on. UserError and interrupts pass
    through.
    """
    requests = list(task.instances)
    for entry in entries:
        entry.model.task_dict[task.config.task] = task.dataset
    questions = [entries[0].model.question(r) for r in requests]
    missing = [set(entry.model.missing(questions)) for entry in entries]
    wanted = sorted(set().union(*missing))
    first, step = part
    cache = backbone.vision_cache(cache_bytes) if cache_bytes is not None else contextlib.nullcontext()
    with cache:
        for batch in batches([questions[i] for i in wanted], batch_size)[first::step]:
            places = [wanted[i] for i in batch]
            prepared = _Prepared(requests, questions, places, refused)
            for entry, lacking in zip(entries, missing):
                todo = [p for p in prepared.places if p in lacking]
                if entry.report.error or not todo:
                    continue
                start = clock()
                answers = _answer(entry, todo, prepared)
                entry.report.seconds += clock() - start
                entry.report.computed += len(answers)
                yield entry, len(todo), answers


class _Prepared:
    """Model inputs of a batch's places, whole and taken apart by image, made when first asked for and shared
    by the entries. places: without those of which it turned out that inputs cannot be made. refused: see
    `answered`."""

    def __init__(
        self,
        requests: Sequence,
        questions: Sequence[Question],
        places: list[int],
        refused: dict[int, str] | None,
    ):
        self._requests, self._questions, self.places, self._refused = requests, questions, places, refused
        self._inputs, self._apart = None, None

    def inputs(self, model: PrunedModel, places: list[int]) -> dict:
        """Raises _Refused where it is single questions that they cannot be made of."""
        if places != self.places:  # resumed in the middle of a batch, or memory ran out
            return self._made(model, places)
        self._inputs = self._inputs or self._made(model, places)
        return dict(self._inputs)

    def _made(self, model: PrunedModel, places: list[int]) -> dict:
        try:
            return model.inputs([self._requests[p] for p in places])
        except Exception as error:
            if self._refused is None or out_of_memory.is_out_of_memory(error):
                raise
            reasons = {p: why for p in places if (why := self._refusal(model, p))}
            if not reasons:
                raise
            self._refused.update({self._questions[p].row: why for p, why in reasons.items()})
            self.places = [p for p in self.places if p not in reasons]
            raise _Refused(reasons) from error

    def _refusal(self, model: PrunedModel, place: int) -> str:
        """Why inputs cannot be made of one question; empty if they can."""
        try:
            model.inputs([self._requests[place]])
        except Exception as error:
            if out_of_memory.is_out_of_memory(error):
                raise
            first = (str(error).splitlines() or [""])[0]
            return first if isinstance(error, UserError) else f"{type(error).__name__}: {first}"
        return ""

    def answer(self, model: PrunedModel, places: list[int]) -> list[Answer]:
        """Answer and journal them."""
        questions, inputs = [self._questions[p] for p in places], self.inputs(model, places)

        def apart():
            if places != self.places:
                return taken_apart(model.backbone.model, questions, inputs)
            self._apart = self._apart or taken_apart(model.backbone.model, questions, inputs)
            return self._apart

        return model.answer(questions, inputs, apart)


def _answer(entry: SweepEntry, todo: list[int], prepared: _Prepared) -> list[Answer]:
    """Answer `todo` in as large pieces as memory holds; sets the entry's error if one alone does not fit."""
    answers: list[Answer] = []
    while len(answers) < len(todo):
        piece = todo[len(answers) :][: entry.report.reduced]
        try:
            answers += prepared.answer(entry.model, piece)
        except _Refused as error:
            todo = [p for p in todo if p not in error.places]
            continue
        except Exception as error:
            if isinstance(error, UserError) and not isinstance(error, BadSelection):
                raise
            if len(piece) == 1 or not out_of_memory.is_out_of_memory(error):
                entry.report.error = traceback.format_exc(limit=-4)
                return answers
            entry.report.reduced = len(piece) // 2
        else:
            continue
        out_of_memory.release()
    return answers
