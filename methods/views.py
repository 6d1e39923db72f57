"""What a method sees and what it answers: signals of the vision tower, views of an image, a prompt and a
stage, and the selection. Tensors and plain facts only; `methods.base.Pruner` says when each is handed over.

Sizes: N visual tokens of an image (576 for LLaVA-1.5), d width of the vision tower, D width of the language
model, H attention heads, V visual tokens of a sample that are present at a stage, R query rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Positions = Literal["original", "renumbered"]


@dataclass(frozen=True)
class Signal:
    """Something inside the vision tower that a method reads, at one of its encoder layers.

    Kinds on a tower with CLS token (CLIP), which stands first:
        hidden: the layer's output, [1 + N, d].
        queries, keys, values: outputs of the layer's linear maps, [1 + N, d], heads side by side, bias
            included, not scaled.
        cls_query: the CLS row of `queries`, [1, d].

    Kinds on a tower without CLS token that merges several patches into a visual token (Qwen2.5-VL):
        hidden, queries, keys, values: [N, d], the mean over each token's patches; queries and keys rotated.
        received: float32 [N], the attention that a token gets: mean over heads and query rows, sum over its
            patches, so that the whole sums to 1.
        order: int64 [N], the tower's own order: which token of the raster stands at each of its places.

    Attributes:
        kind: one of the above.
        layer: 0-based; -1 is the last.
    """

    kind: Literal["hidden", "queries", "keys", "values", "cls_query", "received", "order"]
    layer: int


#: what methods that follow CLS read of a tower without one: the attention that tokens get in its last layer,
#: which sees the whole image
RECEIVED, RECEIVED_KEYS = Signal("received", -1), Signal("keys", -1)


def cls_attention(layer: int) -> tuple[Signal, Signal]:
    """The signals behind `ImageView.cls_attention(layer)`."""
    return Signal("cls_query", layer), Signal("keys", layer)


Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Hint:
    """What the answer key says of one question on an image; only methods with `Pruner.answer_key` see it.

    Attributes:
        evidence: boxes of what holds the answer: left, top, width, height, as shares of the image.
        things: boxes of all things in the image.
    """

    evidence: tuple[Box, ...]
    things: tuple[Box, ...]


def cells(boxes: Sequence[Box], rows: int, columns: int, least: float = 0.1) -> np.ndarray:
    """The cells of a grid that boxes cover. A box too small for any cell gets the one its centre lies in.

    Args:
        boxes: left, top, width, height as shares of the image.
        rows: of the grid.
        columns: of the grid.
        least: share of a cell that a box must cover.

    Returns:
        bool [rows, columns].
    """
    found = np.zeros((rows, columns), bool)
    x, y = np.arange(columns + 1) / columns, np.arange(rows + 1) / rows
    for left, top, width, height in boxes:
        across = np.clip(np.minimum(x[1:], left + width) - np.maximum(x[:-1], left), 0, None) * columns
        down = np.clip(np.minimum(y[1:], top + height) - np.maximum(y[:-1], top), 0, None) * rows
        own = down[:, None] * across[None] >= least
        if not own.any():
            row, column = int((top + height / 2) * rows), int((left + width / 2) * columns)
            own[min(row, rows - 1), min(column, columns - 1)] = True
        found |= own
    return found


@dataclass(frozen=True)
class ImageView:
    """One image, seen by the vision tower. Tensors are in the tower's dtype.

    Attributes:
        hidden: [1 + N, d], what the language model would get, CLS first, before the projector. Without
            `has_cls` [N, d]; where the tower itself merges patches and projects them, behind that, so that d
            = D.
        grid: rows and columns of visual tokens; their product is N.
        heads: heads of the tower's attention.
        pixels: as the image processor made them, [3, h, w] or one row per patch.
        project: the projector, [.., d] -> [.., D].
        signals: the tensor of each signal that the method declared.
        text: [T, D], word embeddings of the prompt's text in order, for methods with `reads_text`; else None.
        has_cls: whether the tower has a CLS token.
        text_after: [T', D], those of the text behind the sample's last image, for methods with
            `reads_question`; else None.
        question: what is asked, as text (or as ids of the method's own tokenizer), for methods with
            `reads_question`; None for others, or if nobody told.
        final_norm: the norm behind the tower's last layer, [.., d] -> [.., d], where the features do not pass
            it (CLIP's post_layernorm); else None.
        hint: the answer key, for methods with `answer_key`; else None.
    """

    hidden: Tensor
    grid: tuple[int, int]
    heads: int
    pixels: Tensor
    project: Callable[[Tensor], Tensor]
    signals: dict[Signal, Tensor]
    text: Tensor | None = None
    has_cls: bool = True
    text_after: Tensor | None = None
    question: str | Sequence[int] | None = None
    final_norm: Callable[[Tensor], Tensor] | None = None
    hint: Hint | None = None

    @property
    def features(self) -> Tensor:
        """The features of the N visual tokens [N, d], raster order."""
        return self.hidden[1:] if self.has_cls else self.hidden

    def __getitem__(self, signal: Signal) -> Tensor:
        """A signal that the method declared in `signals`."""
        return self.signals[signal]

    def cls_attention(self, layer: int) -> Tensor:
        """Attention of the CLS query over all tokens at an encoder layer, float32 [H, 1 + N], rows sum to 1.

        Equal to row 0 of the layer's attention maps, from one query row instead of the (1 + N)^2 map.
        """
        query, keys = self[Signal("cls_query", layer)], self[Signal("keys", layer)]
        query, keys = (x.unflatten(-1, (self.heads, -1)) for x in (query, keys))
        logits = torch.einsum("qhd,khd->hk", query, keys) * query.shape[-1] ** -0.5
        return logits.softmax(-1, dtype=torch.float32)


@dataclass(frozen=True)
class Selection:
    """What is left of one image (before the language model) or of one sample (at one of its layers).

    Attributes:
        kept: int64 [n], indices among the visual tokens that were offered, in the order in which the language
            model shall read them. With `tokens` given, negative entries may name tokens the method made
            itself (CLS, clusters, padding; the method's docstring says which); they only show up in
            `Trace.kept`.
        tokens: [n, d] (or [n, D] at a layer), new values of all n tokens; None: the offered ones, unchanged.
        projected: `tokens` are in the language model's space already, [n, D]; the projector is not applied.
        places: int64 [n], the offered token whose rotary position each takes where positions are kept; None:
            its own, for a made token that of the n-th offered one.
        merged: int64 [V], for each token that was offered and is not in `kept`: which of the n (its place in
            `kept`) took it in, or most of it; -1 for those that nothing took in, and for those in `kept`.
            None: a method that merges nothing. Changes no answer: it says what stands in `tokens`.
    """

    kept: Tensor
    tokens: Tensor | None = None
    projected: bool = False
    places: Tensor | None = None
    merged: Tensor | None = None


@dataclass(frozen=True)
class PromptView:
    """One sample as it enters the language model.

    Attributes:
        visual: [V, D], its visual tokens.
        text_after: [T, D], embeddings of the text behind the (first) image.
    """

    visual: Tensor
    text_after: Tensor


@dataclass(frozen=True)
class StageView:
    """One sample's visual tokens at a stage inside the language model.

    Attributes:
        attention: float32 [H, R, V], the rows the stage asked for, restricted to the visual tokens (each full
            row sums to 1 over the whole sequence); None if it asked for none.
        kept: int64 [V], which token of the image each is (see `Selection.kept`).
        total: visual tokens of the sample at the language model's input.
        images: number of images among them.
        count: the stage's `count`, summed over these images; None if the stage has none.
        sizes: visual tokens of each of these images at the language model's input, in order.
        length: S, tokens of the sample in the sequence as it is at this layer, text included and padding not.
        keys: [S, H_kv d_head], the rotated keys that layer - 1 made of these tokens, heads side by side, for
            a stage with `keys`; else None.
        final_norm: the language model's norm before its head, [.., D] -> [.., D].
    """

    attention: Tensor | None
    kept: Tensor
    total: int
    images: int
    _hidden: Tensor
    _columns: Tensor
    count: int | None = None
    sizes: tuple[int, ...] = ()
    length: int = 0
    keys: Tensor | None = None
    final_norm: Callable[[Tensor], Tensor] | None = None

    @property
    def hidden(self) -> Tensor:
        """Hidden states of the visual tokens on entry of the layer, [V, D]."""
        return self._hidden[self._columns]

    @property
    def sequence(self) -> Tensor:
        """Hidden states of all tokens on entry of the layer, visual and text, padding left off, [S, D]."""
        return self._hidden[len(self._hidden) - self.length :]

    @property
    def places(self) -> Tensor:
        """Where in `sequence` and `keys` the visual tokens stand, ascending int64 [V]. Before any cut these
        are the tokens' absolute positions in the prompt without padding."""
        return self._columns - (len(self._hidden) - self.length)


@dataclass(frozen=True)
class Stage:
    """A cut on entry of one decoder layer.

    Attributes:
        layer: 0-based, 1 to L - 1; layers 0..layer-1 have run when `select` is called.
        select: names the survivors of one sample.
        attention: whose attention rows `StageView.attention` holds: `previous` those of layer - 1 as it
            computed them, `own` those that `layer` would compute if nothing were cut, None if the method
            reads none.
        rows: chooses the query rows once per sample at the language model's input, as offsets from the
            sequence's end: int64 [R], -1 is the last token. None: the last token.
        positions: whether survivors keep their rotary positions or all tokens are numbered 0, 1, 2, ... anew
            (M-RoPE, whose positions are places in the image, is always kept).
        count: visual tokens of one image that the cut is meant to leave, for methods that know it ahead.
        keys: `StageView.keys` is wanted.
    """

    layer: int
    select: Callable[[StageView], Selection]
    attention: Literal["previous", "own"] | None = "previous"
    rows: Callable[[PromptView], Tensor] | None = None
    positions: Positions = "original"
    count: int | None = None
    keys: bool = False
