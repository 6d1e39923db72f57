"""Answer one benchmark for many cells at once, sharing what they have in common.

Order of computation: batches of questions grouped by image; for each batch the images are decoded and
preprocessed once, and each cell's pruner answers it in turn inside of the backbone's vision cache, so the
vision tower runs once an image for all methods that read the same tower output.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from harness.adapter import PrunedModel
from harness.answering import batches
from harness.config import Cell
from harness.errors import UserError

#: enough for a batch of every family's images and all signals; older images go first
VISION_CACHE_BYTES = 2 << 30


@dataclass
class Seat:
    """A cell in the sweep: its adapter, seconds spent in it, answers computed now, and its error if it
    failed.
    """

    cell: Cell
    model: PrunedModel
    seconds: float = 0.0
    computed: int = 0
    error: str | None = None


def answer_all(
    backbone,
    task,
    seats: Sequence[Seat],
    batch_size: int,
    clock: Callable[[], float],
    progress: Callable[[Seat, int], None] = lambda seat, answers: None,
    cache_bytes: int | None = VISION_CACHE_BYTES,
) -> None:
    """Fill the seats' journals with every missing answer.

    task: a lmms-eval task whose requests are built. A cell is abandoned on its first exception (its `error`
    holds the traceback); the others go on. UserError and interrupts pass through. cache_bytes None: no vision
    cache.
    """
    requests = list(task.instances)
    for seat in seats:
        seat.model.task_dict[task.config.task] = task.dataset
    questions = [seats[0].model.question(r) for r in requests]
    missing = [set(seat.model.missing(questions)) for seat in seats]
    wanted = sorted(set().union(*missing))
    cache = backbone.vision_cache(cache_bytes) if cache_bytes is not None else _nothing()
    with cache:
        for batch in batches([questions[i] for i in wanted], batch_size):
            places = [wanted[i] for i in batch]
            shared = None
            for seat, lacking in zip(seats, missing):
                todo = [p for p in places if p in lacking]
                if seat.error or not todo:
                    continue
                start = clock()
                try:
                    if len(todo) < len(places):  # resumed in the middle of a batch
                        inputs = seat.model.inputs([requests[p] for p in todo])
                    else:
                        shared = shared or seat.model.inputs([requests[p] for p in places])
                        inputs = dict(shared)
                    seat.model.answer([questions[p] for p in todo], inputs)
                except UserError:
                    raise
                except Exception:
                    seat.error = traceback.format_exc(limit=-4)
                seat.seconds += clock() - start
                seat.computed += 0 if seat.error else len(todo)
                progress(seat, len(todo))


def _nothing():
    from contextlib import nullcontext

    return nullcontext()
