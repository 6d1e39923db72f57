"""Do the published FLOPs follow from shapes and plans?"""

from __future__ import annotations

from collections.abc import Iterator

from backbones import shapes
from harness.check.findings import Finding
from harness.costs.conventions import named
from harness.costs.shape_counter import TEXT_TOKENS, ShapeCounter
from harness.published import Registry
from harness.published.arithmetic import half_unit
from harness.published.schema import Efficiency

#: how far our count may be from a published one: the prompt's length is not told (one text token is 0.16 %),
#: nor whether a method's ranking is counted as released or as needed (PDrop: 1.3 %)
TOLERANCE = 0.02
#: theoretical counts leave nothing open but their last digit and whether counts were truncated
THEORETICAL_TOLERANCE = 0.002


def findings(registry: Registry) -> Iterator[Finding]:
    """Every published FLOPs figure beside ours; `flops_follow` in the registry says what is expected."""
    for table in registry.efficiency.values():
        counter = ShapeCounter(shapes.load(table.backbone), TEXT_TOKENS)
        for row in table.rows:
            where = f"{table.name}: {row.method}, {row.tokens} tokens"
            ours = counter.count(row.plan, row.tokens).tflops
            agrees = _near(ours, row.tflops, TOLERANCE)
            note = row.note
            if agrees == row.flops_follow:
                status = "ok" if agrees else "known"
            else:
                status, note = (
                    "FAIL",
                    f"flops_follow is {str(row.flops_follow).lower()} in the registry; {note}",
                )
            yield Finding(
                status, where, f"TFLOPs of {row.plan}", f"{ours:.3f}", f"{row.tflops}", note, table.path
            )
            if row.reading:
                ours = counter.count(row.reading, row.tokens).tflops
                fits = _near(ours, row.tflops, TOLERANCE)
                yield Finding(
                    "ok" if fits else "FAIL", where, f"TFLOPs of {row.reading}", f"{ours:.3f}",
                    f"{row.tflops}", "" if fits else "the reading does not give the figure", table.path,
                )  # fmt: skip
        yield from _beside(table, counter)
    for claims in registry.claims.values():
        for claim in claims.theoretical:
            counter = ShapeCounter(shapes.load(claim.backbone), TEXT_TOKENS)
            budget = None if claim.plan == "vanilla" else claim.tokens or counter.visual_tokens // 9
            ours = named(claim.convention).tera(counter, claim.plan, budget)
            fits = _near(ours, claim.tera, THEORETICAL_TOLERANCE)
            yield Finding(
                "ok" if fits else "FAIL", f"{claims.name}: {claim.source}",
                f"T of {claim.plan} by {claim.convention}", f"{ours:.3f}", f"{claim.tera}",
                "" if fits else "does not follow", claims.path,
            )  # fmt: skip


def _beside(table: Efficiency, counter: ShapeCounter) -> Iterator[Finding]:
    """The rows of another work beside the table's, by the table's way of counting."""
    if table.convention is None:
        return
    convention = named(table.convention)
    for row in table.beside:
        ours = convention.tera(counter, row.plan, row.tokens)
        fits = abs(ours - row.tflops) <= half_unit(row.tflops)
        yield Finding(
            "ok" if fits else "FAIL", f"{table.name}, beside: {row.method}, {row.tokens} tokens",
            f"T of {row.plan} by {convention.name}", f"{ours:.3f}", f"{row.tflops}",
            "" if fits else "does not follow", table.path,
        )  # fmt: skip


def _near(ours: float, published: float, tolerance: float) -> bool:
    return abs(ours - published) <= half_unit(published) + tolerance * published
