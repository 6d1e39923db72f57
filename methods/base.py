"""What a pruning method is: settings, where it acts and what it reads, and a pure function over tensors that
names the visual tokens to keep.

A method never touches the model. The engine (`backbones.engine.hooks`) gives it what it asked for, one image
or one sample at a time, and applies the answer. Sizes in the docstrings: N visual tokens of an image (576 for
LLaVA-1.5), d width of the vision tower, D width of the language model, H attention heads, V visual tokens
present at a stage.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Literal, get_type_hints

import torch
from torch import Tensor

from methods.errors import UserError
from methods.settings import problem_with

Positions = Literal["original", "renumbered"]


@dataclass(frozen=True)
class Signal:
    """Something inside the vision tower that a method reads, at an encoder layer (-1 is the last).

    kind: `hidden` the layer's output, `queries` / `keys` / `values` the outputs of its linear maps (all [1 +
    N, d], CLS first, heads side by side, bias included, not scaled), or `cls_query` the CLS row of `queries`
    [1, d].

    A tower without CLS token that merges several patches into a visual token gives [N, d], the mean over each
    token's patches, queries and keys rotated; no `cls_query`; instead `received`, float32 [N], the attention
    that a token gets: mean over heads and query rows, sum over its patches, so that the whole sums to 1; and
    `order`, int64 [N], the tower's own order: which token of the raster stands at each of its places.
    """

    kind: Literal["hidden", "queries", "keys", "values", "cls_query", "received", "order"]
    layer: int


#: what methods that follow CLS read of a tower without one (Qwen2.5-VL): the attention that tokens get in its
#: last layer, which sees the whole image
RECEIVED, RECEIVED_KEYS = Signal("received", -1), Signal("keys", -1)


def cls_attention(layer: int) -> tuple[Signal, Signal]:
    """The signals behind `ImageView.cls_attention(layer)`."""
    return Signal("cls_query", layer), Signal("keys", layer)


@dataclass(frozen=True)
class ImageView:
    """One image, seen by the vision tower. Tensors are in the tower's dtype.

    hidden: [1 + N, d] what the language model would get, CLS first, before the projector; without `has_cls`
    [N, d], no CLS, and where the tower itself merges patches and projects them (Qwen2.5-VL), behind that, d =
    D. grid: rows and columns of visual tokens (their product is N). heads: of the tower's attention. pixels:
    as the processor made them, [3, h, w] or one row a patch. project: [.., d] -> [.., D]. text: [T, D] word
    embeddings of the prompt's text, in order, for methods with `reads_text`; None for others.
    """

    hidden: Tensor
    grid: tuple[int, int]
    heads: int
    pixels: Tensor
    project: Callable[[Tensor], Tensor]
    signals: dict[Signal, Tensor]
    text: Tensor | None = None
    has_cls: bool = True

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
    """What is left of one image (before the language model) or one sample (at one of its layers).

    kept: int64 [n], in the order in which the language model shall read them: indices among the visual tokens
    that were offered. With `tokens` given, negative entries may name tokens the method made itself (CLS,
    clusters, padding; the method's docstring says which); they only show up in `Trace.kept`. tokens: [n, d]
    (or [n, D] at a layer) new values of all n tokens; None: the offered tokens `kept`, unchanged. projected:
    `tokens` are in the language model's space already, [n, D]; the projector is not applied to them. places:
    int64 [n], the offered token whose rotary position each takes where positions are kept; None: its own, for
    a made token that of the n-th offered one.
    """

    kept: Tensor
    tokens: Tensor | None = None
    projected: bool = False
    places: Tensor | None = None


@dataclass(frozen=True)
class PromptView:
    """One sample as it enters the language model: visual [V, D] and the text after the image [T, D]."""

    visual: Tensor
    text_after: Tensor


@dataclass(frozen=True)
class StageView:
    """One sample's visual tokens at a stage inside the language model.

    attention: float32 [H, R, V], the rows the stage asked for, restricted to the V visual tokens (each full
    row sums to 1 over the whole sequence). kept: int64 [V], which token of the image each is (see
    `Selection.kept`). total: visual tokens of the sample at the language model's input. images: number of
    images among them. count: the stage's `count`, summed over these images.
    """

    attention: Tensor | None
    kept: Tensor
    total: int
    images: int
    _hidden: Tensor
    _columns: Tensor
    count: int | None = None

    @property
    def hidden(self) -> Tensor:
        """Hidden states of the visual tokens on entry of the layer, [V, D]."""
        return self._hidden[self._columns]


@dataclass(frozen=True)
class Stage:
    """A cut on entry of one decoder layer.

    layer: 0-based, 1 to L - 1; layers 0..layer-1 have run when `select` is called.
    attention: whose attention rows `StageView.attention` holds: `previous` those of layer - 1 as it computed
    them, `own` those that `layer` would compute if nothing were cut, None if the method reads none. rows:
    query rows as offsets from the sequence's end (int64 [R], -1 is the last token), chosen once a sample at
    the language model's input; None: the last token. positions: whether survivors keep their rotary positions
    or all tokens are numbered 0, 1, 2, ... anew (M-RoPE, whose positions are places in the image, is always
    kept). count: visual tokens of one image that the cut is meant to leave, for methods that know it ahead.
    """

    layer: int
    select: Callable[[StageView], Selection]
    attention: Literal["previous", "own"] | None = "previous"
    rows: Callable[[PromptView], Tensor] | None = None
    positions: Positions = "original"
    count: int | None = None


@dataclass
class Pruner:
    """Base class. A method is a dataclass whose fields are its settings, with docstring, `name`, and `select`
    (acts before the language model) and / or `stages` (acts inside it).

    budget: visual tokens to keep of an image, at most all it has; a float below 1 is a fraction of them; None
    prunes nothing.
    Use on any supported model: `with FastV(budget=64)(model) as trace: model.generate(**inputs)`.
    Raises UserError for settings of a wrong type.
    """

    budget: int | float | None = None

    name: ClassVar[str] = ""
    #: what `select` reads of the vision tower, beside the features
    signals: ClassVar[tuple[Signal, ...]] = ()
    #: what it reads instead of a tower without CLS token; None: the same
    signals_without_cls: ClassVar[tuple[Signal, ...] | None] = None
    #: rotary positions of the tokens that `select` leaves (M-RoPE's are always the original ones)
    positions: ClassVar[Positions] = "renumbered"
    #: `select` gets the prompt's word embeddings (and runs when the prompt is known, just before the LLM)
    reads_text: ClassVar[bool] = False

    def __post_init__(self):
        hints = _hints(type(self))
        for f in fields(self):
            problem = problem_with(getattr(self, f.name), hints[f.name])
            if problem:
                raise UserError(f"{self.name}: parameter {f.name} {problem}")

    # ---- what a method says

    def select(self, image: ImageView) -> Selection:
        """Survivors of one image, before the language model. The count may differ between images."""
        raise NotImplementedError

    def text_before(self, has_cls: bool) -> int:
        """How many text tokens right before an image are offered to `select` as well, as the first ones of
        `image.features` [.., D]. has_cls: of the vision tower."""
        return 0

    def select_all(self, images: Sequence[ImageView]) -> list[Selection]:
        """Survivors of all images of a batch; override where looking at them together is faster."""
        return [self.select(image) for image in images]

    def stages(self, visual_tokens: int, layers: int) -> Sequence[Stage]:
        """Cuts inside a language model of that many layers, for images of that many visual tokens; they lie
        before the same layers whatever the image."""
        return ()

    def image_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of visual tokens that the vision tower shall see, given those it would see."""
        return grid

    def resources(self, model: torch.nn.Module) -> dict[str, object]:
        """What the method's answers on `model` depend on beside its settings, such as a checkpoint's digest;
        JSON-able, enters the key of its results. Raises UserError, naming the fix, if something is missing:
        the method then cannot be used on this model (a run of all methods leaves it out)."""
        return {}

    def prepare(self, model: torch.nn.Module) -> None:
        """Called when the pruner is put on a model, for methods that have weights to move to its device."""

    # ---- what follows from it

    @property
    def acts(self) -> bool:
        """False: a no-op that only traces."""
        return self.budget is not None

    @property
    def note(self) -> str:
        """What a table must say about these settings in a footnote; empty for most methods."""
        return ""

    @property
    def selects(self) -> bool:
        """Whether the method acts before the language model."""
        own = type(self)
        return self.acts and (own.select is not Pruner.select or own.select_all is not Pruner.select_all)

    def reads(self, has_cls: bool) -> tuple[Signal, ...]:
        """The signals that `select` reads of a tower with or without CLS token."""
        if not self.selects:
            return ()
        return self.signals if has_cls or self.signals_without_cls is None else self.signals_without_cls

    def count(self, visual_tokens: int) -> int:
        """The budget as a number of an image's `visual_tokens`; of a smaller image than was reckoned with, at
        least 1 and at most all."""
        return min(max(self._rounded(visual_tokens), 1), visual_tokens)

    def check_budget(self, visual_tokens: int) -> None:
        """Raises UserError unless the budget is 1 to all of an image's `visual_tokens`."""
        if isinstance(self.budget, float) and not 0 < self.budget < 1:
            raise UserError(f"{self.name}: budget {self.budget} is a fraction and must lie between 0 and 1")
        if not 1 <= self._rounded(visual_tokens) <= visual_tokens:
            raise UserError(
                f"{self.name}: budget {self.budget} must leave 1 to {visual_tokens} visual tokens of an image"
            )

    def _rounded(self, visual_tokens: int) -> int:
        if self.budget is None:
            return visual_tokens
        return round(self.budget * visual_tokens) if isinstance(self.budget, float) else self.budget

    def validate(self, visual_tokens: int, layers: int) -> None:
        """Raises UserError unless the settings suit a model of so many visual tokens an image and layers.

        Where images differ this is asked once, for the largest there can be; `select` and `stages` then do
        what comes nearest for small ones.
        """
        if not self.acts:
            return
        self.check_budget(visual_tokens)
        cuts = [stage.layer for stage in self.stages(visual_tokens, layers)]
        if cuts != sorted(set(cuts)) or any(not 1 <= layer < layers for layer in cuts):
            raise UserError(f"{self.name}: cuts before layers {cuts} do not suit a model of {layers} layers")

    def parameters(self) -> dict[str, object]:
        """All settings but the budget, JSON-able."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "budget"}

    def __call__(self, model: torch.nn.Module):
        """Context manager that puts the method on `model` (its Hugging Face class unchanged); gives a Trace.

        Raises UserError if the model's family is not supported or the settings do not suit it.
        """
        from backbones.engine.hooks import Engine

        return Engine(model, self)


@functools.cache
def _hints(cls: type) -> dict[str, object]:
    return get_type_hints(cls)
