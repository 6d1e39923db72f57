"""Qwen2.5-VL's vision tower on images of one size at once: what Hugging Face's forward computes, but dense.

The tower itself takes all images as one long sequence and calls attention once per window. Here windows of
one length stand one after the other, so that a batch's windows are a single call; every weight is used
through the tower's own modules. The two frames of an image are equal, so the patches' convolution is one
product.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from harness.pocket.recipe.sizes import MERGE, PATCH
from harness.pocket.recipe.sizes import QWEN_VISION as VISION

_FOUR = MERGE**2


@dataclass(frozen=True)
class Order:
    """Where the patches of an image stand inside of the tower.

    order: of visual tokens, int64 [N]: which one stands at each place. back: the inverse. patches,
    patches_back: the same for patches, [4 N]. windows: (number, patches each) of each run of windows of one
    length. positions: row and column of each patch in that order, int64 [4 N, 2].
    """

    order: Tensor
    back: Tensor
    patches: Tensor
    patches_back: Tensor
    windows: tuple[tuple[int, int], ...]
    positions: Tensor


@lru_cache(maxsize=256)
def order_of(grid: tuple[int, int]) -> Order:
    """Of an image of rows x columns visual tokens."""
    shape = torch.tensor([[1, grid[0] * MERGE, grid[1] * MERGE]])
    index, ends = get_vision_window_index(shape, MERGE, VISION["window_size"], PATCH)
    windows = index.split((ends.diff() // _FOUR).tolist())
    windows = sorted(windows, key=len)
    lengths = [len(w) for w in windows]
    order = torch.cat(windows)
    patches = (order[:, None] * _FOUR + torch.arange(_FOUR)).flatten()
    return Order(
        order,
        order.argsort(),
        patches,
        patches.argsort(),
        tuple((lengths.count(n), n * _FOUR) for n in sorted(set(lengths))),
        get_vision_position_ids(shape, MERGE)[patches],
    )


def _rms_norm(norm, x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def _attention(block, x: Tensor, cos: Tensor, sin: Tensor, windows: tuple[tuple[int, int], ...]) -> Tensor:
    """x [B, S, d] -> [B, S, d]; patches see those of their window only."""
    attention, (batch, _, width) = block.attn, x.shape
    q, k, v = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).unbind(2)
    q, k = _turned(q, cos, sin), _turned(k, cos, sin)
    seen, at = [], 0
    for number, length in windows:
        span = slice(at, at + number * length)
        parts = [t[:, span].reshape(batch * number, length, *t.shape[2:]).transpose(1, 2) for t in (q, k, v)]
        out = F.scaled_dot_product_attention(*parts, scale=attention.scaling)
        seen.append(out.transpose(1, 2).reshape(batch, number * length, width))
        at = span.stop
    return attention.proj(seen[0] if len(seen) == 1 else torch.cat(seen, 1))


def run(
    tower: Qwen2_5_VisionTransformerPretrainedModel, patches: Tensor, grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """What the last block makes of every patch [B, 4 N, d], the four of a visual token one after the other,
    and the merger's output [B, N, out]; visual tokens row by row.

    Args:
        patches: float [B, 4 N, 588], one frame of the image processor's `pixel_values` (`one_frame`).
        grid: rows and columns of visual tokens, N in all.
    """
    at = order_of(grid)
    weight = tower.patch_embed.proj.weight.sum(2).flatten(1)
    x = patches[:, at.patches] @ weight.T
    cos, sin = (t[:, None] for t in tower.rotary_pos_emb(x, at.positions))
    everything = ((1, x.shape[1]),)
    for i, block in enumerate(tower.blocks):
        windows = everything if i in tower.fullatt_block_indexes else at.windows
        x = x + _attention(block, _rms_norm(block.norm1, x), cos, sin, windows)
        x = x + block.mlp(_rms_norm(block.norm2, x))
    merger = tower.merger
    merged = merger.mlp(_rms_norm(merger.ln_q, x).unflatten(1, (-1, _FOUR)).flatten(2))
    return x[:, at.patches_back], merged[:, at.back]


def one_frame(pixel_values: Tensor) -> Tensor:
    """The image processor's rows [S, 1176], in which an image is two equal frames -> [S, 588]."""
    frames = VISION["temporal_patch_size"]
    return pixel_values.unflatten(1, (3, frames, PATCH**2))[:, :, 0].flatten(1)
