"""The selection loop made fast: on the CPU by fewer operator calls (`FoldedLoop`), on a GPU as CUDA graphs
(`ChunkedLoop`): no kernel launch from the host, chunk after chunk of steps.

An eager loop launches tens of kernels per step, 20 to 60 ms for 64 steps, which is more than pruning saves.
All shapes of `Policy.step` are static, so that a chunk of steps can be recorded once for a batch's shape and
replayed. Between chunks, not inside, the host may look whether all samples have stopped.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.stepprune.policy import Choices, DecoderLayer, Memory, Policy, best

CHUNK = 32
#: a policy of at most so many heads is narrow, see `FoldedLoop`
NARROW = 4


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
    """A `DecoderLayer` for one step: the norms' weights are part of the matrices behind them; of a narrow
    layer also the matrices of keys and values, which turn to the query and to what was read: its queries
    and values are [d], one a head, and the memory's rows are keys and values of all heads."""

    def __init__(self, layer: DecoderLayer):
        self.heads, self.points = layer.heads, layer.points
        self.qkv = folded(layer.norm_self, layer.qkv)
        self.out_self = layer.out_self.weight.t().contiguous(), layer.out_self.bias
        self.query = folded(layer.norm_cross, layer.query)
        self.narrow = layer.heads <= NARROW and not layer.points
        if not layer.points:
            self.out_cross = layer.out_cross.weight.t().contiguous(), layer.out_cross.bias
        if self.narrow:  # a key's own bias moves all logits alike; weights of what is read sum to 1
            key, value = (split.weight.unflatten(0, (self.heads, -1)) for split in (layer.key, layer.value))
            query = (part.unflatten(-1, (self.heads, -1)) for part in self.query)
            self.query = tuple(torch.einsum("...he,hed->...hd", part, key).flatten(-2) for part in query)
            out, bias = self.out_cross
            out = torch.einsum("heo,hed->hdo", out.unflatten(0, (self.heads, -1)), value).flatten(0, 1)
            self.out_cross = out, bias + layer.out_cross.weight @ layer.value.bias
        if not layer.points:
            self.up = folded(layer.norm_mlp, layer.mlp[0])
            self.down = layer.mlp[2].weight.t().contiguous(), layer.mlp[2].bias


class FoldedLoop:
    """`Policy.decode` on the CPU in float32, with three fifths of its operator calls:
    the same choices, of logits that are equal up to rounding.

    There a step of a narrow policy costs what its operator calls cost, and of several samples what it reads
    of the memory. So norms are folded into the matrices behind them, a residual is added by the matrix
    product, bias and mask are one tensor, and a sample that has stopped is left out from then on. The pointer
    reads the memory's rows, and so does a narrow policy's cross-attention (a third of the bytes); of a wide
    one that matrix would be larger than what it saves, and keys and values lie contiguous.
    """

    @torch.no_grad()
    def __init__(self, policy: Policy):
        self.policy = policy
        self._layers = [FoldedLayer(layer) for layer in policy.decoder]
        if policy.config.pointer == "projection":
            scale = policy.config.width**-0.5
            query = folded(policy.norm, policy.pointer_query, scale)
            self._query = tuple(part @ policy.pointer_key.weight for part in query)

    @torch.inference_mode()
    def __call__(self, memory: Memory, tokens_per_step: int = 1) -> Choices:
        """tokens_per_step: see `Policy.decode`."""
        stop, policy = memory.stop, self.policy
        batch, _, width = memory.rows.shape
        steps, heads, least = policy.steps(memory), policy.config.head_count, policy.config.min_tokens
        each = width // heads
        own, rows = _Running(memory, self._layers, steps), memory.rows.reshape(-1, width)
        codes, last = policy.step_codes, len(self._layers) - 1
        order = torch.full((batch, steps), stop)
        places, place = torch.arange(batch), 0  # which samples still run, and the first of them
        x, at = policy.start + codes[:1].expand(batch, -1), 0
        while True:
            n = len(x) // batch  # inputs of each sample, the latest in the sequence's places at - n + 1 to at
            for i, layer in enumerate(self._layers):
                qkv = torch.addmm(layer.qkv[1], torch.layer_norm(x, (width,)), layer.qkv[0])
                parts = qkv.view(batch, n, 3, heads, each).permute(2, 0, 3, 1, 4)
                own.past[i][:, :, :, at - n + 1 : at + 1] = parts[1:]
                seen, query = own.past[i][:, :, :, : at + 1], parts[0]
                if i == last and n > 1:  # what comes after is asked of the latest alone
                    query, x, n = query[:, :, -1:], x.view(batch, n, width)[:, -1], 1
                read = F.scaled_dot_product_attention(query, seen[0], seen[1])
                x = torch.addmm(x, _joined(read), layer.out_self[0]).add_(layer.out_self[1])
                asked = torch.addmm(layer.query[1], torch.layer_norm(x, (width,)), layer.query[0])
                if layer.narrow:  # heads take the place of a single one's inputs
                    asked = asked.view(batch, 1, n * heads, width)
                elif n == 1:  # the same, by one call
                    asked = asked.view(batch, heads, 1, each)
                else:
                    asked = asked.view(batch, n, heads, each).transpose(1, 2)
                if layer.points:
                    logits = (asked @ own.keys[i].transpose(-1, -2)).mean(1) * each**-0.5 + own.bias
                    break
                keys, values = (own.rows[:, None],) * 2 if layer.narrow else (own.keys[i], own.values[i])
                read = F.scaled_dot_product_attention(asked, keys, values, own.valid, scale=each**-0.5)
                read = read.view(batch * n, heads * width) if layer.narrow else _joined(read)
                x = torch.addmm(x, read, layer.out_cross[0]).add_(layer.out_cross[1])
                hidden = torch.addmm(layer.up[1], torch.layer_norm(x, (width,)), layer.up[0])
                x = torch.addmm(x, F.gelu(hidden), layer.down[0]).add_(layer.down[1])
            else:
                asked = torch.addmm(self._query[1], torch.layer_norm(x, (width,)), self._query[0])[:, None]
                # fvcore counts bmm, not baddbmm
                logits = torch.bmm(asked, own.rows.transpose(1, 2)).add_(own.bias)
            logits = logits[:, 0] if at >= least else logits[:, 0, :stop]
            take = min(tokens_per_step, steps - at, stop)
            # the tensor, not its number: a trace that counts FLOPs must see the step
            choice = logits.argmax(1, keepdim=True) if take == 1 else best(logits, take, stop)
            if batch == 1 and take == 1:  # the same as below, by half of the calls
                order[place, at], taken = choice[0, 0], int(choice)  # reading costs nothing here
                at += 1
                if taken == stop or at == steps:
                    break
                own.bias.view(-1)[taken] = -math.inf
                taken += place * (stop + 1)
                x = rows[taken : taken + 1] + codes[at]
                continue
            order[places, at : at + take] = choice
            at += take
            if at == steps:
                break
            ended = choice[:, -1] == stop
            if bool(ended.any()):
                going = own.keep((~ended).nonzero()[:, 0].tolist())
                if not going:
                    break
                batch, places, choice = len(going), places[going], choice[going]
                place = int(places[0])
            own.bias.scatter_(2, choice[:, None], -math.inf)
            x = rows[places[:, None] * (stop + 1) + choice] + codes[at - take + 1 : at + 1]
            x = x.view(-1, width)
        return Choices(order, (order != stop).sum(1))


def _joined(read: Tensor) -> Tensor:
    """[B, heads, n, d / heads] -> [B n, d]."""
    batch, heads, n, each = read.shape
    if n == 1:
        return read.view(batch, heads * each)
    return read.transpose(1, 2).reshape(batch * n, heads * each)


class _Running:
    """What the loop reads of the samples that still run, contiguous; the rest as in `Memory`. The bias
    [B, 1, N + 1] takes the mask m_t up, step by step. past: keys and values of the inputs, one
    [2, B, heads, S, d / heads] a layer."""

    def __init__(self, memory: Memory, layers: list[FoldedLayer], steps: int):
        batch, _, width = memory.rows.shape
        heads = layers[0].heads

        def own(x: Tensor) -> Tensor:
            return x.clone(memory_format=torch.contiguous_format)

        self.rows = own(memory.rows)
        self.keys = [None if part.narrow else own(k) for k, part in zip(memory.keys, layers)]
        self.values = [None if v is None or part.narrow else own(v) for v, part in zip(memory.values, layers)]
        self.bias = own(memory.bias[:, None])
        self.valid = None
        if memory.valid is not None:  # to be added: a mask of truth values is made into this in every step
            self.valid = torch.zeros(memory.valid.shape).masked_fill_(~memory.valid, -math.inf)
        self.past = [memory.rows.new_empty(2, batch, heads, steps, width // heads) for _ in layers]

    def keep(self, samples: list[int]) -> list[int]:
        """These samples alone (ascending); one that has stopped would cost as much as one that runs. The last
        ones move into the places that are free; returned is which sample each place has then."""
        few = len(samples)
        free = sorted(set(range(few)).difference(samples))
        late = samples[few - len(free) :]
        moved = dict(zip(free, late))

        def kept(x: Tensor | None, batch: int = 0) -> Tensor | None:
            if x is None:
                return None
            for place, sample in zip(free, late):
                x.select(batch, place).copy_(x.select(batch, sample))
            return x.narrow(batch, 0, few)

        self.keys, self.values = [kept(k) for k in self.keys], [kept(v) for v in self.values]
        self.rows, self.bias, self.valid = kept(self.rows), kept(self.bias), kept(self.valid)
        self.past = [kept(p, 1) for p in self.past]
        return [moved.get(place, place) for place in range(few)]


class Decoder:
    """`Policy.decode`, by graphs on a GPU: one recording per shape of batch, the latest few kept; on a CPU
    in float32 by `FoldedLoop`, of the weights as they are at the first call."""

    KEPT = 4

    def __init__(self, policy: Policy, tokens_per_step: int = 1):
        self.policy, self.tokens_per_step = policy, tokens_per_step
        self._loops: dict[tuple, ChunkedLoop] = {}
        self._folded: FoldedLoop | None = None

    def __call__(self, memory: Memory) -> Choices:
        if memory.rows.device.type == "cpu" and memory.rows.dtype == torch.float32:
            self._folded = self._folded or FoldedLoop(self.policy)
            return self._folded(memory, self.tokens_per_step)
        if not memory.rows.is_cuda or self.tokens_per_step > 1:
            return self.policy.decode(memory, self.tokens_per_step)
        key = (memory.rows.shape, memory.valid is None)
        loop = self._loops.pop(key, None) or ChunkedLoop(self.policy, memory)
        self._loops[key] = loop
        while len(self._loops) > self.KEPT:
            del self._loops[next(iter(self._loops))]
        return loop(memory)
