"""One small timer for both kinds of device: marks on a stream, read as milliseconds after one
synchronisation.
"""

from __future__ import annotations

import time

import torch


class Timer:
    """`mark()` notes now; `elapsed()` gives the milliseconds between consecutive marks.

    CPU: `perf_counter`. CUDA: events on the current stream, read after a single synchronize, so that timing
    does not itself serialise the host and the device.
    """

    def __init__(self, device: torch.device | str):
        self.cuda = torch.device(device).type == "cuda"
        self._marks: list = []

    def mark(self) -> int:
        """Returns the mark's number."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())
        return len(self._marks) - 1

    def between(self, first: int, last: int) -> float:
        """Milliseconds from mark `first` to mark `last`. On CUDA the caller has synchronised."""
        a, b = self._marks[first], self._marks[last]
        return a.elapsed_time(b) if self.cuda else 1000 * (b - a)


def synchronize(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
