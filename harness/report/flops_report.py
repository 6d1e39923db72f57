"""`python -m harness flops`: FLOPs of every method's prefill at true shapes, without weights or download."""

from __future__ import annotations

from collections.abc import Sequence

from backbones import shapes
from backbones.shapes import Shape
from harness.costs import match
from harness.costs.shape_counter import TEXT_TOKENS, Budget, PrefillMacs, ShapeCounter
from harness.report import tables
from methods import registry
from methods.errors import UserError


def run(
    backbone: str,
    budgets: Sequence[Budget],
    methods: Sequence[str],
    text_tokens: int = TEXT_TOKENS,
    image_size: int | None = None,
    visual_only: bool = False,
    matched: bool = False,
) -> int:
    """Print the tables. Returns 1 if formula and fvcore do not agree to the last MAC.

    methods: specs, or ("all",). image_size: side of the image in pixels, for backbones that take any.
    matched: of each method also the budget of equal cost (`harness.costs.match`).
    """
    from harness.costs.macs import ModelCounter

    shape = shapes.load(backbone)
    counter = ShapeCounter(shape, text_tokens, _pixels(shape, image_size), ModelCounter(shape.model()))
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
        if matched:
            print("\n" + _matched(counter, [spec for spec in specs if spec != "vanilla"], budget, vanilla))
    for table in published_tables(counter):
        print("\n" + table)
    problems = counter.disagreements
    print(
        f"\nTwo counters (fvcore on the unmodified model's modules, closed form) on {counter.checked} parts: "
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
    if not shape.family.any_size and (side, side) != shape.image_pixels:
        raise UserError(f"--image-size {side}: {shape.title} sees {shape.image_pixels[0]} pixels only")
    return side, side


def _caption(shape: Shape, counter: ShapeCounter) -> str:
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
    counter: ShapeCounter, specs: Sequence[str], budget: Budget, vanilla: PrefillMacs, visual_only: bool
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


def _matched(counter: ShapeCounter, specs: Sequence[str], budget: Budget, vanilla: PrefillMacs) -> str:
    """The budget of each method that costs what keeping so many tokens before the language model does."""
    rows, reasons, target = [], [], counter.count(match.REFERENCE, budget).total
    for spec in specs:
        found = match.find(counter, spec, budget)
        if found.budget is None:
            reasons.append(f"\n{spec} cannot be had at this cost: {found.reason}")
            continue
        plan = counter.count(spec, found.budget).plan
        rows.append(
            {
                "method": spec,
                "layers": plan.runs() + ("*" if plan.varies else ""),
                "budget": f"{found.budget:g}",
                "total, TFLOPs": f"{2 * found.macs / 1e12:.3f}",
                "ratio": f"{found.macs / vanilla.total:.3f}",
                "off, %": f"{100 * (found.macs / target - 1):+.2f}",
                "step, %": f"{100 * found.step / target:.2f}",
            }
        )
    head = f"At equal cost, {2 * target / 1e12:.3f} TFLOPs ({match.REFERENCE} at {budget:g}):"
    return "\n".join([head, "", _render(rows), *reasons])


def _render(rows: Sequence[dict]) -> str:
    if not rows:
        return "(no method)"
    return tables.markdown(rows, left=2)


def published_tables(counter: ShapeCounter) -> list[str]:
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
