"""What a check found, and how it is printed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Status = Literal["ok", "known", "skipped", "warning", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """One comparison. where: table row or cell; what: the quantity; found, expected: as printed; note: why.

    status: `known` a discrepancy that the registry records, `skipped` not comparable; only `FAIL` makes the
    exit code 1. path: the file at fault, for annotations.
    """

    status: Status
    where: str
    what: str
    found: str = ""
    expected: str = ""
    note: str = ""
    path: Path | None = None


def table(findings: Iterable[Finding], everything: bool) -> str:
    """The findings as a text table; without `everything`, those that are not ok."""
    from tabulate import tabulate

    shown = [f for f in findings if everything or f.status not in ("ok", "skipped")]
    rows = [[f.status, f.where, f.what, f.found, f.expected, f.note] for f in shown]
    if not rows:
        return ""
    heads = ["", "where", "what", "computed / measured", "stands there", "note"]
    return tabulate(rows, heads, tablefmt="github", disable_numparse=True, maxcolwidths=[None] * 5 + [70])


def summary(findings: Sequence[Finding]) -> str:
    """`31 ok, 7 known, 2 skipped (other data: 2), 1 FAIL`."""
    order = ("ok", "known", "skipped", "warning", "FAIL")
    counts = {status: sum(f.status == status for f in findings) for status in order}
    reasons = Counter(f.note for f in findings if f.status == "skipped")
    why = {"skipped": " (" + "; ".join(f"{reason}: {n}" for reason, n in reasons.items()) + ")"}
    parts = [f"{n} {status}{why.get(status, '')}" for status, n in counts.items() if n]
    return ", ".join(parts) or "nothing to compare"


def annotation(finding: Finding) -> str | None:
    """GitHub's workflow command for a finding; None if it needs none.

    https://docs.github.com/actions/reference/workflow-commands-for-github-actions
    """
    level = {"FAIL": "error", "warning": "warning", "known": "warning"}.get(finding.status)
    if level is None:
        return None
    body = f"{finding.where}, {finding.what}: {finding.found}, not {finding.expected}"
    body += f" ({finding.note})" if finding.note else ""
    place = f"file={_property(relative(finding.path))}," if finding.path else ""
    return f"::{level} {place}title={_property('harness check')}::{_data(body)}"


def relative(path: Path) -> str:
    """Annotations name files from the repository's root."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
