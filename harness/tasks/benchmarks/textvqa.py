"""TextVQA (arXiv 1904.08920): reading text in photographs, with and without the data set's OCR tokens."""

import dataclasses

from harness.tasks.benchmark import IMAGE, INT, TEXT, TEXTS, Benchmark, read_as, rows_in
from harness.tasks.scoring import EXACT_MATCH

_COLUMNS = {"question_id": INT, "question": TEXT, "answers": TEXTS, "image": IMAGE}
_SINGLE_WORD = "\nAnswer the question using a single word or phrase."


def _without_list(config: dict) -> None:
    """Upstream's prompt with OCR tokens fails on a row that has no list of them."""
    config["doc_to_text"] = read_as(config["doc_to_text"], "ocr_tokens", None, [])


_PLAIN = Benchmark(
    name="textvqa",
    title="TextVQA",
    place=8,
    yaml="textvqa/textvqa_val.yaml",
    files=rows_in("textvqa"),
    columns={"rows": _COLUMNS},
    scoring=EXACT_MATCH,
    documents=5_000,
    images=3_166,
    comparable=False,
    why="prompt without OCR tokens, which the paper's number has",
    upstream_split="validation",
    repository="textvqa",
)
_WITH_OCR = dataclasses.replace(
    _PLAIN,
    name="textvqa_ocr",
    title="TextVQA+OCR",
    place=9,
    columns={"rows": _COLUMNS | {"ocr_tokens": TEXTS}},
    comparable=True,
    why="validation split, the data set's OCR tokens in the prompt",
    overrides={
        "lmms_eval_specific_kwargs": {"default": {"pre_prompt": "", "post_prompt": _SINGLE_WORD, "ocr": True}}
    },
    variant_of="textvqa",
    adapt=_without_list,
)
BENCHMARKS = (_PLAIN, _WITH_OCR)
