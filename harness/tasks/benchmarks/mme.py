"""MME (arXiv 2306.13394): two yes/no questions per image, in 14 categories."""

from __future__ import annotations

import numpy as np

from harness.drawings import facts
from harness.drawings.drawing import Drawing
from harness.drawings.wording import pick, short_prompt
from harness.tasks.benchmark import IMAGE, TEXT, Benchmark, rows_in, yes_or_no
from harness.tasks.bootstrap import Units
from harness.tasks.scoring import Score, Scoring, number


def _mme_points(sums: np.ndarray) -> np.ndarray:
    """Columns: points and number of pairs, once per category."""
    points, n = np.moveaxis(sums.reshape(len(sums), -1, 2), 2, 0)
    return (points / n).sum(1)


def _mme(samples, groups, images) -> Score:
    """Sum over the categories of accuracy + accuracy+ (both questions of an image right), in points.

    Clusters are the image's pair of questions, strata the categories.
    """
    results = [s.get("mme_perception_score") or s["mme_cognition_score"] for s in samples]
    categories = sorted({r["category"] for r in results})
    pairs: dict[tuple[str, str], list[float]] = {}
    for r in results:
        pairs.setdefault((r["category"], r["question_id"]), []).append(float(r["score"]))
    counts = np.zeros((len(pairs), 2 * len(categories)))
    for i, ((category, _), scores) in enumerate(pairs.items()):
        column = 2 * categories.index(category)
        counts[i, column] = 100 * sum(scores) / 2 + 100 * (sum(scores) == 2)
        counts[i, column + 1] = 1
    keys = [f"{c}\x1f{q}" for c, q in pairs]

    units = Units.gather(keys, counts, [c for c, _ in pairs])
    extra = {"maximum": 200.0 * len(categories)}
    return _SCORING.finish([r["score"] for r in results], units, extra)


_SCORING = Scoring(
    per_sample=_mme,
    statistic=_mme_points,
    compared=lambda s, m: (
        s.value,
        number(m.get("mme_perception_score")) + number(m.get("mme_cognition_score")),
    ),
)

_YES_NO = " Please answer yes or no."
#: by category: version 1's sampler, and the kind and topics of version 2's facts
_CATEGORIES = {
    "existence": (facts.claim_existence, "exists", ("existence",)),
    "count": (facts.claim_count, "count", ("count",)),
    "position": (facts.claim_position, "relation", ("relation",)),
    "color": (facts.claim_colour, "lookup", ("colour",)),
    "OCR": (facts.claim_ocr, "read", ("read_word",)),
    "commonsense_reasoning": (facts.claim_category, "meaning", ("category",)),
    "text_translation": (facts.claim_translation, "meaning", ("translation",)),
    "numerical_calculation": (facts.claim_sum, "meaning", ("sum",)),
}


def _row(question: str, answer: str, category: str) -> dict:
    return dict(question=question + _YES_NO, answer=answer, category=category)


def _rows(scene, rng, number) -> list[dict]:
    """Both questions about a claim; the categories in turn in the set."""
    names = list(_CATEGORIES)
    category = pick(rng, names) if number is None else names[number % len(names)]
    claim = _CATEGORIES[category][0](scene, rng)
    if claim is None:
        return []
    return [_row(claim.true, "Yes", category), _row(claim.false, "No", category)]


def _asked(interview, task, category) -> list[tuple]:
    category = category or pick(interview.rng, list(_CATEGORIES))
    _, kind, topics = _CATEGORIES[category]
    if kind == "exists":
        yes = interview.fact(task, (kind,), topics, "yes")
        no = yes and interview.fact(task, (kind,), topics, "no")
        if no is None:
            return []
        return [(_row(yes.question, "Yes", category), yes), (_row(no.question, "No", category), no)]
    fact = interview.fact(task, (kind,), topics)
    if fact is None:
        return []
    true, false = fact.claims(interview.other(fact))
    return [(_row(true, "Yes", category), fact), (_row(false, "No", category), fact)]


_DRAWING = Drawing(
    questions=128,
    per_regime=48,
    rows=_rows,
    asked=_asked,
    categories=tuple(_CATEGORIES),
    identify=lambda row, image, question, position: dict(question_id=f"{row['category']}/{question:04d}.png"),
    prompt=lambda row: short_prompt({"question": row["question"].replace(_YES_NO, "")}),
    target=lambda row: row["answer"].lower(),  # MME says Yes where POPE says yes
)


BENCHMARKS = (
    Benchmark(
        name="mme",
        title="MME",
        place=4,
        yaml="mme/mme.yaml",
        files=rows_in("mme"),
        columns={
            "rows": dict.fromkeys(("question_id", "question", "answer", "category"), TEXT) | {"image": IMAGE}
        },
        scoring=_SCORING,
        unit="points",
        maximum=2_800,
        documents=2_374,
        images=1_187,
        comparable=True,
        why="perception + cognition, in points",
        upstream_split="test",
        repository="MME",
        group_by=lambda row: row["question_id"],
        group_size=2,
        stratum="category",
        answer_problem=yes_or_no,
        drawing=_DRAWING,
    ),
)
