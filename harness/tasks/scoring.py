"""From lmms-eval's per-sample results to our number, its bootstrap units and the numbers beside it.

lmms-eval computes the official number of each benchmark. Here the same number is written as a function of
sums over clusters (for the bootstrap), and both must agree: `score` raises if they do not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from harness.tasks.bootstrap import Statistic, Units

#: one document as lmms-eval's `samples` has it: doc (without media), filtered_resps, and a value per metric
Sample = Mapping[str, object]


@dataclass(frozen=True)
class Score:
    """`value` in the benchmark's unit; `documents` the per-document scores in 0..1, in document order;
    `units` what is resampled (`statistic` turns their summed counts into the value); `extra` are numbers
    beside it.
    """

    value: float
    documents: list[float]
    units: Units
    extra: dict[str, float] = field(default_factory=dict)


def score(
    kind: str,
    samples: Sequence[Sample],
    groups: Sequence[object],
    images: Sequence[str],
    official: Mapping[str, object],
) -> Score:
    """samples, groups (see Benchmark.group_key) and images (identity of each image) in document order.

    official: lmms-eval's aggregated metrics. Raises ArithmeticError when our sum does not give its number.
    """
    result = SCORERS[kind](samples, groups, images)
    ours, theirs = CHECKS[kind](result, official)
    if abs(ours - theirs) > 1e-6 * max(1.0, abs(theirs)):
        raise ArithmeticError(f"{kind}: bootstrap statistic gives {ours}, lmms-eval {theirs}")
    return result


def statistic(kind: str) -> Statistic:
    """The function from summed counts [R, F] to scores [R] of a benchmark kind (also for counts read from
    records).
    """
    return {"exact_match": _mean_percent, "mmbench": _mean_percent, "pope": _mean_f1, "mme": _mme_points}[
        kind
    ]


def _mean_percent(sums: np.ndarray) -> np.ndarray:
    return 100 * sums[:, 0] / sums[:, 1]


def _mean_f1(sums: np.ndarray) -> np.ndarray:
    """Columns: true positives, false positives, false negatives, once a category."""
    tp, fp, fn = np.moveaxis(sums.reshape(len(sums), -1, 3), 2, 0)
    # 2PR/(P+R) = 2tp/(2tp+fp+fn); upstream defines it as 0 when there is no true positive
    f1 = np.divide(2 * tp, 2 * tp + fp + fn, out=np.zeros_like(tp), where=tp > 0)
    return 100 * f1.mean(1)


def _mme_points(sums: np.ndarray) -> np.ndarray:
    """Columns: points and number of pairs, once a category."""
    points, n = np.moveaxis(sums.reshape(len(sums), -1, 2), 2, 0)
    return (points / n).sum(1)


def _finish(kind: str, documents, units: Units, extra=None) -> Score:
    value = float(statistic(kind)(units.counts.sum(0, keepdims=True))[0])
    return Score(value, [float(d) for d in documents], units, extra or {})


def _exact_match(samples, groups, images) -> Score:
    """Mean of the per-document score (exact match or VQA accuracy) in %, clustered by image."""
    each = np.array([float(s["exact_match"]) for s in samples])
    units = Units.gather(images, np.stack([each, np.ones_like(each)], 1))
    return _finish("exact_match", each, units)


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
    return _finish("pope", right, units, extra)


def _count_f1(row: np.ndarray, column: int, truth: str, said: str) -> None:
    if said == "yes":
        row[column if truth == "yes" else column + 1] += 1  # true / false positive
    elif truth == "yes" and said == "no":
        row[column + 2] += 1  # false negative


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
    return _finish("mme", [r["score"] for r in results], units, extra)


def _mmbench(samples, groups, images) -> Score:
    """Circular evaluation in %: a question is right only if every rotation is. Clusters are questions."""
    import pandas as pd
    from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator

    rows: dict[object, list[dict]] = {}
    for group, s in zip(groups, samples):
        rows.setdefault(group, []).append(s["gpt_eval_score"])
    hits = {}
    for group, members in rows.items():
        frame = pd.DataFrame(members).sort_values("index")
        frame["prediction"] = frame["prediction"].astype(str)
        truth = dict(zip(frame["index"], frame["answer"]))
        hits[group] = float(mmbench_evaluator.eval_sub_data(frame, truth, static_only=True))
    each = np.array(list(hits.values()))
    units = Units.gather(list(hits), np.stack([each, np.ones_like(each)], 1))
    return _finish("mmbench", [hits[g] for g in groups], units)


SCORERS: dict[str, Callable[..., Score]] = {
    "exact_match": _exact_match,
    "pope": _pope,
    "mme": _mme,
    "mmbench": _mmbench,
}


def _number(value: object) -> float:
    """lmms-eval puts an empty list where no document had the metric (MME without a cognition category)."""
    return float(value) if isinstance(value, (int, float, np.floating, np.integer)) else 0.0


#: (our score, lmms-eval's metrics) -> two numbers that must be equal
CHECKS: dict[str, Callable[[Score, Mapping[str, object]], tuple[float, float]]] = {
    "exact_match": lambda s, m: (s.value, 100 * _number(m["exact_match"])),
    "pope": lambda s, m: (s.extra["pooled_f1"], 100 * _number(m["pope_f1_score"])),
    "mme": lambda s, m: (
        s.value,
        _number(m.get("mme_perception_score")) + _number(m.get("mme_cognition_score")),
    ),
    "mmbench": lambda s, m: (s.value, _number(m["gpt_eval_score"])),
}
