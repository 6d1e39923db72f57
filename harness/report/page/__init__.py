"""The page of a run: `index.html`, one file that opens from the disk, offline.

`build` gathers what the page shows as one JSON document (the element `#data` of the page; `harness check`
recomputes its numbers), `write` fills the template. Nothing is fetched; text from data sets and method names
stands in JSON or in escaped text, never in markup.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from harness.store import atomic

#: longest side of an embedded picture, pixels
SIDE = 336
#: an answer's score from which it counts as right
RIGHT = 0.5


@dataclass(frozen=True)
class Explored:
    """One question of the explorer.

    Attributes:
        id: task and row in its file; stable over runs.
        task: the benchmark's name.
        task_title: head of its column.
        text: as the model is asked.
        target: the right answer.
        image: PIL image, RGB.
        grid: rows and columns of visual tokens.
        regime: of the scene, "" where the data does not say.
        kind: of the question, "" where the data does not say.
        evidence: visual tokens that hold the answer.
        answers: by method: text, score (0 to 1), kept (places; None: not known, or everything), tokens (their
            number in the last layer), ordered (kept is in the order of choice), merged (`Answer.merged`).
    """

    id: str
    task: str
    task_title: str
    text: str
    target: str
    image: object
    grid: tuple[int, int]
    regime: str = ""
    kind: str = ""
    evidence: Sequence[int] = ()
    answers: dict[str, dict] = field(default_factory=dict)


def hard(scores: Mapping[str, Sequence[float]], vanilla: Sequence[float], reduced: Sequence[float]) -> dict:
    """Accuracy on hard questions, by method: % right of those that vanilla has right and downsampling to the
    same budget has wrong (after VTC-Bench, arXiv 2510.07143). {} if there is no such question.

    Args:
        scores: by method, each question's score, 0 to 1.
        vanilla: the same of the unpruned model.
        reduced: the same of `downsample` at the budget.
    """
    chosen = [i for i, (v, d) in enumerate(zip(vanilla, reduced)) if v >= RIGHT and d < RIGHT]
    if not chosen:
        return {}
    return {m: 100 * sum(s[i] >= RIGHT for i in chosen) / len(chosen) for m, s in scores.items()}


def build(
    title: str,
    table: pd.DataFrame,
    tasks: Sequence[Mapping[str, str]],
    labels: Mapping[float, str],
    roles: Mapping[str, tuple[str, str, str]],
    pairs: Mapping[float, Mapping] | None = None,
    questions: Sequence[Explored] = (),
    asked: int | None = None,
) -> dict:
    """The page's data.

    Args:
        title: of the page.
        table: the leaderboard's rows (`harness.report.numbers.build`).
        tasks: name, title and group (task, regime, kind) of each further column that can be chosen.
        labels: of each budget.
        roles: by method spec: role (reference, method, control, answer key), where it acts (before, inside,
            none), its footnote.
        pairs: by budget: methods, and cells[i][j] = [difference, low, high, p, significant] or None.
        questions: of the explorer.
        asked: questions of the whole run.
    """
    blocks = []
    for budget, rows in table.groupby("block", sort=False):
        entries = [_row(row, roles) for row in rows.to_dict("records")]
        blocks.append(
            {"budget": budget, "label": labels[budget], "rows": entries, "pairs": (pairs or {}).get(budget)}
        )
    pictures: dict[str, int] = {}  # several questions may be about one
    shown = [
        {
            **vars(q),
            "evidence": list(q.evidence),
            "answers": {
                method: {**a, "kept": packed(a["kept"]), "merged": packed(a["merged"])}
                for method, a in q.answers.items()
            },
            "image": pictures.setdefault(picture(q.image), len(pictures)),
        }
        for q in questions
    ]
    return {
        "title": title,
        "columns": [dict(t) for t in tasks],
        "blocks": blocks,
        "pictures": list(pictures),
        "questions": shown,
        "asked": len(shown) if asked is None else asked,
    }


#: what of a row is no number
_WORDS = ("block", "method", "kind", "spec", "failed", "no_average", "group", "other_code")


def _row(row: Mapping, roles: Mapping) -> dict:
    """The numbers under their names in leaderboard.csv, which `harness check` compares, and what is said of
    the method."""
    role, where, note = roles[row["method"]]
    return {
        "method": row["method"],
        "role": role,
        "where": where,
        "note": note,
        "group": row.get("group") or None,
        "failed": list(row.get("failed") or []),
        **{str(name): _number(value) for name, value in row.items() if name not in _WORDS},
    }


def _number(value: object) -> float | None:
    """A finite float, or None."""
    if value is None or isinstance(value, str):
        return None
    return float(value) if math.isfinite(value) else None


def picture(image) -> str:
    """A PIL image as a data URI, WebP (a third of a JPEG), scaled down to at most SIDE."""
    small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    data = io.BytesIO()
    small.save(data, "WEBP", quality=40, method=6)
    return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()


def packed(places: Sequence[int] | None) -> str | None:
    """Places as text, half as long as a list in JSON: a digit, and so many characters for each place: its
    number in base 36, or dots for one below 0. None for None."""
    if places is None:
        return None
    width = len(np.base_repr(max([0, *places]), 36))
    numbers = (np.base_repr(p, 36).lower().zfill(width) if p >= 0 else "." * width for p in places)
    return f"{width}{''.join(numbers)}"


def as_json(data: Mapping) -> str:
    """JSON that may stand inside a script element: no `<`, so no `</script>` and no `<!--`."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace(
        "<", "\\u003c"
    )


def write(
    path: Path,
    data: Mapping,
    caption: Iterable[str],
    lead: str,
    footer: str,
    published: Mapping | None = None,
) -> Path:
    """Fill the template and write the page.

    Args:
        path: of the file.
        data: see `build`.
        caption: how it was measured, a line each, plain text.
        lead: one sentence under the title.
        footer: versions and date.
        published: the section on published numbers (`lineage.section`); None: there is none.
    """
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("harness.report", "page"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    here = Path(__file__).parent
    html = environment.get_template("page.html.j2").render(
        title=data["title"],
        lead=lead,
        caption=list(caption),
        footer=footer,
        published=published,
        has_questions=bool(data["questions"]),
        has_regimes=any(q["regime"] for q in data["questions"]),
        style=Markup((here / "page.css").read_text(encoding="utf-8")),
        script=Markup((here / "page.js").read_text(encoding="utf-8")),
        data=Markup(as_json(data)),
    )
    atomic.replace(path, html.encode())
    return path
