"""The columns that the tasks read, and what is wrong with a table or its first rows. One place for the data
sets' schemas; the other columns of the hub's files are not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pyarrow as pa

from harness.tasks.suites import Benchmark

_TEXT, _INT, _TEXTS, _IMAGE, _ANSWERS = "text", "whole number", "list of texts", "image", "list of answers"
_MMBENCH = {
    "index": _INT, "question": _TEXT, "hint": _TEXT, "A": _TEXT, "B": _TEXT, "C": _TEXT, "D": _TEXT,
    "answer": _TEXT, "category": _TEXT, "L2-category": _TEXT, "source": _TEXT, "split": _TEXT,
    "image": _IMAGE,
}  # fmt: skip
#: by benchmark, then by role of the file: column -> kind
COLUMNS: dict[str, dict[str, dict[str, str]]] = {
    "gqa": {
        "rows": {"imageId": _TEXT, "question": _TEXT, "answer": _TEXT},
        "images": {"id": _TEXT, "image": _IMAGE},
    },
    "mmbench_en": {"rows": _MMBENCH},
    "mmbench_cn": {"rows": _MMBENCH},
    "mme": {
        "rows": dict.fromkeys(("question_id", "question", "answer", "category"), _TEXT) | {"image": _IMAGE}
    },
    "pope": {
        "rows": dict.fromkeys(("question_id", "question", "answer", "category"), _TEXT) | {"image": _IMAGE}
    },
    "scienceqa": {
        "rows": {"question": _TEXT, "choices": _TEXTS, "answer": _INT, "hint": _TEXT, "image": _IMAGE}
    },
    "vqav2": {"rows": {"question_id": _INT, "question": _TEXT, "answers": _ANSWERS, "image": _IMAGE}},
    "textvqa": {"rows": {"question_id": _INT, "question": _TEXT, "answers": _TEXTS, "image": _IMAGE}},
}
COLUMNS["textvqa_ocr"] = {"rows": COLUMNS["textvqa"]["rows"] | {"ocr_tokens": _TEXTS}}


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _is_answers(kind: pa.DataType) -> bool:
    if not _is_list(kind) or not pa.types.is_struct(kind.value_type):
        return False
    return kind.value_type.get_field_index("answer") >= 0


def _is_image(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and {kind.field(i).name for i in range(kind.num_fields)} >= {"bytes"}


_FITS: dict[str, Callable[[pa.DataType], bool]] = {
    _TEXT: _is_text,
    _INT: pa.types.is_integer,
    _TEXTS: lambda kind: _is_list(kind) and _is_text(kind.value_type),
    _ANSWERS: _is_answers,
    _IMAGE: _is_image,
}


def column_problems(benchmark: Benchmark, role: str, schema: pa.Schema) -> list[str]:
    """What the file's columns lack, one line each."""
    problems = []
    for column, kind in COLUMNS[benchmark.name][role].items():
        if column not in schema.names:
            problems.append(f"column {column} ({kind}) is missing")
        elif not _FITS[kind](found := schema.field(column).type):
            problems.append(f"column {column} is {found}, not a {kind}")
    return problems


def row_problems(benchmark: Benchmark, role: str, rows: Sequence[Mapping]) -> list[str]:
    """What is wrong with rows whose images are stored bytes ({"bytes", "path"}), one line each."""
    problems = []
    for number, row in enumerate(rows):
        for column, kind in COLUMNS[benchmark.name][role].items():
            if kind == _IMAGE:
                if problem := image_problem(row[column]):
                    problems.append(f"row {number}: {problem}")
            elif row[column] is None and column not in _MAY_BE_EMPTY:
                problems.append(f"row {number}: {column} is empty")
        if role == "rows" and not problems and (problem := _ANSWER.get(benchmark.name, _nothing)(row)):
            problems.append(f"row {number}: {problem}")
    return problems


#: what the tasks' code takes as absent
_MAY_BE_EMPTY = ("hint", "A", "B", "C", "D", "ocr_tokens", "source")


def image_problem(stored: Mapping | None) -> str:
    """Empty if the image can be decoded."""
    import io

    from PIL import Image

    if not stored or not stored.get("bytes"):
        return "no image"
    try:
        with Image.open(io.BytesIO(stored["bytes"])) as image:
            image.convert("RGB")
    except Exception as error:  # PIL raises many kinds
        return f"the image cannot be decoded ({type(error).__name__})"
    return ""


def _nothing(row: Mapping) -> str:
    return ""


def _yes_no(row: Mapping) -> str:
    said = row["answer"].lower().strip().replace(".", "")
    return "" if said in ("yes", "no") else f"answer {row['answer']!r} is neither yes nor no"


def _letter(row: Mapping) -> str:
    right = row["answer"]
    return "" if right in "ABCD" and row.get(right) not in (None, "nan") else f"answer {right!r} is no option"


def _choice(row: Mapping) -> str:
    inside = 0 <= row["answer"] < len(row["choices"])
    return "" if inside else f"answer {row['answer']} of {len(row['choices'])} choices"


_ANSWER: dict[str, Callable[[Mapping], str]] = {
    "mme": _yes_no,
    "pope": _yes_no,
    "mmbench_en": _letter,
    "mmbench_cn": _letter,
    "scienceqa": _choice,
}
