"""The selection loop as CUDA graphs: no kernel launch from the host, chunk after chunk of steps.

An eager loop launches tens of kernels a step, 20 to 60 ms for 64 steps, which is more than pruning saves. All
shapes of `Policy.step` are static, so that a chunk of steps can be recorded once for a batch's shape and
replayed. Between chunks, not inside, the host may look whether all samples have stopped.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from methods.stepprune.policy import Choices, Memory, Policy

CHUNK = 32


def tensors(memory: Memory) -> list[Tensor]:
    """All of a memory's tensors, in a fixed order."""
    parts = [memory.rows, *memory.keys, *memory.values, memory.pointer_keys, memory.bias, memory.valid]
    return [p for p in parts if p is not None]


class ChunkedLoop:
    """`Policy.decode` for memories of one shape.

    record: turns a chunk (a function without arguments that works in place) into what replays it; left out,
    a CUDA graph on a GPU, the chunk itself elsewhere.
    """

    def __init__(
        self,
        policy: Policy,
        like: Memory,
        chunk: int = CHUNK,
        record: Callable[[Callable[[], None]], Callable[[], None]] | None = None,
    ):
        self.policy = policy
        if record is None:
            record = as_cuda_graph if like.rows.is_cuda else lambda chunk: chunk
        with torch.inference_mode():
            copies = iter([t.clone() for t in tensors(like)])
            self._memory = Memory(
                next(copies),
                tuple(next(copies) for _ in like.keys),
                tuple(None if v is None else next(copies) for v in like.values),
                None if like.pointer_keys is None else next(copies),
                next(copies),
                None if like.valid is None else next(copies),
            )
            self._state = policy.begin(self._memory, policy.steps(like))
            self._start = self._state.query.clone()
            steps = self._state.order.shape[1]
            self._chunks = [
                record(self._chunk(first, min(first + chunk, steps))) for first in range(0, steps, chunk)
            ]

    def _chunk(self, first: int, end: int) -> Callable[[], None]:
        def run() -> None:
            for at in range(first, end):
                self.policy.step(self._memory, self._state, at)

        return run

    @torch.inference_mode()
    def __call__(self, memory: Memory, look: bool = True) -> Choices:
        """look: stop between chunks once all samples have (one synchronisation a chunk)."""
        for own, new in zip(tensors(self._memory), tensors(memory)):
            own.copy_(new)
        state = self._state
        state.query.copy_(self._start)
        state.mask.zero_()
        state.done.zero_()
        state.order.fill_(memory.stop)
        for i, chunk in enumerate(self._chunks):
            if look and i and bool(state.done.all()):
                break
            chunk()
        order = state.order.clone()
        return Choices(order, (order != memory.stop).sum(1))


def as_cuda_graph(chunk: Callable[[], None]) -> Callable[[], None]:
    """Record a chunk. It works in place on tensors that stay; a warm-up on a side stream comes first, as
    torch asks."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            chunk()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chunk()
    return graph.replay


class Decoder:
    """`Policy.decode`, by graphs on a GPU: one recording a shape of batch, the latest few kept."""

    KEPT = 4

    def __init__(self, policy: Policy):
        self.policy = policy
        self._loops: dict[tuple, ChunkedLoop] = {}

    def __call__(self, memory: Memory) -> Choices:
        if not memory.rows.is_cuda:
            return self.policy.decode(memory)
        key = (memory.rows.shape, memory.valid is None)
        loop = self._loops.pop(key, None) or ChunkedLoop(self.policy, memory)
        self._loops[key] = loop
        while len(self._loops) > self.KEPT:
            del self._loops[next(iter(self._loops))]
        return loop(memory)
