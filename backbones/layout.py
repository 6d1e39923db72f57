"""Book-keeping of a batch whose samples lose columns: which are left, where they came from, how they pad.

Samples are left-padded; after every cut they are padded anew to the longest one, so that the last token of
every sample stays at column -1, where generate() and the attention rows read it. Everything a later stage
needs to know about sizes is kept on the host, so a cut whose counts are fixed costs no device
synchronisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """One state of the batch, B samples in W columns.

    Attributes:
        width: W.
        lengths: valid tokens of each sample.
        columns: for each sample, int64 [V], the columns of its visual tokens, ascending.
        kept: for each sample, int64 [V], which token of its image each of those is.
        device: of the tensors.
    """

    width: int
    lengths: tuple[int, ...]
    columns: tuple[Tensor, ...]
    kept: tuple[Tensor, ...]
    device: torch.device

    @property
    def visual(self) -> list[int]:
        """Visual tokens of each sample."""
        return [len(c) for c in self.columns]

    @property
    def padded(self) -> bool:
        return min(self.lengths) < self.width

    @cached_property
    def ends(self) -> Tensor:
        """`lengths` as int64 [B]: with positions counted anew, that of the first decoded token."""
        return torch.tensor(self.lengths, device=self.device)

    @cached_property
    def positions(self) -> Tensor:
        """0, 1, 2, ... over each sample's tokens, int64 [B, W]; 0 at padding."""
        return (torch.arange(self.width, device=self.device) - (self.width - self.ends)[:, None]).clamp(min=0)

    @cached_property
    def valid(self) -> Tensor | None:
        """bool [B, W], False at padding; None if there is none."""
        if not self.padded:
            return None
        return torch.arange(self.width, device=self.device) >= (self.width - self.ends)[:, None]

    def valid_with(self, new: int) -> Tensor | None:
        """`valid` with `new` decoded tokens behind, [B, W + new]."""
        if self.valid is None:
            return None
        return torch.cat([self.valid, self.valid.new_ones(len(self.valid), new)], 1)


def layout_of(is_visual: Tensor, mask: Tensor | None) -> Layout:
    """Layout of a prompt. is_visual: bool [B, W]; mask: attention mask [B, W], None if nothing is padded.

    Costs one device synchronisation (transformers makes one at the same place, to count placeholders). Raises
    RuntimeError for anything but left padding.
    """
    batch, width = is_visual.shape
    counts = [is_visual.sum(1)]
    if mask is not None:
        valid = mask.bool()
        starts = width - valid.sum(1)
        as_told = torch.arange(width, device=mask.device) >= starts[:, None]
        counts += [valid.sum(1), (valid == as_told).all(1).long()]
    visual, *rest = torch.stack(counts).tolist()
    lengths, left_padded = rest if rest else ([width] * batch, [1] * batch)
    if not all(left_padded):
        raise RuntimeError(
            "pad prompts on the left while a pruner is on: processor(..., padding_side='left')"
        )
    order = (~is_visual).to(torch.int8).argsort(dim=1, stable=True)
    columns = tuple(order[b, :n] for b, n in enumerate(visual))
    kept = tuple(torch.arange(n, device=is_visual.device) for n in visual)
    return Layout(width, tuple(lengths), columns, kept, is_visual.device)


@dataclass(frozen=True)
class Move:
    """What a cut does to the columns.

    Attributes:
        source: int64 [B, W'], old column that each new one gets its values from; 0 at padding.
        place: int64 [B, W'], old column that each new one gets its position from; 0 at padding.
    """

    source: Tensor
    place: Tensor


def cut(
    before: Layout,
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    places: Sequence[Tensor],
    kept: Sequence[Tensor],
) -> tuple[Move, Layout]:
    """Drop visual tokens. All arguments hold one int64 [n] a sample and count its visual tokens from 0.

    targets: whose columns are filled afterwards, ascending. sources: which token goes into each of them.
    places: whose position it takes. kept: what it is, for `Layout.kept`.
    """
    device = before.device
    lengths = [n - len(c) + len(t) for n, c, t in zip(before.lengths, before.columns, targets)]
    width = max(lengths)
    source = torch.zeros(len(lengths), width, dtype=torch.long, device=device)
    place = source.clone()
    columns = []
    everything = torch.arange(before.width, device=device)
    for b, length in enumerate(lengths):
        old, goal = before.columns[b], before.columns[b][targets[b]]
        drop = torch.zeros(before.width, dtype=torch.int8, device=device)
        drop[: before.width - before.lengths[b]] = 1
        drop[old] = 1
        drop[goal] = 0
        left = drop.argsort(stable=True)[:length]
        for index, tokens in ((source, sources[b]), (place, places[b])):
            index[b, width - length :] = everything.scatter(0, goal, old[tokens])[left]
        columns.append((1 - drop).cumsum(0)[goal] - 1 + (width - length))
    return Move(source, place), Layout(width, tuple(lengths), tuple(columns), tuple(kept), device)


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Columns `index` [B, W'] of x [B or 1, W, ...] -> [B, W', ...]."""
    if len(index) == 1 and len(x) == 1:
        return x.index_select(1, index[0])
    rows = torch.arange(len(index), device=index.device)[:, None]
    return x.expand(len(index), *x.shape[1:])[rows, index]
