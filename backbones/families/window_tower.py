"""Reading the vision tower of Qwen2-VL and Qwen2.5-VL: what one block computed, in which order, and patches
of an image at another size.

Inside the tower the patches of an image stand in its own order (Qwen2.5-VL's: window by window), the four of
a visual token one after the other. Taps are forward hooks; the tower keeps its fused attention.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.attention_rows import rotate
from backbones.families.family import Grid
from methods.base import Signal
from methods.errors import UserError

#: query rows at a time whose attention is summed up: no map of all patches by all patches is ever made
QUERY_ROWS = 128


@contextlib.contextmanager
def tapped(blocks: nn.ModuleList, signals: Iterable[Signal], title: str) -> Iterator[dict[int, Tap]]:
    """Collects, by layer, what `signals` need of the tower's forward pass made inside of the `with`.

    title: of the family.

    Raises ValueError for a layer there is not, UserError for a signal of a CLS token.
    """
    taps: dict[int, Tap] = {}
    handles = []
    try:
        for signal in signals:
            if signal.kind == "cls_query":
                raise UserError(f"the method reads the CLS token of the vision tower; {title}'s has none")
            if not -len(blocks) <= signal.layer < len(blocks):
                raise ValueError(f"the vision tower has {len(blocks)} layers, none numbered {signal.layer}")
            if signal.layer not in taps:
                block = blocks[signal.layer]
                tap = taps[signal.layer] = Tap(block.attn.num_heads, block.attn.scaling)
                handles.append(block.register_forward_hook(tap.keep_output))
                handles.append(block.attn.register_forward_pre_hook(tap.keep_arguments, with_kwargs=True))
                handles.append(block.attn.qkv.register_forward_hook(tap.keep_projections))
        yield taps
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Tap:
    """What one block of the tower computed, S patches of all images, in the tower's order.

    output: the block's [S, d]. projections: queries, keys and values side by side [S, 3 d]. rotary: (cos,
    sin), each [S, d_head]. ends: the ends of the runs of patches that see each other, int [runs + 1], from 0.
    """

    heads: int
    scaling: float
    output: Tensor | None = None
    projections: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    ends: Tensor | None = None

    def keep_output(self, module, args, output) -> None:
        self.output = output

    def keep_projections(self, module, args, output) -> None:
        self.projections = output

    def keep_arguments(self, module, args, kwargs) -> None:
        self.rotary, self.ends = kwargs["position_embeddings"], kwargs["cu_seqlens"]

    def read(self, kind: str, tokens: slice, patches: int) -> Tensor:
        """A signal of one image's visual tokens, in the tower's order: [N, d], or [N] for `received`.

        tokens: its places among those of all images. patches: of a token.
        """
        rows = slice(tokens.start * patches, tokens.stop * patches)
        if kind == "received":
            return self._received(rows).unflatten(0, (-1, patches)).sum(1)
        values = self.output[rows] if kind == "hidden" else self._part(kind, rows).transpose(0, 1).flatten(1)
        return values.unflatten(0, (-1, patches)).mean(1)

    def _part(self, kind: str, rows: slice) -> Tensor:
        """`queries` or `keys`, rotated as the block does, or `values`: [H, S, d_head]."""
        part = ("queries", "keys", "values").index(kind)
        x = self.projections[rows].unflatten(-1, (3, self.heads, -1))[:, part].transpose(0, 1)
        if kind == "values":
            return x
        return rotate(x[None].float(), tuple(t[None, rows].float() for t in self.rotary))[0].to(x.dtype)

    def _received(self, rows: slice) -> Tensor:
        """Attention that each patch gets: mean over heads and query rows, float32 [S], sum 1."""
        ends = [end - rows.start for end in self.ends.tolist() if rows.start <= end <= rows.stop]
        runs = [end - start for start, end in pairwise(ends)]
        queries, keys = (self._part(kind, rows).split(runs, dim=1) for kind in ("queries", "keys"))
        sums = [self._column_sums(q, k) for q, k in zip(queries, keys)]
        return torch.cat(sums) / (self.heads * ends[-1])

    def _column_sums(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Sum over heads and rows of softmax(q k^T * scale); both [H, s, d_head] -> float32 [s]."""
        total = torch.zeros(keys.shape[1], device=keys.device)
        for few in queries.split(QUERY_ROWS, dim=1):
            total += (few @ keys.mT * self.scaling).softmax(-1, dtype=torch.float32).sum((0, 1))
        return total


def window_order(shapes: Tensor, vision) -> Tensor:
    """Which token, all images' one after the other in raster order, stands at each place of a tower with
    windows: int64 [N]. shapes: int64 [images, 3], frames, rows and columns of patches. vision: the tower's
    configuration."""
    from transformers.vision_utils import get_vision_window_index

    index, _ = get_vision_window_index(
        shapes,
        spatial_merge_size=vision.spatial_merge_size,
        window_size=vision.window_size,
        patch_size=vision.patch_size,
    )
    return index


def resized(patches: Tensor, grid: Grid, wanted: Grid, vision) -> Tensor:
    """One image's pixels, a row per patch [4 N, p], as if of the image at another size (bicubic).

    grid, wanted: rows and columns of visual tokens. vision: the tower's configuration.
    """
    if grid == wanted:
        return patches
    merge, size = vision.spatial_merge_size, vision.patch_size
    inside = (merge, merge, vision.in_channels, vision.temporal_patch_size, size, size)
    # rows, columns, down, right, channel, frame, y, x -> frame, channel, (rows, down, y), (columns, right, x)
    frames = patches.view(*grid, *inside).permute(5, 4, 0, 2, 6, 1, 3, 7).flatten(5).flatten(2, 4)
    sides = [n * merge * size for n in wanted]
    small = F.interpolate(frames.float(), sides, mode="bicubic", antialias=True).to(patches.dtype)
    small = small.unflatten(3, (wanted[1], merge, size)).unflatten(2, (wanted[0], merge, size))
    return small.permute(2, 5, 3, 6, 1, 0, 4, 7).reshape(-1, patches.shape[1])
