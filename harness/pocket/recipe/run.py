"""The whole recipe of a pocket backbone: tower, connector and language model, checkpoint folder."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from harness.pocket.recipe import language, tower
from harness.pocket.recipe.export import export
from harness.pocket.recipe.families import FAMILIES
from harness.pocket.recipe.optim import Optimiser
from harness.pocket.recipe.progress import TrainingStage, stage_weights


@dataclass(frozen=True)
class TrainingPlan:
    """How much of everything. tower, drills, questions, depth: steps of the stages, of so many images."""

    tower: int
    drills: int
    questions: int
    depth: int
    tower_batch: int = tower.BATCH
    language_batch: int = language.BATCH
    align_scenes: int = language.ALIGN_SCENES
    align_steps: int = language.ALIGN_STEPS


#: Of either backbone, for 6 hours at most on two cores that do nothing else (docs/pocket.md has the times).
PLAN = TrainingPlan(2600, 1000, 4000, 200)


def train(
    name: str,
    state: Path,
    target: Path,
    seed: int = 0,
    plan: TrainingPlan | None = None,
    minutes: float | None = None,
) -> bool:
    """Train one backbone from its seed, or go on where `state` is. True: done, `target` is written; False:
    `minutes` are over.

    state: folder of weights, moments and logs while it is trained.
    """
    family, plan = FAMILIES[name](), plan or PLAN
    stop_at = None if minutes is None else time.monotonic() + 60 * minutes
    torch.manual_seed(seed)
    model = family.untrained()
    heads = tower.heads_of(family)
    modules = {"tower": family.tower(model), "heads": heads}
    optimiser = Optimiser(modules, family.tower_hidden, tower.LR)
    stage = TrainingStage(state, "tower", plan.tower, modules, optimiser, stop_at)
    stage.resume()
    if not stage.done:
        tower.train(family, stage, model, heads, seed, plan.tower_batch)
        if not stage.done:
            return False
    family.tower(model).load_state_dict(stage_weights(stage.path, "tower"))
    family.tower(model).requires_grad_(False)
    family.connector(model).requires_grad_(True)

    modules = {
        "connector": family.connector(model),
        "language": model.model.language_model,
        "head": model.lm_head,
    }
    language.make_shallow(model)
    for part, lr in language.LR.items():
        if stage.name != "tower":
            for key, module in modules.items():
                module.load_state_dict(stage_weights(stage.path, key))
        if part == "depth":
            language.deepen(model)
        optimiser = Optimiser(modules, ("layers", "linear_2"), lr)
        stage = TrainingStage(state, part, getattr(plan, part), modules, optimiser, stop_at)
        if not stage.resume() and part == "drills":
            torch.manual_seed(seed + 1)
            language.start(model)
            explained = language.align(family, model, seed, plan.align_scenes, plan.align_steps)
            print(f"connector fitted: {explained:.3f} of the variance explained", flush=True)
            stage.save()
        if not stage.done:
            language.train(family, stage, model, seed, plan.language_batch)
            if not stage.done:
                return False
    for key, module in modules.items():
        module.load_state_dict(stage_weights(stage.path, key))
    export(family, model, target)
    return True
