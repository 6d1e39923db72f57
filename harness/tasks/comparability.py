"""Whether a score can stand beside the paper's, and if not, why not."""

from __future__ import annotations

from collections.abc import Mapping

from backbones import families, shapes
from harness.tasks.suites import Benchmark, Suite


def reasons(
    benchmark: Benchmark,
    suite: Suite,
    described: Mapping[str, object],
    documents: int,
    total: int,
    blind: bool = False,
) -> list[str]:
    """Why not; empty if it is comparable.

    described: `Backbone.describe()`. documents: how many of the file's `total` are scored.
    """
    if suite.synthetic:
        return ["drawn images, not the benchmark's"]
    family = families.of_type(str(described["family"]))
    doubt = family.paper_doubts.get(benchmark.repository)
    found = [doubt] if doubt else [] if benchmark.comparable else [benchmark.why]
    shape = shapes.named_like(str(described["name"]))
    if shape is None or shape.name != family.paper_checkpoint:
        found.append(f"the paper has no row of {described['name']}")
    if documents < total:
        found.append(f"a slice of {documents} of {total} documents")
    if described.get("quantized"):
        found.append(f"weights in {described['quantized']}")
    found += family.deviations(described)
    if blind:
        found.append("every image was replaced by a grey one")
    return found
