"""Many questions behind one image prefix: how they lie in memory, and the attention that keeps them apart.

A question sees the image prefix and itself, never its neighbours. Questions are dealt to short rows, so that
a row's own attention is a small block, and the prefix stands in memory once per image: a sequence is the
prefix, then the rows one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from harness.pocket.recipe.drills import Looks

IGNORE = -100
#: Tokens of a row, or of the longest question where that is longer.
ROW = 64
NAME = "packed_questions"

#: kind, ids, targets, asides, looks
Encoded = tuple[str, list[int], list[int], list[int], Looks]


@dataclass(frozen=True)
class Packs:
    """The questions about B images, int64 [B, R, C]: R rows of C tokens per image.

    Attributes:
        ids: tokens; the padding token where there are none.
        targets: the answer's tokens at their places, elsewhere IGNORE.
        asides: what to think of at the token before (see `drills.Drill`), elsewhere IGNORE.
        segment: number of the question among its image's, from 1; 0: padding.
        offset: place within its question.
        kinds: of each image's questions, by `segment` - 1.
        looks: of the same, see `drills.Drill`.
    """

    ids: Tensor
    targets: Tensor
    asides: Tensor
    segment: Tensor
    offset: Tensor
    kinds: list[list[str]]
    looks: list[list[Looks]]

    @property
    def wanted(self) -> Tensor:
        """What each token shall make the model think of, int64 [B, R * C - 1]: of the first token there is
        none; elsewhere IGNORE."""
        return torch.where(self.asides == IGNORE, self.targets, self.asides).flatten(1)[:, 1:]

    @property
    def first(self) -> Tensor:
        """The tokens that the answers' first tokens are read from, bool [B, R * C - 1]."""
        targets = self.targets.flatten(1)
        return (targets[:, 1:] != IGNORE) & (targets[:, :-1] == IGNORE)


def rows_of(questions: Sequence[Encoded], size: int) -> list[list[int]]:
    """Numbers of the questions in each row: the longest first, each into the first row with room."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(questions)), key=lambda i: -len(questions[i][1])):
        length = len(questions[i][1])
        row = next((r for r, free in enumerate(room) if free >= length), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(size)
        rows[row].append(i)
        room[row] -= length
    return rows


def collate(packs: Sequence[Sequence[Encoded]], pad: int) -> Packs:
    """packs: the questions about each image."""
    size = max(ROW, *(len(ids) for pack in packs for _, ids, *_ in pack))
    dealt = [rows_of(pack, size) for pack in packs]
    ids = torch.full((len(packs), max(map(len, dealt)), size), pad)
    targets, asides = torch.full_like(ids, IGNORE), torch.full_like(ids, IGNORE)
    segment, offset = torch.zeros_like(ids), torch.zeros_like(ids)
    for b, (pack, rows) in enumerate(zip(packs, dealt)):
        for r, row in enumerate(rows):
            at = 0
            for i in row:
                _, question, target, aside, _ = pack[i]
                place = b, r, slice(at, at + len(question))
                ids[place], targets[place] = torch.tensor(question), torch.tensor(target)
                asides[place], segment[place] = torch.tensor(aside), i + 1
                offset[place] = torch.arange(len(question))
                at += len(question)
    kinds, looks = ([[question[i] for question in pack] for pack in packs] for i in (0, -1))
    return Packs(ids, targets, asides, segment, offset, kinds, looks)


@dataclass
class Gaze:
    """Where the answers about one image are looked for, by the first half of the heads of some layers. Where
    a question needs two looks, one half of these does the one, the other half the other.

    Attributes:
        layers: numbers of those layers.
        asked: int64 [A], places in the sequence from which answers are read.
        first: place of the first visual token.
        evidence: float32 [2, A, K], of each half which of the K visual tokens hold the answer, in equal
            shares that sum to 1.
        losses: of each layer so far, the cross-entropy of attention among the visual tokens against it.
    """

    layers: range
    asked: Tensor
    first: int
    evidence: Tensor
    losses: list[Tensor] = field(default_factory=list)

    def look(self, layer: int, q: Tensor, k: Tensor, scale: float) -> None:
        """q, k: float32 [1, H, L, d] of that layer."""
        if layer in self.layers:
            heads = slice(q.shape[1] // 4 * 2)
            visual = slice(self.first, self.first + self.evidence.shape[-1])
            logits = scale * q[0, heads, self.asked] @ k[0, heads, visual].mT
            shares = logits.log_softmax(-1).unflatten(0, (2, -1))
            self.losses.append(-(self.evidence[:, None] * shares).sum(-1).mean())


@dataclass(frozen=True)
class PackLayout:
    """prefix: tokens of the image prefix. hidden: float32 [B * R, 1, C, C], 0 where a token of a row sees
    another of it, minus infinity elsewhere. gaze: collects a loss of where heads look; None: it is not
    wanted."""

    prefix: int
    hidden: Tensor
    gaze: Gaze | None = None

    @classmethod
    def of(cls, packs: Packs, prefix: int, gaze: Gaze | None = None) -> PackLayout:
        segment = packs.segment.flatten(0, 1)
        same = segment[:, :, None] == segment[:, None]
        sees = same & torch.ones(same.shape[1:], dtype=torch.bool).tril()
        return cls(prefix, torch.zeros(same.shape).masked_fill(~sees, -torch.inf)[:, None], gaze)


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Attention(torch.autograd.Function):
    """Attention of the prefix to itself, and of the rows to the prefix and to themselves.

    The rows' two groups of keys are attended to apart and joined by their normalisers, as ring attention
    does, so no key of the prefix is copied per row. torch's CPU kernels do the parts, backwards too: given
    the joint output and normaliser, a part's gradients are those of the whole.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, layout: PackLayout, scale: float) -> Tensor:
        """q, k, v: [B, H, L, d]; L = prefix + R * C. Returns the same shape."""
        parts = [_parts(t, layout) for t in (q, k, v)]
        (q0, q1, q2), (k0, _, k2), (v0, _, v2) = parts
        head, head_norm = _flash(q0, k0, v0, is_causal=True, scale=scale)
        seen, seen_norm = _flash(q1, k0, v0, scale=scale)
        own, own_norm = _flash(q2, k2, v2, attn_mask=layout.hidden, scale=scale)
        norm = torch.logaddexp(seen_norm, _joined(own_norm, len(q)))
        out = seen * (seen_norm - norm).exp()[..., None]
        out += _joined(own, len(q)) * (_joined(own_norm, len(q)) - norm).exp()[..., None]
        ctx.save_for_backward(q, k, v, head, head_norm, out, norm)
        ctx.layout, ctx.scale = layout, scale
        return torch.cat([head, out], 2)

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, head, head_norm, out, norm = ctx.saved_tensors
        layout, scale = ctx.layout, ctx.scale
        (q0, q1, q2), (k0, _, k2), (v0, _, v2) = (_parts(t, layout) for t in (q, k, v))
        g0, g1 = grad[:, :, : layout.prefix], grad[:, :, layout.prefix :].contiguous()
        g0 = g0.contiguous()
        rows = len(layout.hidden) // len(q)
        in_head = _flash_backward(g0, q0, k0, v0, head, head_norm, 0.0, True, scale=scale)
        in_seen = _flash_backward(g1, q1, k0, v0, out, norm, 0.0, False, scale=scale)
        split = (_split(t, rows) for t in (g1, out, norm))
        g2, out2, norm2 = split
        in_own = _flash_backward(
            g2, q2, k2, v2, out2, norm2, 0.0, False, attn_mask=layout.hidden, scale=scale
        )
        own = [_joined(t, len(q)) for t in in_own]
        dq = torch.cat([in_head[0], in_seen[0] + own[0]], 2)
        dk = torch.cat([in_head[1] + in_seen[1], own[1]], 2)
        dv = torch.cat([in_head[2] + in_seen[2], own[2]], 2)
        return dq, dk, dv, None, None


def _split(t: Tensor, rows: int) -> Tensor:
    """[B, H, R * C, ...] -> [B * R, H, C, ...]."""
    return t.unflatten(2, (rows, -1)).transpose(1, 2).flatten(0, 1).contiguous()


def _joined(t: Tensor, images: int) -> Tensor:
    """[B * R, H, C, ...] -> [B, H, R * C, ...]."""
    return t.unflatten(0, (images, -1)).transpose(1, 2).flatten(2, 3)


def _parts(t: Tensor, layout: PackLayout) -> tuple[Tensor, Tensor, Tensor]:
    """The prefix, the rows as one sequence, the rows apart."""
    rest = t[:, :, layout.prefix :]
    return t[:, :, : layout.prefix], rest, _split(rest, len(layout.hidden) // len(t))


def _attend(module: nn.Module, query, key, value, attention_mask, scaling, packed: PackLayout, **_):
    if packed.gaze is not None:
        packed.gaze.look(module.layer_idx, query, key, scaling)
    return _Attention.apply(query, key, value, packed, scaling).transpose(1, 2), None


AttentionInterface.register(NAME, _attend)


@contextmanager
def attention_of(language: nn.Module) -> Iterator[None]:
    """Inside, the language model's forward takes `packed=PackLayout` and attends accordingly."""
    before = language.config._attn_implementation
    language.config._attn_implementation = NAME
    try:
        yield
    finally:
        language.config._attn_implementation = before
