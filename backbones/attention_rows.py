"""A few rows of a decoder layer's attention, without its n x n map."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def attention_rows(
    layer: nn.Module,
    hidden: Tensor,
    rotary: tuple[Tensor, Tensor],
    keys: Tensor,
    columns: Tensor,
    valid: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T * scale) for a few query rows: float32 [B, H, R, W].

    Equal to the same rows of eager attention (softmax in float32, not cast back). Cost: R (D^2 + W D) MAC.

    layer: Llama-like decoder layer. hidden: the layer's input at the query rows [B, R, D]. rotary: (cos, sin)
    at the query rows, each [B or 1, R, d_head]. keys: the layer's rotated keys [B, H_kv, W, d_head]. columns:
    where the query rows stand, int64 [R]; they see no later column. valid: bool [B, W], False at padding.
    """
    attention = layer.self_attn
    query = rotate(_heads(attention.q_proj(layer.input_layernorm(hidden)), attention.head_dim), rotary)
    grouped = query.unflatten(1, (keys.shape[1], -1))  # query heads of one key head side by side
    logits = (grouped @ keys[:, :, None].transpose(-1, -2)) * attention.scaling
    logits = logits.flatten(1, 2)
    visible = torch.arange(keys.shape[2], device=keys.device) <= columns[:, None]
    if valid is not None:
        visible = visible & valid[:, None, None, :]
    return logits.masked_fill(~visible, torch.finfo(logits.dtype).min).softmax(-1, dtype=torch.float32)


def layer_keys(layer: nn.Module, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """The rotated keys that a layer would compute from its input [B, W, D]: [B, H_kv, W, d_head].

    Cost: B W D H_kv d_head MAC.
    """
    attention = layer.self_attn
    return rotate(_heads(attention.k_proj(layer.input_layernorm(hidden)), attention.head_dim), rotary)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of x [B, heads, n, d_head] in the half-split layout of Llama and Qwen."""
    cos, sin = (t[:, None] for t in rotary)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _heads(x: Tensor, head_dim: int) -> Tensor:
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)
