"""Several processes on the cells of one run, as `accelerate launch` and `torchrun` start them.

Each process loads the backbone (on a GPU of its own where there are GPUs) and answers its share of every
cell's documents; the first one scores, measures latency and writes the records. They exchange a few short
messages, for which the launcher's key-value store is enough. There is no torch process group on
purpose: where one exists, lmms-eval waits in it for all processes to score together.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

from methods.errors import UserError

T = TypeVar("T")
#: how long a process waits for the others: one may have the whole of the latency measurements to do
PATIENCE = timedelta(days=2)
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class Processes:
    """This process among those of the run: the rank-th (from 0) of `size`."""

    rank: int = 0
    size: int = 1
    _store: object = field(default=None, repr=False, compare=False)
    _round: Iterator[int] = field(default_factory=itertools.count, repr=False, compare=False)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every process's value (JSON-able), in order of rank, in every process. Waits for all."""
        if self.size == 1:
            return [value]
        number = next(self._round)
        self._store.set(f"{number}/{self.rank}", json.dumps(value))
        return [json.loads(self._store.get(f"{number}/{rank}")) for rank in range(self.size)]

    def agreed(self, action: Callable[[], T], by_first: bool = False) -> T:
        """`action()` in every process. by_first: in the first process alone; all get its (JSON-able) result.

        Waits for all. UserError in one process ends all: it is raised in the first one, the others exit with
        the same code in silence.
        """
        result, problem = None, None
        if self.first or not by_first:
            try:
                result = action()
            except UserError as error:
                if self.size == 1:
                    raise
                problem = str(error) if self.first else f"process {self.rank} of {self.size}: {error}"
        problems = [p for p in self.gather(problem) if p is not None]
        if problems:
            if self.first:
                raise UserError(problems[0])
            raise SystemExit(2)
        return self.gather(result)[0] if by_first else result


ALONE = Processes()


def local_rank() -> int:
    """Number of this process on its machine, 0 if it was not started by a launcher."""
    return int(os.environ.get("LOCAL_RANK", 0))


def launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


@contextlib.contextmanager
def joined() -> Iterator[Processes]:
    """The processes of this run, connected; `ALONE` without a launcher. To be entered once."""
    if not launched():
        yield ALONE
        return
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(iter(rendezvous("env://", timeout=PATIENCE)))
    store.set_timeout(PATIENCE)
    for name in _LAUNCHER:  # lmms-eval would take its share of the documents by them
        os.environ.pop(name, None)
    team = Processes(rank, size, store)
    yield team
    team.gather("done")  # the store may live in the first process
    if team.first:
        for other in range(1, size):
            store.get(f"left/{other}")
    else:
        store.set(f"left/{rank}", "")
