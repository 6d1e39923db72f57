"""Which question a row of token ids asks, as text, for methods that read it with a tokenizer of their own.

Token ids are what reaches the engine; the question that they were made of does not follow from them (the
chat template is in them too). `Backbone.inputs` notes it here, so that who uses it has nothing to pass on.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

#: rows remembered per model, the latest ones
MOST = 4096

_noted: weakref.WeakKeyDictionary[nn.Module, OrderedDict[tuple[int, ...], str]] = weakref.WeakKeyDictionary()


def note(model: nn.Module, ids: Tensor, mask: Tensor, questions: Sequence[str]) -> None:
    """Remember the question of each row. ids, mask: [B, n], on the host."""
    known = _noted.setdefault(model, OrderedDict())
    for row, question in zip(_rows(ids, mask), questions):
        known[row] = question
        known.move_to_end(row)
    while len(known) > MOST:
        known.popitem(last=False)


def of(model: nn.Module, ids: Tensor, mask: Tensor | None) -> list[str | None]:
    """The question of each row, None for ids that `note` has not seen. One transfer to the host."""
    known = _noted.get(model, {})
    return [known.get(row) for row in _rows(ids, mask)]


def _rows(ids: Tensor, mask: Tensor | None) -> list[tuple[int, ...]]:
    rows = ids.tolist()
    if mask is None:
        return [tuple(row) for row in rows]
    return [tuple(i for i, valid in zip(*pair) if valid) for pair in zip(rows, mask.tolist())]
