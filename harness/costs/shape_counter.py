"""FLOPs of a method's prefill at a backbone's true shape: its plan (`harness.costs.plan`), part by part."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from backbones.shapes import Shape
from harness.costs import plan
from harness.costs.closed_form import closed_form_head, closed_form_layer
from harness.costs.plan import Plan
from methods import registry
from methods.errors import UserError

Budget = int | float
#: text tokens at which the paper's vanilla row follows: 35 of the template, about 27 of a question
TEXT_TOKENS = 62


@dataclass(frozen=True)
class PrefillMacs:
    """MAC of one prefill of one image and some text, by part; the head is at one position.

    Attributes:
        plan: the method's.
        tower, projector, llm: of the model's parts, at the plan's lengths.
        own: what the method itself computes.
        text_tokens: of the prompt.
        visual_only: of the LLM's layers alone, as if there were no text.
    """

    plan: Plan
    tower: int
    projector: int
    llm: int
    own: int
    text_tokens: int
    visual_only: int

    @property
    def total(self) -> int:
        return self.tower + self.projector + self.llm + self.own

    @property
    def tflops(self) -> float:
        """1e12 FLOPs, 2 a MAC."""
        return 2 * self.total / 1e12


class ShapeCounter:
    """Counts methods on one shape at one image size and text length, by closed form.

    Args:
        shape: the backbone's.
        text_tokens: of the prompt.
        pixels: (height, width) of the image; None: the shape's own.
        traced: a `harness.costs.macs.ModelCounter` of the shape's model, by which every part is counted as
            well; None: by closed form alone.

    Attributes:
        checked: parts that were counted twice.
        disagreements: printable lines on those whose two counts are not equal.
    """

    def __init__(self, shape: Shape, text_tokens: int, pixels: tuple[int, int] | None = None, traced=None):
        if text_tokens < 1:
            raise UserError(f"--text-tokens {text_tokens}: a prompt has at least 1 text token")
        self.shape, self.text = shape, text_tokens
        self.grid = shape.grid(pixels)
        # a shorter prompt has no template to speak of; the last token must come after the image
        self.before = min(shape.text_before_image, text_tokens - 1)
        self.disagreements: list[str] = []
        self.checked = 0
        self._traced = traced
        self._known: dict[str, int] = {}

    @property
    def visual_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @functools.cache  # noqa: B019  one counter a report
    def count(self, spec: str, budget: Budget | None) -> PrefillMacs:
        """Raises UserError for a method that does not suit the shape, and whatever the method raises."""
        pruner = registry.build(spec, budget=None if spec == "vanilla" else budget)
        made = plan.make(self.shape.config, pruner, self.grid, self.before, self.text - self.before)
        text = self.shape.config.text_config
        llm = sum(self._layer(n + self.text) for n in made.visual_tokens) + closed_form_head(text)
        return PrefillMacs(
            plan=made,
            tower=self._tower(*self.shape.pixels_of(made.grid)),
            projector=self._projector(made.projected),
            llm=llm,
            own=made.own,
            text_tokens=self.text,
            visual_only=sum(closed_form_layer(text, n) for n in made.visual_tokens),
        )

    def _layer(self, n: int) -> int:
        return self._part(
            f"decoder layer at {n} tokens",
            lambda: closed_form_layer(self.shape.config.text_config, n),
            lambda: self._traced.decoder_layer(n),
        )

    def _tower(self, height: int, width: int) -> int:
        return self._part(
            f"vision tower at {height} x {width}",
            lambda: self.shape.family.tower_macs(self.shape.config.vision_config, height, width),
            lambda: self._traced.tower(height, width),
        )

    def _projector(self, n: int) -> int:
        return self._part(
            f"projector on {n} tokens",
            lambda: self.shape.family.projector_macs(self.shape.config, n),
            lambda: self._traced.projector(n),
        )

    def _part(self, what: str, formula: Callable[[], int], traced: Callable[[], int]) -> int:
        if what not in self._known:
            self._known[what] = formula()
            if self._traced is not None:
                self.checked += 1
                if (other := traced()) != self._known[what]:
                    self.disagreements.append(f"{what}: fvcore {other}, closed form {self._known[what]} MAC")
        return self._known[what]
