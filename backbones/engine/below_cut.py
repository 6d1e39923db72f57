"""What lies below a method's first cut, computed once per image for all questions about it.

Up to its first cut a method that acts inside the language model alone leaves every token where it is, and a
token sees none behind it. So in the layers ahead of the cut, the columns up to the image's last token hold
the same whatever is asked. `Below` is what those layers make of them; `Rest` is the remaining prefill of a
batch of questions: the columns behind are run through the layers ahead of the cut, then all columns enter the
layer of the cut together, as in one prefill of the whole prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from backbones.families.family import Adapter
from backbones.layout import Layout, gather, layout_of


@dataclass(frozen=True)
class Below:
    """m prompts up to their images' last tokens, W columns, left-padded.

    Attributes:
        layers: how many have run, K.
        layout: of the columns.
        ids: int64 [m, W].
        embeds: [m, W, D], input of the first layer.
        entry: [m, W, D], input of layer K.
        positions: int64 [m, W], or [3, m, W] of M-RoPE.
        cache: keys and values of the first K layers.
    """

    layers: int
    layout: Layout
    ids: Tensor
    embeds: Tensor
    entry: Tensor
    positions: Tensor
    cache: object


@dataclass(frozen=True)
class Rest:
    """What is left of a prefill of B whole prompts, n columns, left-padded; the last T of them are to be run
    from the first layer on.

    The T columns are as many as the longest text has; of a shorter one's prompt they begin with the image's
    last tokens, which are run once more, so that no padding stands between image and text.

    Attributes:
        layers: that the other columns have passed, K.
        layout: of all n columns.
        embeds: [B, n, D], input of the first layer.
        entry: [B, n - T, D], input of layer K in the columns ahead.
        positions: int64 [B, n], or [3, B, n] of M-RoPE.
        cache: keys and values of the first K layers in the columns ahead.
        following: int64 [B], position of the first decoded token.
    """

    layers: int
    layout: Layout
    embeds: Tensor
    entry: Tensor
    positions: Tensor
    cache: DynamicCache
    following: Tensor

    @property
    def ahead(self) -> int:
        """Columns that are known, n - T."""
        return self.entry.shape[1]

    @property
    def mask(self) -> Tensor | None:
        """bool [B, n], False at padding; None if there is none."""
        return self.layout.valid

    def joined(self, adapter: Adapter, hidden: Tensor, kwargs: dict) -> tuple[Tensor, dict]:
        """All columns' input of layer K [B, n, D], and that layer's keyword arguments with their rotary
        embeddings, given those of the last T columns."""
        hidden = torch.cat([self.entry, hidden], 1)
        rotary = adapter.language_model.rotary_emb(hidden, position_ids=self.positions)
        return hidden, {**kwargs, "position_embeddings": rotary}


def join(
    adapter: Adapter, below: Below, rows: Sequence[int], ids: Tensor, lengths: Tensor, following: Tensor
) -> Rest:
    """The whole prompts of B questions.

    Args:
        rows: B row numbers of `below`: which image each question is about.
        ids: int64 [B, T] of the texts behind the images, left-padded.
        lengths: int64 [B], tokens of each text.
        following: int64 [m], position of the first token behind each image.
    """
    device, longest, width = ids.device, ids.shape[1], below.layout.width
    chosen = torch.tensor(rows, device=device)
    known = below.layout.ends[chosen]
    n = int((known + lengths).max())
    to_end = n - torch.arange(n, device=device)  # 1 for the last column
    behind = to_end <= lengths[:, None]
    source = torch.where(behind, width + longest - to_end, width + lengths[:, None] - to_end).clamp(min=0)

    def laid_out(prefix: Tensor, text: Tensor) -> Tensor:
        return gather(torch.cat([prefix[chosen], text], 1), source)

    place = following[chosen][:, None] + torch.arange(longest, device=device) - (longest - lengths)[:, None]
    if below.positions.ndim == 3:
        positions = torch.stack([laid_out(axis, place) for axis in below.positions])
    else:
        positions = laid_out(below.positions, place)
    mask = to_end <= (known + lengths)[:, None]
    whole = laid_out(below.ids, ids)
    ahead = source[:, : n - longest]
    cache = DynamicCache(config=adapter.text_config)
    for i, layer in enumerate(below.cache.layers[: below.layers]):
        held = [gather(t[chosen].transpose(1, 2), ahead).transpose(1, 2) for t in (layer.keys, layer.values)]
        cache.update(*held, i)
    return Rest(
        layers=below.layers,
        layout=layout_of((whole == adapter.image_token_id) & mask, mask),
        embeds=laid_out(below.embeds, adapter.language_model.get_input_embeddings()(ids)),
        entry=gather(below.entry[chosen], ahead),
        positions=positions * mask,
        cache=cache,
        following=following[chosen] + lengths,
    )
