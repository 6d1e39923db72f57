"""`python -m harness policy`: what a learned method does with the question, and with its steps.

The method answers held-out questions as it is, with its prompt's words blanked or another question's, and, if
it takes its tokens step by step, with as many tokens chosen without the steps (`methods.stepprune.controls`).
All of them see the same questions, so that differences are paired. Intervals are 95 %, percentile bootstrap
over images (`harness.tasks.bootstrap`); those of rank correlations over questions, as in `adaptive`.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from harness.report import adaptive, tables
from harness.report.tables import MISSING
from harness.run.config import Budget, RunConfig, build_pruner
from harness.run.session import Session
from harness.store import records
from harness.tasks.benchmark import Benchmark
from harness.tasks.bootstrap import FEWEST_CLUSTERS, Units, interval
from harness.tasks.suites import POCKET8
from methods import learned, registry
from methods.base import Pruner
from methods.errors import UserError
from methods.stepprune.controls import FIRST

#: the question goes in, as the text of the prompt and its word embeddings [T, D]; what the method reads, out
Words = Callable[[str, Tensor], Tensor]

VANILLA, OWN, BLANK, OTHER = "nothing pruned", "as it is", "words blanked", "another's words"
#: held-out images on which the untrained policy is given the trained one's mean K
CALIBRATED_ON = 16


@dataclass(frozen=True, kw_only=True)
class PolicyOptions:
    """What `policy` takes. budget: None: the mean that the checkpoint was trained for, or 64. The rest as in
    `RunConfig`; split: of the data's files."""

    benchmarks: tuple[Benchmark, ...]
    method: str = "stepprune"
    backbone: str = RunConfig.backbone
    budget: Budget | None = None
    data: Path | None = None
    split: str = "calibration"
    limit: int | None = None
    batch_size: int = RunConfig.batch_size
    device: str = RunConfig.device


def run(options: PolicyOptions, as_json: bool) -> int:
    """Print what `measure` found."""
    found = measure(options)
    print(json.dumps(found, indent=1) if as_json else render(found))
    return 0


def measure(options: PolicyOptions) -> dict[str, object]:
    """The figures, JSON-able (`described` says which). Raises UserError as `Session` does."""
    budget = options.budget or _trained_for(options.method)
    config = RunConfig(
        benchmarks=options.benchmarks,
        out=Path(),
        budgets=(budget,),
        methods=(options.method,),
        backbone=options.backbone,
        suite=replace(POCKET8, split=options.split),
        data=options.data,
        limit=options.limit,
        batch_size=options.batch_size,
        device=options.device,
        explore=1 << 31,  # every answer says which tokens were kept
    )
    session = Session(config)
    method = session.methods[-1]
    if method.budget is None:
        raise UserError("--method vanilla: name a method that chooses tokens")
    table, most = ask(session)
    return {
        "schema_version": records.SCHEMA_VERSION,
        "kind": "policy",
        "git_commit": records.git_commit(),
        "backbone": Path(options.backbone).name,
        "method": tables.labels([method.spec])[method.spec],
        "budget": budget,
        "weights": method.parameters.get("weights"),
        "split": options.split,
        "data": {d.benchmark.name: d.digest for d in session.documents},
        "most_steps": most,
        **described(table, most),
    }


def _trained_for(spec: str) -> int:
    """The mean that a spec's checkpoint was trained for; the default budget for a shipped one."""
    from methods.stepprune import checkpoint as checkpoints

    pruner = registry.build(spec)
    path, tokens = pruner.parameters().get("checkpoint"), None
    if path is not None:
        tokens = checkpoints.read(Path(str(path)), learned.find(pruner.name).kind()).tokens
    return RunConfig.budgets[0] if tokens is None else round(tokens)


# ---- asking


def ask(session: Session) -> tuple[pd.DataFrame, int | None]:
    """Every question answered in every way: one row each, columns as `_rows` has them and `way`; and K_max of
    a method that has one."""
    method, frames = session.methods[-1], []
    plain, words = build_pruner(method), {}
    own = _told(plain, words.setdefault) if plain.reads_text else plain  # notes what it reads
    about = learned.find(own.name) if own.name in learned.names() else None
    controls = about.controls(own, lambda: _held_out(session.backbone, own)) if about else {}
    for documents in session.documents:
        texts = [request.args[0] for request in session.task(documents).instances]
        words.clear()
        first = {VANILLA: build_pruner(session.methods[0]), OWN: own}
        more = {**_other_words(plain, words, texts), **controls}
        for ways in (first, more):  # another's words have to be known first
            frames += [f.assign(way=way) for way, f in _answered(session, documents, ways).items()]
    return pd.concat(frames, ignore_index=True), about.most_tokens(own) if about else None


def _other_words(pruner: Pruner, words: Mapping[str, Tensor], texts: Sequence[str]) -> dict[str, Pruner]:
    """The method with its words changed; nothing where it reads none."""
    if not pruner.reads_text:
        return {}
    swapped = _swapped(texts)
    return {
        BLANK: _told(pruner, lambda text, read: torch.zeros_like(read)),
        OTHER: _told(pruner, lambda text, read: words[swapped[text]]),
    }


def _told(pruner: Pruner, change: Words) -> Pruner:
    """One with the same settings that reads what `change` makes of the words."""

    class Told(type(pruner)):
        reads_question = True

        def select_all(self, images):
            return super().select_all(
                [replace(image, text=change(image.question, image.text)) for image in images]
            )

    return Told(budget=pruner.budget, **pruner.parameters())


def _swapped(texts: Sequence[str]) -> dict[str, str]:
    """For each text another one of them, at random; itself where it is the only one."""
    distinct = sorted(set(texts))
    order = [distinct[i] for i in np.random.default_rng(0).permutation(len(distinct))]
    return dict(zip(order, [*order[1:], order[0]]))


def _held_out(backbone, pruner: Pruner) -> tuple[object, list]:
    """The frozen model and held-out batches, for `Learned.controls`; the pruner is made ready for it."""
    from harness.pocket.supplies import PocketSupplies
    from methods.stepprune.training.data import held_out
    from methods.stepprune.training.objective import FrozenModel

    pruner.prepare(backbone.model)
    frozen = FrozenModel(backbone.model, backbone.adapter)
    return frozen, list(held_out(PocketSupplies().held_out(backbone), backbone, frozen, CALIBRATED_ON))


def _answered(session: Session, documents, ways: Mapping[str, object]) -> dict[str, pd.DataFrame]:
    """One task's questions in several ways, each as `_rows`. Raises what answering raised."""
    from harness.run.score_cell import evaluate
    from harness.run.sweep import SweepEntry, answer_all
    from harness.store.journal import Journal

    task, cell = session.task(documents), next(c for c in session.cells if c.benchmark is documents.benchmark)
    with tempfile.TemporaryDirectory() as folder:
        entries = []
        for number, pruner in enumerate(ways.values()):
            key = f"{cell.answers_key}-{number}"
            journal = Journal(Path(folder) / f"way_{key}.jsonl")
            entries.append(SweepEntry(cell, session.model(documents, pruner, journal, key)))
        answer_all(session.backbone, task, entries, session.config.batch_size, time.perf_counter)
        found = {}
        for way, entry in zip(ways, entries):
            if entry.report.error:
                raise RuntimeError(f"{way}: {entry.report.error}")
            score, _ = evaluate(task, entry.model, documents)
            found[way] = _rows(documents, task, entry.model, score.documents)
    return found


def _rows(documents, task, model, scores: Sequence[float]) -> pd.DataFrame:
    """One row per question: task, row, text, image, right (0 to 1), kept (frozenset of the tokens left),
    tokens (of the image), recall, things, evidence (its size in tokens), regime, background; None or nan
    for what the data does not tell."""
    from harness.tasks import evidence
    from methods.views import cells

    questions = [model.question(request) for request in task.instances]
    answers = [model.journal.answers[q.row, q.prompt] for q in questions]
    hints, sizes = documents.hints or [None] * len(answers), documents.sizes
    scenes = [_scene(name) for name in documents.image_names]
    rows = []
    for q, answer, hint, size, scene, right in zip(questions, answers, hints, sizes, scenes, scores):
        grid = evidence.grid_of(answer.image_tokens, *size)
        rows.append(
            {
                "task": documents.benchmark.name,
                "row": q.row,
                "text": q.text,
                "image": q.image,
                "right": float(right),
                "kept": None if answer.kept is None else frozenset(answer.kept),
                "K": answer.visual_tokens[-1],
                "tokens": answer.image_tokens,
                "recall": None if hint is None else evidence.recall(hint, answer, *size),
                "things": getattr(scene, "things", None) and len(getattr(scene, "alone", scene.things)),
                "evidence": None if hint is None else int(cells(hint.evidence, *grid).sum()),
                "regime": getattr(scene, "regime", None),
                "background": getattr(scene, "background", None),
            }
        )
    return pd.DataFrame(rows)


def _scene(name: str):
    """What Pocket-8 drew under that name; None for another image."""
    from harness.pocket.data import build

    try:
        return build.scene_of(name)
    except (ValueError, KeyError):
        return None


# ---- what follows


def described(table: pd.DataFrame, most: int | None) -> dict[str, object]:
    """The figures of `ask`'s table.

    ways: of each way of answering: `right` in %, `less`: by how much `as it is` is above it, by regime too,
    `overlap` of the tokens kept with those of `as it is` (|A and B| / |A or B|), K, `recall` of the evidence
    in %. pairs: `overlap` of two different questions on one image and of two images. K: its rank
    correlations, `at_most`: % of the questions at K_max. groups: K and `right` by regime and by background.
    """
    table = table.sort_values(["task", "row"], kind="stable")
    by_way = {way: f.reset_index(drop=True) for way, f in table.groupby("way", sort=False)}
    own = by_way[OWN]
    order = [w for w in (VANILLA, OWN, BLANK, OTHER) if w in by_way]
    order += [w for w in by_way if w not in order]
    known = own["K"].to_numpy(float)
    at_most = None if most is None else 100 * float((known >= own["tokens"].clip(upper=most)).mean())
    return {
        "questions": len(own),
        "images": int(own["image"].nunique()),
        "ways": {way: _way(by_way[way], own) for way in order},
        "pairs": {"one image": _pairs(own), "two images": _across(own)},
        "K": {
            "at_most": at_most,
            **{f"rank correlation with {name}": _rank(own, name) for name in ("things", "evidence")},
        },
        "groups": {
            column: {
                str(name): _group(by_way, own[column] == name)
                for name in sorted(own[column].dropna().unique())
            }
            for column in ("regime", "background")
        },
    }


def _way(found: pd.DataFrame, own: pd.DataFrame) -> dict[str, object]:
    less = own["right"] - found["right"]
    overlap = pd.Series([_overlap(a, b) for a, b in zip(found["kept"], own["kept"])], dtype=float)
    return {
        "right": _mean(100 * found["right"], found["image"]),
        "less": _mean(100 * less, found["image"]),
        "less_by_regime": {
            str(name): _mean(100 * less[rows], found["image"][rows])
            for name, rows in own.groupby("regime").groups.items()
        },
        "overlap": _mean(overlap, found["image"]),
        "K": _spread(found["K"]),
        "recall": _mean(100 * found["recall"].astype(float), found["image"]),
    }


def _group(by_way: Mapping[str, pd.DataFrame], rows: pd.Series) -> dict[str, object]:
    own = by_way[OWN][rows]
    return {
        "questions": len(own),
        "K": _spread(own["K"]),
        "right": {way: _mean(100 * f["right"][rows], f["image"][rows]) for way, f in by_way.items()},
        "overlap": _pairs(own),
    }


def _mean(values: pd.Series, images: pd.Series) -> dict[str, object] | None:
    """mean, n, and interval (None for fewer images than FEWEST_CLUSTERS) of what is known; or None."""
    known = values.notna()
    values, images = values[known].to_numpy(float), images[known].to_numpy()
    if not len(values):
        return None
    units = Units.gather(list(images), np.stack([values, np.ones_like(values)], 1))
    enough = len(units.keys) >= FEWEST_CLUSTERS
    span = interval(units, lambda sums: sums[:, 0] / sums[:, 1]) if enough else None
    return {"mean": float(values.mean()), "interval": span, "n": len(values)}


def _spread(counts: pd.Series) -> dict[str, float]:
    return {"mean": float(counts.mean()), "std": float(counts.std(ddof=0))}


def _overlap(a: frozenset | None, b: frozenset | None) -> float:
    return float("nan") if a is None or b is None else len(a & b) / max(1, len(a | b))


def _pairs(own: pd.DataFrame) -> dict[str, object] | None:
    """Of the tokens kept for two different questions on one image."""
    found = [
        (_overlap(a.kept, b.kept), a.image)
        for _, rows in own.drop_duplicates(["image", "text"]).groupby("image", sort=False)
        for a, b in combinations(rows.itertuples(), 2)
    ]
    pairs = pd.DataFrame(found, columns=["overlap", "image"])
    return _mean(pairs["overlap"].astype(float), pairs["image"])


def _across(own: pd.DataFrame) -> dict[str, object] | None:
    """Of those kept for a question on one image and one on the next, where both have as many tokens."""
    rows = list(own.drop_duplicates("image").itertuples())
    both = [(a, b) for a, b in pairwise(rows) if a.tokens == b.tokens]
    values = pd.Series([_overlap(a.kept, b.kept) for a, b in both], dtype=float)
    return _mean(values, pd.Series([a.image for a, _ in both], dtype=object))


def _rank(own: pd.DataFrame, column: str) -> dict[str, object] | None:
    known = own[["K", column]].astype(float).dropna().set_axis(["kept", "things"], axis=1)
    if len(known) < 3:
        return None
    return {"rho": adaptive.rho(known), "interval": adaptive.rho_interval(known), "n": len(known)}


# ---- as text


def render(found: Mapping) -> str:
    """Markdown of at most 100 columns."""
    k = found["K"]
    title = f"{found['method']} on {found['backbone']}, budget {found['budget']:g}: {found['questions']} "
    title += f"held-out\nquestions on {found['images']} images ({found['split']} split)"
    ways = [
        {
            "answered": way,
            "right, %": _said(own["right"]),
            "lost by it": MISSING if way == OWN else _said(own["less"]),
            "same": MISSING if own["overlap"] is None else f"{own['overlap']['mean']:.2f}",
            "K": _around(own["K"]),
            "recall": _short(own["recall"]),
        }
        for way, own in found["ways"].items()
    ]
    parts = [title, "", tables.markdown(ways)]
    groups = [
        {
            "right, %": name,
            "asked": str(own["questions"]),
            "K": _around(own["K"]),
            **{head: _short(own["right"].get(way)) for way, head in _HEADS.items()},
        }
        for by_name in found["groups"].values()
        for name, own in by_name.items()
    ]
    if groups:
        parts += ["", tables.markdown(groups)]
    parts.append("")
    for what, own in found["pairs"].items():
        parts.append(f"Overlap of the choices for two questions on {what}: {_said(own, 3)}.")
    for name in ("things", "evidence"):
        if own := k[f"rank correlation with {name}"]:
            low, high = own["interval"]
            parts.append(
                f"Rank correlation of K with {_NAMES[name]}: {own['rho']:.2f} ({low:.2f} to {high:.2f})."
            )
    if k["at_most"] is not None:
        parts.append(f"At K_max ({found['most_steps']}): {k['at_most']:.1f} %.")
    return "\n".join(parts)


_HEADS = {VANILLA: "unpruned", OWN: OWN, BLANK: "blanked", FIRST: "first step"}
_NAMES = {"things": "the number of things", "evidence": "the evidence's size in tokens"}


def _said(one: Mapping | None, digits: int = 1) -> str:
    if one is None:
        return MISSING
    if one["interval"] is None:
        return f"{one['mean']:.{digits}f}"
    low, high = one["interval"]
    return f"{one['mean']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _around(own: Mapping[str, float]) -> str:
    return f"{own['mean']:.1f} ± {own['std']:.1f}"


def _short(one: Mapping | None) -> str:
    return MISSING if one is None else f"{one['mean']:.1f}"
