"""`python -m harness check`: published numbers and our own under watch.

Three questions, each a list of findings: does what was printed follow from what was printed (`registry`,
`costs`), do the files of a run agree with each other (`folder`), and is a run as good as our committed
baseline and as what was published for its backbone (`against`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from methods.errors import UserError

#: committed runs: results/BACKBONE/NAME; results/runs/ is local
RESULTS = Path(__file__).resolve().parents[2] / "results"


def run(
    folders: Sequence[Path],
    baseline: Path | None = None,
    github: bool = False,
    everything: bool = False,
    results: Path = RESULTS,
    say: Callable[[str], None] = print,
) -> int:
    """Check the registry and the run folders (default: the committed ones). Returns 1 if anything fails.

    Raises UserError for a folder or a file that cannot be read.
    """
    from harness import published
    from harness.check import against, costs, findings, folder, registry

    tables = published.load()
    sections = [
        ("Published numbers: what follows from what is printed", registry.findings(tables)),
        ("Published FLOPs against our count", list(costs.findings(tables))),
    ]
    known = committed(results)
    for path in folders or known:
        one = folder.read(path)
        found = [*folder.integrity(one), *against.published(one, tables)]
        earlier = baseline or _baseline_of(one, known)
        title = f"Run {findings.relative(path)} ({one.backbone})"
        if earlier is None:
            title += ": no committed baseline of this backbone"
        elif earlier.resolve() == path.resolve():
            title += ": it is the committed baseline"
        else:
            title += f" against {findings.relative(earlier)}"
            found += against.baseline(one, folder.read(earlier))
        sections.append((title, found))
    for title, found in sections:
        say(f"\n## {title}\n")
        say("\n\n".join(filter(None, (findings.table(found, everything), findings.summary(found)))))
        if github:
            for line in filter(None, map(findings.annotation, found)):
                say(line)
    if not (folders or known):
        say(f"\nno run folder was named, and none is committed below {results}")
    failures = [f for _, found in sections for f in found if f.status == "FAIL"]
    say(f"\n{len(failures)} failures" if failures else "\nno failures")
    return 1 if failures else 0


def committed(results: Path) -> list[Path]:
    """The run folders that are part of the repository."""
    found = [path.parent for path in results.glob("*/*/cells") if path.is_dir()]
    return sorted(path for path in found if path.parent.name != "runs")


def _baseline_of(one, known: Sequence[Path]) -> Path | None:
    """The committed run of the same backbone that shares most cells; the run itself if it is committed."""
    from harness.check import folder

    if any(path.resolve() == one.folder.resolve() for path in known):
        return one.folder
    best, most = None, 0
    for path in known:
        try:
            other = folder.read(path)
        except UserError as error:
            raise UserError(f"the committed baseline is broken: {error}") from error
        shared = len(other.cells.keys() & one.cells.keys()) if other.backbone == one.backbone else 0
        if shared > most:
            best, most = path, shared
    return best
