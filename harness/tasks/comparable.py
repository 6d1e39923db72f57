"""Whether a score can stand beside the paper's, and if not, why not."""

from __future__ import annotations

from collections.abc import Mapping

from harness.tasks.suites import Benchmark, Suite

#: whose scores the paper prints (arXiv 2606.16067): Table 1, Table 2
PAPER_BACKBONES = ("llava-1.5-7b", "qwen2.5-vl-7b")

#: the data sets that Table 2's last column may be about
TABLE2_VQA = ("VQAv2", "textvqa")
TABLE2_VQA_MARK = "our copy of Table 2 does not tell whether its column VQA is VQAv2 or TextVQA"


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
    from harness.costs import shapes

    if suite.synthetic:
        return ["drawn images, not the benchmark's"]
    table2 = described.get("family") == "qwen2_5_vl" and benchmark.repository in TABLE2_VQA
    found = [TABLE2_VQA_MARK] if table2 else [] if benchmark.comparable else [benchmark.why]
    shape = shapes.named_like(str(described["name"]))
    if shape is None or shape.name not in PAPER_BACKBONES:
        found.append(f"the paper has no row of {described['name']}")
    if documents < total:
        found.append(f"a slice of {documents} of {total} documents")
    if described.get("quantized"):
        found.append(f"weights in {described['quantized']}")
    if described.get("family") == "llava":
        if described.get("image_padding") != "square":
            found.append("images are cropped, where LLaVA's own code pads them")
        if "system_sentence" not in described:
            found.append("prompt without LLaVA's system sentence")
    if blind:
        found.append("every image was replaced by a grey one")
    return found
