"""What a pruning method is: settings, where it acts and what it reads, and a pure function over tensors that
names the visual tokens to keep.

A method never touches the model. The engine (`backbones.engine.hooks`) gives it what it asked for, one image
or one sample at a time, and applies the answer. What it is given and what it answers is in `methods.views`,
whose names may be imported from here too.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, get_type_hints

import torch

from methods.errors import UserError
from methods.settings import problem_with
from methods.views import (
    RECEIVED,
    RECEIVED_KEYS,
    Hint,
    ImageView,
    Positions,
    PromptView,
    Selection,
    Signal,
    Stage,
    StageView,
    cls_attention,
)

__all__ = [
    "RECEIVED",
    "RECEIVED_KEYS",
    "ImageView",
    "Positions",
    "PromptView",
    "Pruner",
    "Selection",
    "Signal",
    "Stage",
    "StageView",
    "cls_attention",
]


@dataclass
class Pruner:
    """Base class. A method is a dataclass whose fields are its settings, with docstring, `name`, and `select`
    (acts before the language model) and / or `stages` (acts inside it).

    Use on any supported model: `with FastV(budget=64)(model) as trace: model.generate(**inputs)`.

    Attributes:
        budget: visual tokens to keep per image, at most all it has; a float below 1 is a fraction of them;
            None prunes nothing.

    Raises:
        UserError: for settings of a wrong type, and for a budget where the class overrides nothing.
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
    #: `select` gets the question as text, see `__call__`, and the word embeddings behind the image; it runs
    #: when the prompt is known
    reads_question: ClassVar[bool] = False
    #: a control that knows the answer key: `select` gets `ImageView.hint`, if whoever puts the pruner on has
    #: set `hints`. Never among `registry.available()`: a run has to ask for it, or have data with evidence.
    answer_key: ClassVar[bool] = False
    #: of the samples of the next batch, in order; only methods with `answer_key` are ever handed them
    hints: ClassVar[Sequence[Hint] | None] = None
    #: the method may leave more tokens than its budget in the last layer, as its docstring says (it chooses
    #: the number itself, or a setting does); a property where that depends on the settings
    may_exceed_budget = False

    def __post_init__(self):
        hints = _hints(type(self))
        for f in fields(self):
            problem = problem_with(getattr(self, f.name), hints[f.name])
            if problem:
                raise UserError(f"{self.name}: parameter {f.name} {problem}")
        if self.acts and not self.selects and type(self).stages is Pruner.stages:
            raise UserError(
                f"{self.name}: a budget prunes nothing, since {type(self).__name__} overrides none of "
                "select, select_all and stages; is a name misspelt?"
            )

    # ---- what a method says

    def select(self, image: ImageView) -> Selection:
        """Survivors of one image, before the language model. The count may differ between images.

        Args:
            image: features [N, D] (width of the tower) and whatever `signals` and the other class variables
                ask for.

        Returns:
            Selection: `kept` int64 [K]; with merged or new `tokens` [K, D] where the method makes any.
        """
        raise NotImplementedError

    def text_before(self, has_cls: bool) -> int:
        """How many text tokens right before an image are offered to `select` as well, as the first ones of
        `image.features` [.., D].

        Args:
            has_cls: whether the vision tower has a CLS token.
        """
        return 0

    def select_all(self, images: Sequence[ImageView]) -> list[Selection]:
        """Survivors of all images of a batch; override where looking at them together is faster."""
        return [self.select(image) for image in images]

    def stages(self, visual_tokens: int, layers: int) -> Sequence[Stage]:
        """Cuts inside the language model; they lie before the same layers whatever the image.

        Args:
            visual_tokens: per image.
            layers: of the language model.
        """
        return ()

    def image_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        """How large an image the vision tower shall see.

        Args:
            grid: rows and columns of visual tokens that it would see.

        Returns:
            Rows and columns that it shall see.
        """
        return grid

    def resources(self, model: torch.nn.Module) -> dict[str, object]:
        """What the method's answers on `model` depend on beside its settings, such as a checkpoint's digest;
        JSON-able, enters the key of its results.

        Raises:
            UserError: naming the fix, if something is missing: the method then cannot be used on this model,
                and a run of all methods leaves it out.
        """
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

    @property
    def independent_of_text(self) -> bool:
        """Whether what the language model holds of an image is the same whatever is asked about it: the
        method does not act, or acts before the language model alone and reads no text."""
        cuts = type(self).stages is not Pruner.stages
        told = self.reads_text or self.reads_question or self.answer_key
        return not self.acts or not (cuts or told)

    @property
    def cuts_only(self) -> bool:
        """Whether the method acts inside the language model alone: below its first cut, what the language
        model holds of an image is then the same whatever is asked about it."""
        own = type(self)
        cuts = own.stages is not Pruner.stages and own.image_grid is Pruner.image_grid
        return self.acts and cuts and not self.selects

    def reads(self, has_cls: bool) -> tuple[Signal, ...]:
        """The signals that `select` reads of a tower with or without CLS token."""
        if not self.selects:
            return ()
        return self.signals if has_cls or self.signals_without_cls is None else self.signals_without_cls

    def count(self, visual_tokens: int) -> int:
        """The budget as a number of tokens; of a smaller image than was reckoned with, at least 1 and at most
        all.

        Args:
            visual_tokens: of the image.
        """
        return min(max(self._rounded(visual_tokens), 1), visual_tokens)

    def check_budget(self, visual_tokens: int) -> None:
        """Raises UserError unless the budget is 1 to all of an image's `visual_tokens`."""
        # a run asks the unpruned model about budgets that no method can have: its name would mislead
        who = "" if self.name == "vanilla" else f"{self.name}: "
        if isinstance(self.budget, float) and not 0 < self.budget < 1:
            raise UserError(f"{who}budget {self.budget} is a fraction and must lie between 0 and 1")
        if not 1 <= self._rounded(visual_tokens) <= visual_tokens:
            raise UserError(
                f"{who}budget {self.budget} must leave 1 to {visual_tokens} visual tokens, all that an image "
                "has"
            )

    def _rounded(self, visual_tokens: int) -> int:
        if self.budget is None:
            return visual_tokens
        return round(self.budget * visual_tokens) if isinstance(self.budget, float) else self.budget

    def validate(self, visual_tokens: int, layers: int) -> None:
        """Whether the settings suit a model. Where images differ this is asked once, for the largest there
        can be; `select` and `stages` then do what comes nearest for small ones.

        Args:
            visual_tokens: per image.
            layers: of the language model.

        Raises:
            UserError: if they do not.
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

    def __call__(self, model: torch.nn.Module, questions: Sequence[str | Sequence[int]] | None = None):
        """Context manager that puts the method on a model (its Hugging Face class unchanged); gives a Trace.

        Args:
            model: of a registered family; wrappers of PEFT, torch.compile and DistributedDataParallel are
                looked through.
            questions: what each sample of the batch asks, for methods with `reads_question`; inputs made by
                `Backbone.inputs` need none.

        Raises:
            UserError: if the model's family is not supported or the settings do not suit it.
        """
        from backbones.engine.hooks import Engine

        return Engine(model, self, questions)


@functools.cache
def _hints(cls: type) -> dict[str, object]:
    return get_type_hints(cls)
