"""Tables as text: Markdown for files, narrow ones for a terminal. The only place that renders them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pandas import DataFrame

MISSING = "–"
#: columns of a terminal
WIDTH = 100
#: an absolute path, or one of a home folder, with at least two parts; addresses (https://...) are none
_PATH = re.compile(r"(?<![\w.:/~-])(?:~|[A-Za-z]:(?=[\\/]))?(?:[\\/][^\s\\/|,;:<>\"'`*?()]+){2,}[\\/]?")
_SEPARATOR = re.compile(r"[\\/]")


def markdown(rows: Sequence[Mapping[str, object]], left: int = 1) -> str:
    """A Markdown table. rows: one mapping per row; the keys of all are the heads, and what a row lacks is
    MISSING. The first `left` columns are aligned to the left, the others to the right. What a cell holds is
    text: `escaped`."""
    from tabulate import tabulate

    heads = list(dict.fromkeys(head for row in rows for head in row))
    body = [[escaped(row.get(head, MISSING)) for head in heads] for row in rows]
    align = ["left" if place < left else "right" for place in range(len(heads))]
    return tabulate(
        body, [escaped(h) for h in heads], tablefmt="github", disable_numparse=True, colalign=align
    )


def plain(rows: Sequence[Mapping[str, str]], width: int = WIDTH, rules: Iterable[int] = ()) -> str:
    """A table for a terminal, at most `width` columns wide: the first column is shortened where it must be.
    rules: numbers of the rows that a line is drawn above."""
    heads = list(rows[0])
    widths = {h: max(len(h), *(len(r[h]) for r in rows)) for h in heads}
    first = heads[0]
    widths[first] = max(8, min(widths[first], width - sum(widths[h] + 2 for h in heads[1:])))
    lines = ["  ".join(_fitted(h, widths[h], h != first) for h in heads).rstrip()]
    rules = {0, *rules}
    for number, row in enumerate(rows):
        if number in rules:
            lines.append("  ".join("-" * widths[h] for h in heads))
        lines.append("  ".join(_fitted(row[h], widths[h], h != first) for h in heads).rstrip())
    return "\n".join(lines)


def column(rows: DataFrame, name: str, form: str, scale: float = 1.0) -> list[str]:
    """A column of numbers as text; MISSING where there is none, or no such column."""
    from pandas import isna

    values = rows[name] if name in rows else [math.nan] * len(rows)
    return [MISSING if isna(v) else format(v * scale, form) for v in values]


def joined(pattern: str, *columns: list[str]) -> list[str]:
    """Columns as one; MISSING where one of them is."""
    return [MISSING if MISSING in values else pattern.format(*values) for values in zip(*columns)]


def means(rows: DataFrame) -> dict[str, list[str]]:
    """The average, its interval, and the letters of what cannot be told apart, of rows of `numbers.build`."""
    low, high = (column(rows, name, ".1f") for name in ("average_low", "average_high"))
    return {
        "Avg. %": column(rows, "average", ".1f"),
        "95 % interval": joined("{}–{}", low, high),
        "group": [letters or MISSING for letters in rows["group"]],
    }


def as_rows(columns: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    """What `markdown` and `plain` take, from columns by head."""
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


def _fitted(text: str, width: int, right: bool) -> str:
    if len(text) > width:
        text = text[: width - 1] + "…"
    return text.rjust(width) if right else text.ljust(width)


def escaped(value: object) -> str:
    """A value as text of a Markdown table: nothing in it is markup, and no path names somebody's machine."""
    text = without_paths(" ".join(str(value).split()))
    for sign, instead in (("\\", "\\\\"), ("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|")):
        text = text.replace(sign, instead)
    return text


def unescaped(text: str) -> str:
    """What `escaped` was given, but for paths and runs of spaces."""
    for sign, instead in (("|", "\\|"), (">", "&gt;"), ("<", "&lt;"), ("&", "&amp;"), ("\\", "\\\\")):
        text = text.replace(instead, sign)
    return text.strip()


def without_paths(text: str) -> str:
    """The text with absolute paths cut down to their last part."""
    return _PATH.sub(lambda found: _last(found[0]), text)


def _last(path: str) -> str:
    return [part for part in _SEPARATOR.split(path) if part][-1]


def labels(specs: Iterable[str]) -> dict[str, str]:
    """What tables call a method: its spec, with the name alone for each file that it names. Where two specs
    would be called the same, as much of the paths as tells them apart."""
    specs = list(dict.fromkeys(specs))
    found: dict[str, str] = {}
    for depth in range(1, 64):
        short = {spec: _shortened(spec, depth) for spec in specs if spec not in found}
        taken = list(short.values())
        found |= {spec: label for spec, label in short.items() if taken.count(label) == 1}
        if len(found) == len(specs):
            break
    return {spec: found.get(spec, spec) for spec in specs}


def _shortened(spec: str, depth: int) -> str:
    """The spec with the last `depth` parts of each path among its parameters."""
    name, colon, parameters = spec.partition(":")
    pieces = []
    for piece in parameters.split(",") if colon else ():
        key, equals, value = piece.partition("=")
        parts = [p for p in PurePosixPath(value.replace("\\", "/")).parts if p not in ("/", "..", "~")]
        pieces.append(f"{key}{equals}{'/'.join(parts[-depth:])}" if _SEPARATOR.search(value) else piece)
    return name + colon + ",".join(pieces)
