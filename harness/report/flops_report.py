"""`python -m harness flops`: FLOPs of every method's prefill at true shapes, without weights or download."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from tabulate import tabulate

from harness.costs import plan, shapes
from harness.costs.closed_form import (
    closed_form_head,
    closed_form_layer,
    closed_form_merger,
    closed_form_projector,
    closed_form_tower,
    closed_form_window_tower,
)
from harness.costs.plan import Plan
from harness.costs.shapes import Shape
from methods import registry
from methods.errors import UserError

Budget = int | float
#: text tokens at which the paper's vanilla row follows: 35 of the template, about 27 of a question
TEXT_TOKENS = 62


@dataclass(frozen=True)
class Count:
    """MAC of one prefill of one image and `text_tokens` of text, by part; the head is at one position.

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


class Counter:
    """Counts methods on one shape at one image size and text length, by closed form. With `counters` (a
    `three_counters.ThreeCounters`), every part is counted by all three.
    """

    def __init__(self, shape: Shape, text_tokens: int, pixels: tuple[int, int] | None = None, counters=None):
        if text_tokens < 1:
            raise UserError(f"--text-tokens {text_tokens}: a prompt has at least 1 text token")
        self.shape, self.text, self.counters = shape, text_tokens, counters
        self.grid = shape.grid(pixels)
        # a shorter prompt has no template to speak of; the last token must come after the image
        self.before = min(shape.text_before_image, text_tokens - 1)

    @property
    def visual_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @functools.cache  # noqa: B019  one counter a report
    def count(self, spec: str, budget: Budget | None) -> Count:
        """Raises UserError for a method that does not suit the shape, and whatever the method raises."""
        pruner = registry.build(spec, budget=None if spec == "vanilla" else budget)
        made = plan.make(self.shape.config, pruner, self.grid, self.before, self.text - self.before)
        text = self.shape.config.text_config
        llm = sum(self._layer(n + self.text) for n in made.visual_tokens) + closed_form_head(text)
        return Count(
            plan=made,
            tower=self._tower(self.shape.pixels_of(made.grid)),
            projector=self._projector(made.projected),
            llm=llm,
            own=made.own,
            text_tokens=self.text,
            visual_only=sum(closed_form_layer(text, n) for n in made.visual_tokens),
        )

    def _layer(self, n: int) -> int:
        if self.counters is not None:
            return self.counters.layer(n)
        return closed_form_layer(self.shape.config.text_config, n)

    def _tower(self, pixels: tuple[int, int]) -> int:
        if self.counters is not None:
            return self.counters.tower(pixels)
        form = closed_form_tower if self.shape.family == "llava" else closed_form_window_tower
        return form(self.shape.config.vision_config, *pixels)

    def _projector(self, n: int) -> int:
        if self.counters is not None:
            return self.counters.projector(n)
        form = closed_form_projector if self.shape.family == "llava" else closed_form_merger
        return form(self.shape.config, n)


def run(
    backbone: str,
    budgets: Sequence[Budget],
    methods: Sequence[str],
    text_tokens: int = TEXT_TOKENS,
    image_size: int | None = None,
    visual_only: bool = False,
) -> int:
    """Print the tables. Returns 1 if the three counters do not agree to the last MAC.

    methods: specs, or ("all",). image_size: side of the image in pixels, for backbones that take any.
    """
    from harness.costs.three_counters import ThreeCounters

    shape = shapes.load(backbone)
    counter = Counter(shape, text_tokens, _pixels(shape, image_size), ThreeCounters(shape))
    specs = list(registry.available()) if list(methods) == ["all"] else list(methods)
    for spec in specs if list(methods) != ["all"] else ():
        registry.build(spec, budget=None)  # an unknown name or parameter ends here, with one line
    for budget in budgets:
        if budget > counter.visual_tokens:
            raise UserError(f"--budget {budget}: an image has {counter.visual_tokens} visual tokens")
    print(_caption(shape, counter))
    vanilla = counter.count("vanilla", None)
    for budget in sorted(dict.fromkeys(budgets), reverse=True):
        print(f"\n## Budget {budget:g}{' of the image' if isinstance(budget, float) else ' visual tokens'}\n")
        rows, skipped = _rows(counter, specs, budget, vanilla, visual_only)
        print(_render(rows))
        for spec, reason in skipped:
            print(f"\n{spec} is left out: {reason}")
    for table in published_tables(counter):
        print("\n" + table)
    problems = counter.counters.disagreements
    number = counter.counters.checked
    print(
        f"\nThree counters (fvcore, torch.utils.flop_counter, closed form) on {number} parts: "
        + ("equal to the last MAC." if not problems else f"{len(problems)} DISAGREE:")
    )
    for line in problems:
        print(f"  {line}")
    return 1 if problems else 0


def _pixels(shape: Shape, side: int | None) -> tuple[int, int] | None:
    if side is None:
        return None
    rows, columns = shape.grid((side, side))
    if shape.pixels_of((rows, columns)) != (side, side) or not rows:
        unit = shape.pixels_of((1, 1))[0]
        raise UserError(f"--image-size {side}: {shape.title} needs a multiple of {unit} pixels")
    if shape.family == "llava" and (side, side) != shape.image_pixels:
        raise UserError(f"--image-size {side}: {shape.title} sees {shape.image_pixels[0]} pixels only")
    return side, side


def _caption(shape: Shape, counter: Counter) -> str:
    height, width = shape.pixels_of(counter.grid)
    lines = [
        f"# FLOPs of one prefill: {shape.title}, {shape.layers} layers",
        "",
        f"- One image of {height} x {width} pixels ({counter.visual_tokens} visual tokens) and "
        f"{counter.text} text tokens, {counter.before} of them before the image; shapes only, no weights.",
        "- 2 FLOPs per multiply-accumulate (MAC). Matrix products, convolutions and attention (all n x n) "
        "count; norms, activations, softmax and rotary embeddings do not.",
        "- total = vision tower + projector + LLM (head at one position) + own. own: what the method itself "
        "computes, counted on random tensors of the true widths.",
        "- layers: visual tokens entering the LLM's layers, by each method's own plan at that budget. *: "
        "they depend on the image, these are a random one's. SparseVLM's include its recycled tokens (a "
        "fixed share of the dropped ones, by its released rule), and all words after the image rate.",
    ]
    return "\n".join(lines)


def _rows(
    counter: Counter, specs: Sequence[str], budget: Budget, vanilla: Count, visual_only: bool
) -> tuple[list[dict], list[tuple[str, str]]]:
    rows, skipped = [], []
    for spec in specs:
        try:
            count = vanilla if spec == "vanilla" else counter.count(spec, budget)
        except UserError as error:
            skipped.append((spec, str(error)))
            continue
        except Exception as error:  # a method that cannot plan without weights must not end the report
            skipped.append((spec, f"it cannot plan on random tensors ({type(error).__name__}: {error})"))
            continue
        made = count.plan
        row = {
            "method": spec,
            "layers": made.runs() + ("*" if made.varies else ""),
            "mean": f"{made.mean:.1f}",
            "tower": f"{2 * count.tower / 1e12:.3f}",
            "projector": f"{2 * count.projector / 1e12:.4f}",
            "LLM": f"{2 * count.llm / 1e12:.3f}",
            "own, GFLOPs": f"{2 * count.own / 1e9:.3g}",
            "total, TFLOPs": f"{count.tflops:.3f}",
            "ratio": f"{count.total / vanilla.total:.3f}",
        }
        if visual_only:
            row["visual only, TMAC"] = f"{count.visual_only / 1e12:.3f}"
        rows.append(row)
    return rows, skipped


def _render(rows: Sequence[dict]) -> str:
    if not rows:
        return "(no method)"
    align = ["left", "left"] + ["right"] * (len(rows[0]) - 2)
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True, colalign=align)


def published_tables(counter: Counter) -> list[str]:
    """The paper's tables of this shape's FLOPs (Table 3), beside our count of their rows as labelled, and of
    the plan that explains them."""
    from harness import published

    found = []
    for table in published.load().efficiency.values():
        if table.backbone != counter.shape.name:
            continue
        rows = []
        for row in table.rows:
            count = counter.count(row.plan, row.tokens)
            other = counter.count(row.reading, row.tokens) if row.reading else None
            rows.append(
                {
                    "row": f"{row.method}, {row.tokens}",
                    "paper": f"{row.tflops:.2f}",
                    "ours": f"{count.tflops:.3f}",
                    "ours is": f"{row.plan}: mean {count.plan.mean:.1f} tokens",
                    "difference": f"{row.tflops - count.tflops:+.3f}",
                    "reading": f"{other.tflops:.3f} ({row.reading})" if other else "",
                }
            )
        notes = [f"- {row.method}: {row.note}." for row in table.rows if row.note]
        title = f"## {table.place} of the paper, TFLOPs, {counter.text} text tokens"
        found.append("\n".join([title, "", _render(rows), "", *notes]))
    return found
