"""`python -m harness flops --convention NAME`: one model under each paper's way of counting FLOPs, and which
printed figures each reproduces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from backbones import shapes
from harness import published
from harness.costs.conventions import CONVENTIONS, Convention, named
from harness.costs.shape_counter import TEXT_TOKENS, Budget, ShapeCounter
from harness.published.arithmetic import half_unit
from harness.report import tables
from methods import registry
from methods.errors import UserError

#: behind a count that gives the printed figure
MARKS = {"rounded": " =", "cut off": " ~", "": ""}


def run(backbone: str, budgets: Sequence[Budget], methods: Sequence[str], names: Sequence[str]) -> int:
    """Print the tables. methods: specs, or ("all",). names: of conventions, or ("all",)."""
    chosen = [named(name) for name in (CONVENTIONS if list(names) == ["all"] else dict.fromkeys(names))]
    counter = ShapeCounter(shapes.load(backbone), TEXT_TOKENS)
    specs = list(registry.available()) if list(methods) == ["all"] else list(methods)
    print(f"# FLOPs of one prefill by convention, in T: {counter.shape.title}\n")
    for one in chosen:
        print(f"- {one.name} ({one.paper}): {one.rule}; {_known_from(one)}.")
    rows = [_row("vanilla", None, chosen, counter)]
    skipped = {}
    for budget in sorted(dict.fromkeys(budgets), reverse=True):
        for spec in specs:
            if spec == "vanilla":
                continue
            try:
                rows.append(_row(spec, budget, chosen, counter))
            except UserError as error:
                skipped[spec] = str(error)
    print("- Printed figures: = this count gives it when rounded, ~ when cut off behind its last digit.")
    print("\n" + tables.markdown(rows, left=2))
    for spec, reason in skipped.items():
        print(f"\n{spec} is left out: {reason}")
    if figures := printed_figures(counter, chosen):
        print(f"\n## Printed figures\n\n{tables.markdown(figures, left=3)}")
    return 0


def printed_figures(counter: ShapeCounter, conventions: Sequence[Convention]) -> list[dict[str, str]]:
    """Every printed cost of the shape beside each convention's count of it, and which give it."""
    rows = []
    for what, source, plan, tokens, value in _printed(counter.shape.name):
        budget = None if plan == "vanilla" else tokens or counter.visual_tokens // 9
        counts = {c.name: c.tera(counter, plan, budget) for c in conventions}
        rows.append(
            {"row": what, "by": source, "plan": plan, "printed": f"{value}"}
            | {name: f"{tera:.3f}" + MARKS[reading(tera, value)] for name, tera in counts.items()}
        )
    return rows


def reading(ours: float, printed: float) -> str:
    """How a count gives a printed figure: `rounded`, `cut off` behind its last digit, or not at all ("")."""
    half = half_unit(printed)
    if abs(ours - printed) <= half + 1e-9:
        return "rounded"
    return "cut off" if printed <= ours < printed + 2 * half else ""


def _printed(shape: str) -> Iterator[tuple[str, str, str, int | None, float]]:
    """(row, source, plan, tokens, T) of every printed cost of that shape."""
    registry = published.load()
    for table in registry.efficiency.values():
        if table.backbone == shape:
            for row in table.rows:
                for plan in filter(None, (row.plan, row.reading)):
                    yield f"{row.method}, {row.tokens}", table.place, plan, row.tokens, row.tflops
            for other in table.beside:
                yield f"{other.method}, {other.tokens}", other.source, other.plan, other.tokens, other.tflops
    for claims in registry.claims.values():
        for claim in claims.theoretical:
            if claim.backbone == shape:
                name = claim.plan.partition(":")[0]
                yield name, claim.source, claim.plan, claim.tokens, claim.tera


def _known_from(convention: Convention) -> str:
    return "as stated" if convention.stated else "found from the printed figures, not stated"


def _row(spec: str, budget: Budget | None, conventions: Sequence[Convention], counter: ShapeCounter) -> dict:
    row: dict[str, object] = {"method": spec, "tokens": tables.MISSING if budget is None else f"{budget:g}"}
    return row | {c.name: f"{c.tera(counter, spec, budget):.3f}" for c in conventions}
