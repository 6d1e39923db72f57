"""What is wrong with a data set's table or its first rows, by the columns that its benchmark reads. The other
columns of the hub's files are not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pyarrow as pa

from harness.tasks.benchmark import ANSWERS, IMAGE, INT, TEXT, TEXTS, Benchmark


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
    TEXT: _is_text,
    INT: pa.types.is_integer,
    TEXTS: lambda kind: _is_list(kind) and _is_text(kind.value_type),
    ANSWERS: _is_answers,
    IMAGE: _is_image,
}


def column_problems(benchmark: Benchmark, role: str, schema: pa.Schema) -> list[str]:
    """What the file's columns lack, one line each."""
    problems = []
    for column, kind in benchmark.columns[role].items():
        if column not in schema.names:
            problems.append(f"column {column} ({kind}) is missing")
        elif not _FITS[kind](found := schema.field(column).type):
            problems.append(f"column {column} is {found}, not a {kind}")
    return problems


def row_problem(benchmark: Benchmark, role: str, row: Mapping) -> str:
    """What is wrong with a row, its image aside, in words; empty if nothing is."""
    for column, kind in benchmark.columns[role].items():
        if kind != IMAGE and row[column] is None and column not in _MAY_BE_EMPTY:
            return f"{column} is empty"
    return benchmark.answer_problem(row) if role == "rows" else ""


#: what the tasks' code takes as absent
_MAY_BE_EMPTY = ("hint", "A", "B", "C", "D", "ocr_tokens", "source")
