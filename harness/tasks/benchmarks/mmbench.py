"""MMBench (arXiv 2307.06281), English and Chinese: multiple choice, asked again with its options rotated."""

from __future__ import annotations

import numpy as np

from harness.drawings import facts
from harness.drawings.drawing import Drawing
from harness.drawings.wording import (
    LETTER_ANSWER,
    LETTER_ANSWER_CN,
    LETTERS,
    OPTIONS_HEADER,
    first_fact,
    in_chinese,
    options_of,
)
from harness.tasks.benchmark import IMAGE, INT, TEXT, Benchmark, Row, read_as, rows_in
from harness.tasks.bootstrap import Units
from harness.tasks.scoring import Score, Scoring, mean_percent, number

_COLUMNS = {
    "index": INT, "question": TEXT, "hint": TEXT, "A": TEXT, "B": TEXT, "C": TEXT, "D": TEXT, "answer": TEXT,
    "category": TEXT, "L2-category": TEXT, "source": TEXT, "split": TEXT, "image": IMAGE,
}  # fmt: skip


def _question(row: Row) -> int:
    """index, index + 1e6, ... are the rotations of one question."""
    return int(row["index"]) % 1_000_000


def _answer_problem(row: Row) -> str:
    right = row["answer"]
    return "" if right in "ABCD" and row.get(right) not in (None, "nan") else f"answer {right!r} is no option"


def _repaired_cn(config: dict) -> None:
    """lmms-eval 0.7.3 has no static aggregation for Chinese (its own posts every unparsed answer to GPT), and
    its prompt, unlike the English one, would put the word nan ahead of a question without a hint."""
    config["metric_list"][0]["aggregation"] = _static_cn
    config["doc_to_text"] = read_as(config["doc_to_text"], "hint", "nan", None)


def _static_cn(results, args):
    from lmms_eval.tasks.mmbench.cn_utils import mmbench_evaluator

    return mmbench_evaluator.eval_result(results, eval_method="static")[0] * 100


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
    return _SCORING.finish([hits[g] for g in groups], units)


_SAMPLERS = (
    facts.colour, facts.shape, facts.texture, facts.size, facts.relation, facts.count, facts.read_word,
    facts.category,
)  # fmt: skip
_KINDS = ("lookup", "relation", "place", "count", "twins", "read", "meaning", "hop")
#: by version 1's topics and version 2's kinds of facts
_L2 = {
    "relation": "finegrained_perception (cross-instance)",
    "category": "logic_reasoning",
    "read_word": "finegrained_perception (instance-level)",
}
_L2_V2 = {
    "relation": "finegrained_perception (cross-instance)",
    "twins": "finegrained_perception (cross-instance)",
    "hop": "relation_reasoning",
    "meaning": "logic_reasoning",
    "read": "finegrained_perception (instance-level)",
}


def _rotations(fact, rng, chinese: bool, second_level: str) -> list[dict]:
    """One base question as its circular copies, MMBench's way: rotation r is row r."""
    options = options_of(fact, rng)
    rows = []
    for r in range(len(options)):
        rotated = options[r:] + options[:r]
        shown = [in_chinese(o) for o in rotated] if chinese else rotated
        rows.append(
            dict(
                question=fact.chinese if chinese else fact.question,
                hint=None,
                answer=LETTERS[rotated.index(fact.answer)],
                **dict(zip(LETTERS, shown + ["nan"] * 4)),
                category=fact.topic,
                **{"L2-category": second_level, "comment": "nan"},
                source="pocket-8",
            )
        )
    return rows


def _options(row: Row) -> list[str]:
    return [letter for letter in LETTERS if row[letter] != "nan"]


def _drawing(chinese: bool) -> Drawing:
    def rows(scene, rng, number) -> list[dict]:
        fact = first_fact(scene, rng, _SAMPLERS)
        if fact is None:
            return []
        return _rotations(fact, rng, chinese, _L2.get(fact.topic, "attribute_reasoning"))

    def asked(interview, task, category) -> list[tuple]:
        fact = interview.fact(task, _KINDS)
        if fact is None:
            return []
        level = _L2_V2.get(fact.kind, "attribute_reasoning")
        return [(row, fact) for row in _rotations(fact, interview.rng, chinese, level)]

    def prompt(row: Row) -> str:
        options = "\n".join(f"{letter}. {row[letter]}" for letter in _options(row))
        tail = LETTER_ANSWER_CN if chinese else LETTER_ANSWER
        return f"{row['question']} {OPTIONS_HEADER}\n{options}\n{tail}"

    return Drawing(
        questions=120,
        per_regime=40,
        rows=rows,
        asked=asked,
        identify=lambda row, image, question, position: dict(
            index=question + 1 + position * 1_000_000, split="dev"
        ),
        prompt=prompt,
        chance=lambda row, fact: len(_options(row)) ** -float(len(_options(row))),
        order=lambda row: row["index"],  # the hub's files list all first rotations, then all second ones, ...
    )


_SCORING = Scoring(
    per_sample=_mmbench,
    statistic=mean_percent,
    compared=lambda s, m: (s.value, number(m["gpt_eval_score"])),
)
_COMMON = dict(
    columns={"rows": _COLUMNS},
    scoring=_SCORING,
    documents=4_329,
    images=1_164,
    comparable=False,
    upstream_split="dev",
    repository="MMBench",
    group_by=_question,
    stratum="category",
    answer_problem=_answer_problem,
)
BENCHMARKS = (
    Benchmark(
        name="mmbench_en",
        title="MMB",
        place=2,
        yaml="mmbench/mmbench_en_dev_static.yaml",
        files=rows_in("mmbench_en"),
        why="answers are read by rules only (no GPT), where the papers used the OpenCompass server and "
        "LLaVA's own prompt",
        configs={"rows": "en"},
        drawing=_drawing(chinese=False),
        **_COMMON,
    ),
    Benchmark(
        name="mmbench_cn",
        title="MMB-CN",
        place=3,
        yaml="mmbench/mmbench_cn_dev.yaml",
        files=rows_in("mmbench_cn"),
        why="as MMB, and the option header of the prompt is English upstream",
        configs={"rows": "cn"},
        drawing=_drawing(chinese=True),
        adapt=_repaired_cn,
        **_COMMON,
    ),
)
