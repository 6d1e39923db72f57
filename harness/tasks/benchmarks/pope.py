"""POPE (arXiv 2305.10355): is there a ... in the image? Three parts, by how the absent things were chosen."""

from __future__ import annotations

import re

import numpy as np

from harness.drawings import facts
from harness.drawings.drawing import Drawing
from harness.drawings.wording import pick
from harness.tasks.benchmark import IMAGE, TEXT, Benchmark, rows_in, yes_or_no
from harness.tasks.bootstrap import Units
from harness.tasks.scoring import Score, Scoring, number


def _mean_f1(sums: np.ndarray) -> np.ndarray:
    """Columns: true positives, false positives, false negatives, once per category."""
    tp, fp, fn = np.moveaxis(sums.reshape(len(sums), -1, 3), 2, 0)
    # 2PR/(P+R) = 2tp/(2tp+fp+fn); upstream defines it as 0 when there is no true positive
    f1 = np.divide(2 * tp, 2 * tp + fp + fn, out=np.zeros_like(tp), where=tp > 0)
    return 100 * f1.mean(1)


def _pope(samples, groups, images) -> Score:
    """Mean over the categories of F1 in %, clustered by image, in upstream's reading of an answer.

    Upstream compares the whole lower-cased answer with yes/no: "No." is wrong and, being neither, left out of
    recall's denominator. `f1_normalised` reads the first word instead, so that a full stop does not look like
    a catastrophe.
    """
    categories = sorted({str(s["doc"]["category"]) for s in samples})
    strict = np.zeros((len(samples), 3 * len(categories)))
    lenient = np.zeros_like(strict)
    right = []
    for i, s in enumerate(samples):
        result = s["pope_f1_score"]
        column = 3 * categories.index(str(s["doc"]["category"]))
        truth, said = result["ground_truth"], result["prediction"]
        right.append(float(result["score"]))
        _count_f1(strict[i], column, truth, said)
        word = re.match(r"[a-z]*", said)[0]
        _count_f1(lenient[i], column, truth, word)
    units = Units.gather(images, strict)
    total = strict.sum(0, keepdims=True)
    extra = {
        "accuracy": 100 * float(np.mean(right)),
        "f1_normalised": float(_mean_f1(lenient.sum(0, keepdims=True))[0]),
        "pooled_f1": float(_mean_f1(total.reshape(-1, 3).sum(0, keepdims=True))[0]),
    }
    for i, name in enumerate(categories):
        extra[f"f1_{name}"] = float(_mean_f1(total[:, 3 * i : 3 * i + 3])[0])
    return _SCORING.finish(right, units, extra)


def _count_f1(row: np.ndarray, column: int, truth: str, said: str) -> None:
    if said == "yes":
        row[column if truth == "yes" else column + 1] += 1  # true / false positive
    elif truth == "yes" and said == "no":
        row[column + 2] += 1  # false negative


_SCORING = Scoring(
    per_sample=_pope,
    statistic=_mean_f1,
    compared=lambda s, m: (s.extra["pooled_f1"], 100 * number(m["pope_f1_score"])),
)

#: how absent things were chosen: any, frequent ones, or near-misses (in version 2: by how many there are)
_STYLES = ("random", "popular", "adversarial")


def _rows(scene, rng, number) -> list[dict]:
    """Both questions about a claim; one of them in the set."""
    style = pick(rng, _STYLES)
    claim = facts.claim_existence(scene, rng, style)
    if claim is None:
        return []
    both = [dict(question=q, answer=a, category=style) for q, a in ((claim.true, "yes"), (claim.false, "no"))]
    return both if number is None else [pick(rng, both)]


def _asked(interview, task, category) -> list[tuple]:
    """Absent objects by their near-misses: random one, popular two, adversarial more, where there are."""
    style = category or pick(interview.rng, _STYLES)
    tally, rng = interview.tally, interview.rng
    answer = min(("yes", "no"), key=lambda a: (tally[task, style, a], rng.random()))
    near = None if answer == "yes" else _STYLES.index(style) + 1
    fact = interview.fact(task, ("exists",), answer=answer, near=near)
    if fact is None:
        return []
    tally[task, style, answer] += 1
    return [(dict(question=fact.question, answer=fact.answer, category=style), fact)]


_DRAWING = Drawing(
    questions=240,
    per_image=2,
    per_regime=80,
    rows=_rows,
    asked=_asked,
    categories=_STYLES,
    identify=lambda row, image, question, position: dict(
        id=str(question), question_id=str(question), image_source=image
    ),
)


BENCHMARKS = (
    Benchmark(
        name="pope",
        title="POPE",
        place=5,
        yaml="pope/pope.yaml",
        files=rows_in("pope"),
        columns={
            "rows": dict.fromkeys(("question_id", "question", "answer", "category"), TEXT) | {"image": IMAGE}
        },
        scoring=_SCORING,
        documents=9_000,
        images=500,
        comparable=True,
        why="mean of the F1 of the adversarial, popular and random part",
        upstream_split="test",
        repository="POPE",
        stratum="category",
        strata=("adversarial", "popular", "random"),
        part=lambda row: (row["category"], row["answer"].lower().strip()),  # F1 is 0 where nothing is a yes
        answer_problem=yes_or_no,
        drawing=_DRAWING,
    ),
)
