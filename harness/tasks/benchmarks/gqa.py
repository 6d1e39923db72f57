"""GQA (arXiv 1902.09506): compositional questions about photographs, testdev_balanced."""

from harness.drawings import facts
from harness.drawings.drawing import Drawing
from harness.drawings.wording import Row, first_fact
from harness.tasks.benchmark import IMAGE, TEXT, Benchmark
from harness.tasks.scoring import EXACT_MATCH


def _row(question: str, answer: str, chosen: bool, related: bool, topic: str) -> Row:
    types = {
        "structural": "choose" if chosen else "query",
        "semantic": "rel" if related else "attr",
        "detailed": topic,
    }
    return dict(question=question, answer=answer, fullAnswer=answer, types=types)


def _rows(scene, rng, number) -> list[Row]:
    samplers = (facts.colour, facts.shape, facts.texture, facts.size, facts.relation, facts.relation)
    fact = first_fact(scene, rng, samplers)
    if fact is None:
        return []
    chosen = fact.topic in ("texture", "size", "relation")
    return [_row(fact.question, fact.answer, chosen, fact.topic == "relation", fact.topic)]


def _asked(interview, task, category) -> list[tuple]:
    fact = interview.fact(task, ("lookup", "relation", "place", "hop"))
    if fact is None:
        return []
    related = fact.kind in ("relation", "hop")
    return [(_row(fact.question, fact.answer, len(fact.domain) <= 3, related, fact.topic), fact)]


_DRAWING = Drawing(
    questions=240,
    per_image=2,
    per_regime=80,
    rows=_rows,
    asked=_asked,
    identify=lambda row, image, question, position: dict(id=f"{question:07d}", imageId=image),
    extra=lambda scene: dict(
        isBalanced=True, groups={"global": "", "local": ""}, entailed="", equivalent="", semanticStr=""
    ),
)


BENCHMARKS = (
    Benchmark(
        name="gqa",
        title="GQA",
        place=1,
        yaml="gqa/gqa.yaml",
        files={"rows": "gqa/{split}_instructions.parquet", "images": "gqa/{split}_images.parquet"},
        columns={
            "rows": {"imageId": TEXT, "question": TEXT, "answer": TEXT},
            "images": {"id": TEXT, "image": IMAGE},
        },
        scoring=EXACT_MATCH,
        documents=12_578,
        images=398,
        comparable=True,
        why="testdev_balanced, exact match",
        upstream_split="testdev",
        repository="GQA",
        configs={"rows": "testdev_balanced_instructions", "images": "testdev_balanced_images"},
        drawing=_DRAWING,
    ),
)
