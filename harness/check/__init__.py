"""`python -m harness check`: published numbers and our own under watch.

Three questions, each a list of findings: does what was printed follow from what was printed (`registry`,
`costs`), do the files of a run agree with each other (`folder`), and is a run as good as our committed
baseline and as what was published for its backbone (`against`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from methods.errors import UserError

LOG = logging.getLogger(__name__)
#: committed runs: results/BACKBONE/NAME; results/runs/ is local
RESULTS = Path(__file__).resolve().parents[2] / "results"


def run(
    folders: Sequence[Path],
    baseline: Path | None = None,
    github: bool = False,
    everything: bool = False,
    results: Path = RESULTS,
    own: Path | None = None,
    partial: bool = False,
) -> int:
    """Check run folders and bundles; without any, the committed ones, and the published tables among
    themselves. Returns 1 if anything fails.

    own: a file of the user's own published numbers, that the runs are held against in place of the paper's.
    partial: what the baseline has and a run lacks is no failure.
    Raises UserError for a folder or a file that cannot be read, before anything is counted.
    """
    from harness import published
    from harness.check import against, findings, folder, registry
    from harness.store import bundle

    tables = published.load() if own is None else published.load_with(own)
    names = () if own is None else (own.stem,)
    known = committed(results)
    runs = {path.resolve(): folder.read(path) for path in folders or known}
    if baseline is not None and baseline.resolve() not in runs:
        runs[baseline.resolve()] = folder.read(baseline, whole=True)
    sections: list[tuple[str, list]] = []
    if not folders or own is not None:
        found = registry.findings(tables)
        if own is not None:
            found = [f for f in found if f.path == tables.path_of(own.stem)]
        sections.append(("Published numbers: what follows from what is printed", found))
    if not folders:
        from harness.check import costs

        sections.append(("Published FLOPs against our count", list(costs.findings(tables))))
    for path in folders or known:
        one = runs[path.resolve()]
        found = [*folder.integrity(one), *against.published(one, tables, names)]
        earlier = baseline or _baseline_of(one, known, runs)
        title = f"{'Run' if one.header is None else 'Bundle'} {findings.relative(path)} ({one.backbone})"
        if earlier is None:
            title += ": no committed baseline of this backbone"
        elif earlier.resolve() == path.resolve():
            title += ": it is the committed baseline"
        else:
            title += f" against {findings.relative(earlier)}"
            found += against.baseline(one, runs[earlier.resolve()])
        if partial:
            found = [f for f in found if not against.is_lacking(f)]
        if one.header is not None:
            title += f"\n\nProvenance: {bundle.provenance(one.header)}."
        sections.append((title, found))
    for title, found in sections:
        LOG.info(f"\n## {title}\n")
        LOG.info("\n\n".join(filter(None, (findings.table(found, everything), findings.summary(found)))))
        if title.startswith("Published numbers") and (line := registry.count(found)):
            LOG.info(line)
        if github:
            for line in filter(None, map(findings.annotation, found)):
                LOG.info(line)
    if not (folders or known):
        LOG.info(f"\nno run folder was named, and none is committed below {results}")
    failures = [f for _, found in sections for f in found if f.status == "FAIL"]
    LOG.info(f"\n{len(failures)} failures" if failures else "\nno failures")
    return 1 if failures else 0


def committed(results: Path) -> list[Path]:
    """The runs that are part of the repository, as bundles or folders."""
    from harness.store import bundle

    found = [path for path in results.glob("*/*") if bundle.is_run(path)]
    return sorted(path for path in found if path.parent.name != "runs")


def _baseline_of(one, known: Sequence[Path], runs: dict) -> Path | None:
    """The committed run of the same backbone that shares most cells; the run itself if it is committed."""
    from harness.check import folder
    from harness.store import bundle

    if any(path.resolve() == one.folder.resolve() for path in known):
        return one.folder
    best, most = None, 0
    for path in known:
        if path.resolve() not in runs:
            if bundle.backbone_of(path) not in (None, Path(one.backbone).name):
                continue
            try:
                runs[path.resolve()] = folder.read(path, whole=True)
            except UserError as error:
                raise UserError(f"the committed baseline is broken: {error}") from error
        other = runs[path.resolve()]
        blind = [next(iter(r.cells.values()))["data"].get("blind") for r in (one, other) if _has_data(r)]
        alike = other.backbone == one.backbone and len(set(blind)) < 2
        shared = len(other.cells.keys() & one.cells.keys()) if alike else 0
        if shared > most:
            best, most = path, shared
    return best


def _has_data(run) -> bool:
    return "data" in next(iter(run.cells.values()))
