"""`python -m harness suite`: is Pocket-8 an instrument that can tell? The acceptance list of its second
version, from committed runs alone."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from harness.report import equal_cost, evidence, numbers, prediction
from harness.store import bundle
from harness.tasks.suites import averaged
from methods.errors import UserError

LOG = logging.getLogger(__name__)
FOLDERS = tuple(Path("results") / "pocket-llava" / name for name in ("full", "default", "blind"))
RESAMPLES = 2000
#: of the acceptance list: percent, points, seconds
VANILLA, EACH, BLIND = 85.0, 75.0, 5.0
NEAR_VANILLA, BELOW_ORACLE, UNTRAINED, COST_AT_192 = 3.0, 15.0, 5.0, 5.0
INDEX, SECONDS = 0.8, 240.0
#: A kind of question that vanilla answers less often than EACH is no evidence, and left out; so many stay.
FEWEST_KINDS = 6
#: what `python -m harness policy --json` said of each shipped policy; of reading the question: points that
#: blanked words cost at least on dense scenes, overlap at most of two questions' choices on one image
POLICIES = Path("results") / "stepprune"
WORDS_COST, SAME_CHOICE = 10.0, 0.6
#: a policy of `python -m harness train stepprune --steps 0 --out untrained.safetensors`, in whatever folder
UNTRAINED_SPEC = re.compile(r"stepprune:checkpoint=(.*/)?untrained(\.safetensors)?")


@dataclass(frozen=True)
class Point:
    """One line of the list. holds: None counts as no: what is needed to tell is missing. counts: False: it is
    only printed beside the others."""

    number: str
    text: str
    holds: bool | None
    counts: bool = True

    def __str__(self) -> str:
        word = {True: "holds", False: "fails", None: "no data"}[self.holds]
        return f"{word:7}  {self.number}  {self.text}{'' if self.counts else ' (beside; does not count)'}"


def run(folders: Sequence[Path]) -> int:
    """Print the list; 0 only if all of it holds."""
    runs = [bundle.read(f) for f in folders or [f for f in FOLDERS if bundle.is_run(f)]]
    found = points(runs) + [p for path in sorted(POLICIES.glob("*/policy_*.json")) for p in reads(path)]
    for point in found:
        LOG.info(str(point))
    counted = [point for point in found if point.counts]
    good = sum(point.holds is True for point in counted)
    LOG.info(f"{good} of {len(counted)} lines hold")
    return 0 if good == len(counted) else 1


def points(runs: Sequence[bundle.Run]) -> list[Point]:
    seeing = [r for r in runs if not _blind(r)]
    frames = [evidence.questions(list(r.cells.values())) for r in seeing]
    found = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
    keys = ["spec", "budget", "task", "row", "kind", "regime"]
    if not found.empty:
        found = found.drop_duplicates(keys, keep="first")
    unseen = [evidence.questions(list(r.cells.values())) for r in runs if _blind(r)]
    unseen = pd.concat(unseen, ignore_index=True) if unseen else pd.DataFrame()
    weak = _weak_kinds(found)
    kept, kept_unseen = (f if f.empty else f[~f["kind"].isin(weak)] for f in (found, unseen))
    return [
        *_first(found, kept, kept_unseen),
        *_second(kept),
        _third(kept),
        *_fourth(seeing),
        _fifth(seeing),
        _sixth(seeing),
    ]


def reads(path: Path) -> list[Point]:
    """Whether a policy reads the question, from what `harness policy --json` found. Raises UserError for a
    file that is none of its."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        blank = found["ways"]["words blanked"]["less_by_regime"].get("dense")
        same = found["pairs"]["one image"]
        name = f"{found['method']} on {found['backbone']} at {found['budget']:g}"
        cost, overlap = blank and blank["mean"], same and same["mean"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not what `python -m harness policy --json` prints ({error!r})") from error
    words = f"{name}: dense, blanked words cost "
    words += "unknown" if cost is None else f"{cost:.1f}"
    choice = f"{name}: two questions on one image share "
    choice += "unknown" if overlap is None else f"{overlap:.2f}"
    return [
        Point("7", f"{words}, at least {WORDS_COST:g} points", None if cost is None else cost >= WORDS_COST),
        Point(
            "7",
            f"{choice} of the choice, at most {SAME_CHOICE:g}",
            None if overlap is None else overlap <= SAME_CHOICE,
        ),
    ]


def _blind(run: bundle.Run) -> bool:
    return any(r.get("data", {}).get("blind") for r in run.cells.values())


def _with_evidence(run: bundle.Run) -> bool:
    return any("recall" in r.get("documents", {}) for r in run.cells.values())


def _mean(values: np.ndarray) -> tuple[float, float, float]:
    """Mean and its 95 % interval over resampled questions."""
    rng = np.random.default_rng(0)
    picks = rng.integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[picks].mean(1), (2.5, 97.5))
    return float(values.mean()), float(low), float(high)


def _said(values: np.ndarray) -> str:
    mean, low, high = _mean(values)
    return f"{mean:.1f} ({low:.1f} to {high:.1f}; {len(values)} questions)"


def _of(found: pd.DataFrame, spec: str, budget: float | None, **where: str) -> pd.DataFrame:
    if found.empty:
        return found
    same = found["budget"].isna() if budget is None else found["budget"] == budget
    own = found[(found["spec"] == spec) & same]
    for column, value in where.items():
        own = own[own[column] == value]
    return own


def _missing(number: str, what: str) -> Point:
    return Point(
        number, f"{what}: no run on data with evidence has it (Pocket-8 version 2, its weights)", None
    )


def _weak_kinds(found: pd.DataFrame) -> list[str]:
    own = _of(found, "vanilla", None)
    means = own.groupby("kind")["score"].mean() if len(own) else pd.Series(dtype=float)
    return list(means.index[means < EACH])


def _first(found: pd.DataFrame, kept: pd.DataFrame, unseen: pd.DataFrame) -> list[Point]:
    """found: all questions. kept, unseen: without the kinds that are left out."""
    own, rest = _of(found, "vanilla", None), _of(kept, "vanilla", None)
    if own.empty:
        listed = [_missing("1a", "vanilla over the tasks"), _missing("1b", "vanilla by regime and kind")]
    else:
        tasks = own.groupby("task")["score"].mean()
        number = own["kind"].nunique()
        kinds = rest["kind"].nunique()
        listed = [
            Point(
                "1a",
                f"vanilla over the tasks: {tasks.mean():.1f}, at least {VANILLA:g}",
                bool(tasks.mean() >= VANILLA),
            ),
            Point(
                "1b",
                f"kinds of questions kept: {kinds} of {number}, at least {FEWEST_KINDS}",
                kinds >= FEWEST_KINDS,
            ),
        ]
        for name, rows in rest.groupby("regime"):
            text = f"vanilla, regime {name}: {_said(rows['score'].to_numpy())}, at least {EACH:g}"
            listed.append(Point("1b", text, bool(rows["score"].mean() >= EACH)))
        for name, rows in own.groupby("kind"):
            good = bool(rows["score"].mean() >= EACH)
            text = f"vanilla, kind {name}: {_said(rows['score'].to_numpy())}, at least {EACH:g}"
            listed.append(Point("1b", text + "; left out of everything below" * (not good), good, good))
    if unseen.empty:
        return [*listed, _missing("1c", "blind")]
    above = (unseen["score"] - unseen["chance"]).to_numpy()
    text = f"blind above chance: {_said(above)}, at most {BLIND:g}"
    return [*listed, Point("1c", text, bool(abs(above.mean()) <= BLIND))]


def _difference(found: pd.DataFrame, a: tuple, b: tuple, **where: str) -> np.ndarray | None:
    """Score of a less that of b on the questions that both were asked."""
    left, right = (_of(found, *one, **where) for one in (a, b))
    if left.empty or right.empty:
        return None
    both = left.merge(right, on=["task", "row"])
    return (both["score_x"] - both["score_y"]).to_numpy() if len(both) else None


def _second(found: pd.DataFrame) -> list[Point]:
    specs = sorted(set(found["spec"])) if len(found) else []
    untrained = next(filter(UNTRAINED_SPEC.fullmatch, specs), "")
    listed = []
    for budget in (64, 32):
        named = (
            ("vanilla less oracle", ("vanilla", None), ("oracle", budget), "at most", NEAR_VANILLA),
            ("oracle less things", ("oracle", budget), ("things", budget), "at least", BELOW_ORACLE),
            ("oracle less uniform", ("oracle", budget), ("uniform", budget), "at least", BELOW_ORACLE),
            (
                "untrained StepPrune less random",
                (untrained, budget),
                ("random", budget),
                "at most",
                UNTRAINED,
            ),
        )
        for what, a, b, sense, bound in named:
            own = _difference(found, a, b, regime="dense")
            number = f"2, {budget} tokens"
            if own is None:
                listed.append(_missing(number, f"dense, {what}"))
                continue
            good = own.mean() <= bound if sense == "at most" else own.mean() >= bound
            text = f"dense, {what}: {_said(own)}, {sense} {bound:g}"
            listed.append(Point(number, text, bool(good), counts=budget == 64))
    return [point for point in listed if point.holds is not None or "64" in point.number]


def _third(found: pd.DataFrame) -> Point:
    own = _difference(found, ("vanilla", None), ("random", 192))
    if own is None:
        return _missing("3", "vanilla less random at 192")
    text = f"vanilla less random at 192: {_said(own)}, at least {COST_AT_192:g}"
    return Point("3", text, bool(own.mean() >= COST_AT_192))


def _fourth(runs: Sequence[bundle.Run]) -> list[Point]:
    listed = []
    for budget in (64, 128):
        candidates = [one for run in runs for one in _indices(run, budget)]
        for reading in ("as published", "default"):
            own = max(
                (c for c in candidates if c.reading == reading), key=lambda c: len(c.methods), default=None
            )
            if own is None or not math.isfinite(own.rho):
                listed.append(Point("4", f"prediction index, {reading}, {budget} tokens: no rows", None))
            else:
                enough = len(own.methods) >= 10
                text = f"prediction index, {own}; at least {INDEX:g} over at least 10 rows"
                listed.append(Point("4", text, bool(enough and own.rho >= INDEX)))
    return listed


def _indices(run: bundle.Run, budget: float) -> list[prediction.Index]:
    done = {a: r for a, r in run.cells.items() if r["status"] == "done"}
    tasks = averaged(dict.fromkeys(task for task, *_ in done))
    seed = next(iter(done.values()))["seed"] if done else 0
    means = numbers.averages(done, tasks, seed)
    rows = []
    for (spec, own), average in means.items():
        layers = [
            r["visual_tokens"]["mean_over_layers"] for (_, s, b), r in done.items() if (s, b) == (spec, own)
        ]
        if own == budget and average.point is not None:
            rows.append(
                {"spec": spec, "budget": own, "average": average.point, "mean_over_layers": np.mean(layers)}
            )
    return [prediction.index(rows, budget, reading) for reading in ("as published", "default")]


def _fifth(runs: Sequence[bundle.Run]) -> Point:
    """The equal-cost table beside a leaderboard on data with evidence; it says of a row where it cannot be
    had."""
    for run in runs:
        table = run.folder / f"{equal_cost.NAME}.csv"
        if table.is_file() and _with_evidence(run):
            rows = pd.read_csv(table)
            return Point("5", f"equal-cost table (--match flops) of {len(rows)} rows in {run.folder}", True)
    return _missing("5", "the equal-cost table (--match flops)")


def _sixth(runs: Sequence[bundle.Run]) -> Point:
    """Seconds that answering took; loading, scoring and timing come on top."""
    for run in runs:
        if run.folder.name == "default" and _with_evidence(run):
            spent = sum(r["run"]["seconds"] for r in run.cells.values() if r["status"] == "done")
            text = f"the default run's answers took {spent:.0f} s, at most {SECONDS:g} for all of it"
            return Point("6", text, bool(spent <= SECONDS))
    return _missing("6", "the default run's time")
