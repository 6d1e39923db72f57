"""`python -m harness flops --convention NAME`: one model under each paper's way of counting FLOPs, and which
printed figures each reproduces."""

from __future__ import annotations

from collections.abc import Sequence

from backbones import shapes
from harness.costs.conventions import CONVENTIONS, Convention, named
from harness.costs.shape_counter import TEXT_TOKENS, Budget, ShapeCounter
from harness.report import tables
from methods import registry
from methods.errors import UserError


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
    print("\n" + tables.markdown(rows, left=2))
    for spec, reason in skipped.items():
        print(f"\n{spec} is left out: {reason}")
    return 0


def _known_from(convention: Convention) -> str:
    return "as stated" if convention.stated else "found from the printed figures, not stated"


def _row(spec: str, budget: Budget | None, conventions: Sequence[Convention], counter: ShapeCounter) -> dict:
    row: dict[str, object] = {"method": spec, "tokens": tables.MISSING if budget is None else f"{budget:g}"}
    return row | {c.name: f"{c.tera(counter, spec, budget):.3f}" for c in conventions}
