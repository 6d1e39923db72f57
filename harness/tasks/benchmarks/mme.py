"""MME (arXiv 2306.13394): two yes/no questions per image, in 14 categories."""

from __future__ import annotations

import numpy as np

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
    ),
)
