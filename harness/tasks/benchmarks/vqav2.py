"""VQAv2 (arXiv 1612.00837): open questions with ten human answers each."""

from harness.tasks.benchmark import ANSWERS, IMAGE, INT, TEXT, Benchmark, rows_in
from harness.tasks.scoring import EXACT_MATCH

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
    ),
)
