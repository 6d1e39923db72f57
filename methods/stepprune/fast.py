"""The selection loop made fast: on the CPU by fewer operator calls (`FoldedLoop`), on a GPU as CUDA graphs
(`ChunkedLoop`): no kernel launch from the host, chunk after chunk of steps.

An eager loop launches tens of kernels a step, 20 to 60 ms for 64 steps, which is more than pruning saves. All
shapes of `Policy.step` are static, so that a chunk of steps can be recorded once for a batch's shape and
replayed. Between chunks, not inside, the host may look whether all samples have stopped.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.stepprune.policy import Choices, DecoderLayer, Memory, Policy

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


def folded(norm: nn.LayerNorm, linear: nn.Linear, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Weight, transposed to [in, out], and bias [out] of `scale * linear(norm(x))`, for x that is centred and
    scaled already."""
    weight = linear.weight * norm.weight
    bias = linear.weight @ norm.bias
    if linear.bias is not None:
        bias = bias + linear.bias
    return (weight * scale).t().contiguous(), bias * scale


class FoldedLayer:
    """A `DecoderLayer` for one step: the norms' weights are part of the matrices behind them."""

    def __init__(self, layer: DecoderLayer):
        self.heads, self.points = layer.heads, layer.points
        self.qkv = folded(layer.norm_self, layer.qkv)
        self.out_self = layer.out_self.weight.t().contiguous(), layer.out_self.bias
        self.query = folded(layer.norm_cross, layer.query)
        if not layer.points:
            self.out_cross = layer.out_cross.weight.t().contiguous(), layer.out_cross.bias
            self.up = folded(layer.norm_mlp, layer.mlp[0])
            self.down = layer.mlp[2].weight.t().contiguous(), layer.mlp[2].bias


class FoldedLoop:
    """`Policy.decode` on the CPU in float32, with three fifths of its operator calls:
    the same choices, of logits that are equal up to rounding.

    There a step of a narrow policy costs what its operator calls cost. So norms are folded into the matrices
    behind them, a residual is added by the matrix product, keys and values lie contiguous, and bias and mask
    are one tensor.
    """

    @torch.no_grad()
    def __init__(self, policy: Policy):
        self.policy = policy
        self._layers = [FoldedLayer(layer) for layer in policy.decoder]
        if policy.config.pointer == "projection":
            scale = policy.config.width**-0.5
            self._query = folded(policy.norm, policy.pointer_query, scale)

    @torch.inference_mode()
    def __call__(self, memory: Memory) -> Choices:
        rows, stop, policy = memory.rows, memory.stop, self.policy
        batch, _, width = rows.shape
        steps, heads = policy.steps(memory), policy.config.head_count
        each = width // heads
        keys = [k.contiguous() for k in memory.keys]
        values = [None if v is None else v.contiguous() for v in memory.values]
        pointer = None if memory.pointer_keys is None else memory.pointer_keys.transpose(1, 2).contiguous()
        bias = memory.bias.clone()[:, None]  # takes the mask m_t up, step by step
        flat, flat_bias = rows.reshape(-1, width), bias.view(-1)
        first = torch.arange(batch) * (stop + 1)
        codes = policy.step_codes
        order = torch.full((batch, steps), stop)
        done = torch.zeros(batch, dtype=torch.bool)
        past = [rows.new_empty(2, batch, heads, steps, each) for _ in self._layers]
        query = policy.start.expand(batch, -1)
        one = batch == 1
        for at in range(steps):
            x = query + codes[at]
            for i, layer in enumerate(self._layers):
                qkv = torch.addmm(layer.qkv[1], torch.layer_norm(x, (width,)), layer.qkv[0])
                parts = qkv.view(batch, 3, heads, 1, each)
                past[i][:, :, :, at : at + 1] = parts[:, 1:].transpose(0, 1)
                seen = past[i][:, :, :, : at + 1]
                read = F.scaled_dot_product_attention(parts[:, 0], seen[0], seen[1]).view(batch, width)
                x = torch.addmm(x, read, layer.out_self[0]).add_(layer.out_self[1])
                asked = torch.addmm(layer.query[1], torch.layer_norm(x, (width,)), layer.query[0])
                asked = asked.view(batch, heads, 1, each)
                if layer.points:
                    logits = (asked @ keys[i].transpose(-1, -2)).mean(1) * each**-0.5 + bias
                    break
                read = F.scaled_dot_product_attention(asked, keys[i], values[i], attn_mask=memory.valid)
                x = torch.addmm(x, read.view(batch, width), layer.out_cross[0]).add_(layer.out_cross[1])
                hidden = torch.addmm(layer.up[1], torch.layer_norm(x, (width,)), layer.up[0])
                x = torch.addmm(x, F.gelu(hidden), layer.down[0]).add_(layer.down[1])
            else:
                asked = torch.addmm(self._query[1], torch.layer_norm(x, (width,)), self._query[0])[:, None]
                logits = torch.bmm(asked, pointer).add_(bias)  # fvcore counts bmm, not baddbmm
            logits = logits[:, 0]
            choice = (logits if at >= policy.config.min_tokens else logits[:, :stop]).argmax(1)
            if not one:
                choice.masked_fill_(done, stop)
            order[:, at] = choice  # the tensor, not its number: a trace that counts FLOPs must see the step
            if one:  # reading costs nothing here
                taken = int(choice)
                if taken == stop:
                    break
                flat_bias[taken] = -math.inf
                query = flat[taken : taken + 1]
                continue
            done = choice == stop
            if bool(done.all()):
                break
            places = first + choice
            flat_bias[places] = -math.inf
            query = flat[places]
        return Choices(order, (order != stop).sum(1))


class Decoder:
    """`Policy.decode`, by graphs on a GPU: one recording per shape of batch, the latest few kept; on a CPU
    in float32 by `FoldedLoop`, of the weights as they are at the first call."""

    KEPT = 4

    def __init__(self, policy: Policy):
        self.policy = policy
        self._loops: dict[tuple, ChunkedLoop] = {}
        self._folded: FoldedLoop | None = None

    def __call__(self, memory: Memory) -> Choices:
        if memory.rows.device.type == "cpu" and memory.rows.dtype == torch.float32:
            self._folded = self._folded or FoldedLoop(self.policy)
            return self._folded(memory)
        if not memory.rows.is_cuda:
            return self.policy.decode(memory)
        key = (memory.rows.shape, memory.valid is None)
        loop = self._loops.pop(key, None) or ChunkedLoop(self.policy, memory)
        self._loops[key] = loop
        while len(self._loops) > self.KEPT:
            del self._loops[next(iter(self._loops))]
        return loop(memory)
