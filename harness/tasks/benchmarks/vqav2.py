"""VQAv2 (arXiv 1612.00837): open questions with ten human answers each."""

from harness.drawings import facts
from harness.drawings.drawing import Drawing
from harness.drawings.wording import Row, first_fact, pick, ten_answers
from harness.tasks.benchmark import ANSWERS, IMAGE, INT, TEXT, Benchmark, rows_in
from harness.tasks.scoring import EXACT_MATCH


def _rows(scene, rng, number) -> list[Row]:
    if rng.random() < 0.35:
        claim = first_fact(scene, rng, (facts.claim_colour, facts.claim_existence, facts.claim_count))
        if claim is None:
            return []
        answer = pick(rng, ("yes", "no"))
        return [ten_answers(claim.true if answer == "yes" else claim.false, answer, "yes/no")]
    fact = first_fact(scene, rng, (facts.count, facts.colour, facts.text_colour, facts.shape))
    if fact is None:
        return []
    return [ten_answers(fact.question, fact.answer, "number" if fact.topic == "count" else "other")]


def _asked(interview, task, category) -> list[tuple]:
    fact = interview.fact(task, ("count", "twins", "lookup", "exists"))
    if fact is None:
        return []
    question, answer = fact.question, fact.answer
    kind = {"count": "number", "exists": "yes/no"}.get(fact.kind, "other")
    if fact.topic == "distinct":
        kind = "number"
    if kind == "other" and interview.rng.random() < 0.25:
        answer, kind = interview.even(task, "claim"), "yes/no"
        question = fact.claims(interview.other(fact))[0 if answer == "yes" else 1]
    return [(ten_answers(question, answer, kind), fact)]


_DRAWING = Drawing(
    questions=240,
    per_image=2,
    per_regime=80,
    rows=_rows,
    asked=_asked,
    identify=lambda row, image, question, position: dict(
        image_id=int(image.rsplit("-", 1)[1]), question_id=question
    ),
    target=lambda row: row["multiple_choice_answer"],
)


BENCHMARKS = (
    Benchmark(
        name="vqav2",
        title="VQAv2",
        place=7,
        yaml="vqav2/vqav2_val.yaml",
        files=rows_in("vqav2"),
        columns={"rows": {"question_id": INT, "question": TEXT, "answers": ANSWERS, "image": IMAGE}},
        scoring=EXACT_MATCH,
        documents=214_354,
        images=40_504,
        comparable=False,
        why="validation split, where the paper's number is test-dev from the evaluation server",
        upstream_split="validation",
        repository="VQAv2",
        drawing=_DRAWING,
    ),
)
