"""TextVQA (arXiv 1904.08920): reading text in photographs, with and without the data set's OCR tokens."""

import dataclasses

from harness.drawings import facts
from harness.drawings.drawing import Drawing
from harness.drawings.wording import SHORT_ANSWER, Row, first_fact
from harness.tasks.benchmark import IMAGE, INT, TEXT, TEXTS, Benchmark, read_as, rows_in
from harness.tasks.scoring import EXACT_MATCH

_COLUMNS = {"question_id": INT, "question": TEXT, "answers": TEXTS, "image": IMAGE}
_SINGLE_WORD = "\nAnswer the question using a single word or phrase."


def _without_list(config: dict) -> None:
    """Upstream's prompt with OCR tokens fails on a row that has no list of them."""
    config["doc_to_text"] = read_as(config["doc_to_text"], "ocr_tokens", None, [])


def _row(fact, texts) -> Row:
    question = fact.question.lower()
    return dict(
        question=question,
        question_tokens=question.rstrip("?").split(),
        answers=[fact.answer] * 10,
        ocr_tokens=[text.name.upper() for text in texts],
    )


def _rows(scene, rng, number) -> list[Row]:
    samplers = (facts.read_word, facts.read_word, facts.read_word, facts.read_digit)
    fact = first_fact(scene, rng, samplers)
    return [] if fact is None else [_row(fact, scene.texts)]


def _asked(interview, task, category) -> list[tuple]:
    fact = interview.fact(task, ("read",))
    if fact is None:
        return []
    return [(_row(fact, (thing for thing in interview.scene.things if thing.is_text)), fact)]


_DRAWING = Drawing(
    questions=240,
    per_regime=80,
    rows=_rows,
    asked=_asked,
    identify=lambda row, image, question, position: dict(
        image_id=image, question_id=question, set_name="val"
    ),
    extra=lambda scene: dict(
        image_width=scene.width,
        image_height=scene.height,
        flickr_original_url="",
        flickr_300k_url="",
        image_classes=["Scene"],
    ),
    prompt=lambda row: row["question"].capitalize() + SHORT_ANSWER,
    target=lambda row: row["answers"][0],
)


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
    drawing=_DRAWING,
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
    drawing=None,
    adapt=_without_list,
)
BENCHMARKS = (_PLAIN, _WITH_OCR)
