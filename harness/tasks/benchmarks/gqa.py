"""GQA (arXiv 1902.09506): compositional questions about photographs, testdev_balanced."""

from harness.tasks.benchmark import IMAGE, TEXT, Benchmark
from harness.tasks.scoring import EXACT_MATCH

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
    ),
)
