"""ScienceQA (arXiv 2209.09513): multiple choice, the questions with an image."""

from harness.tasks.benchmark import IMAGE, INT, TEXT, TEXTS, Benchmark, Row, rows_in
from harness.tasks.scoring import EXACT_MATCH


def _answer_problem(row: Row) -> str:
    inside = 0 <= row["answer"] < len(row["choices"])
    return "" if inside else f"answer {row['answer']} of {len(row['choices'])} choices"


BENCHMARKS = (
    Benchmark(
        name="scienceqa",
        title="SQA",
        place=6,
        yaml="scienceqa/scienceqa_img.yaml",
        files=rows_in("scienceqa"),
        columns={
            "rows": {"question": TEXT, "choices": TEXTS, "answer": INT, "hint": TEXT, "image": IMAGE},
        },
        scoring=EXACT_MATCH,
        documents=2_017,
        comparable=True,
        why="image subset, accuracy",
        upstream_split="test",
        repository="ScienceQA",
        configs={"rows": "ScienceQA-IMG"},
        answer_problem=_answer_problem,
    ),
)
