"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

OK, NOTE, MISSING = "ok", "note", "MISSING"


@dataclass(frozen=True)
class Diagnosis:
    """level: ok; note (the run starts, but read this); MISSING (it cannot start). fix: the command or change
    that helps."""

    level: Literal["ok", "note", "MISSING"]
    what: str
    text: str
    fix: str = ""

    def __str__(self) -> str:
        line = f"{self.level:7}  {self.what}: {self.text}"
        return line + (f"\n         fix: {self.fix}" if self.fix else "")


def from_error(what: str, error: Exception) -> Diagnosis:
    """A UserError as a finding: what follows "get it with:" is the fix."""
    text, _, fix = " ".join(str(error).split()).partition("; get it with: ")
    return Diagnosis(MISSING, what, text, fix)
