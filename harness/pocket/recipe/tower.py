"""Stage 1: the vision tower learns to say what every cell of the image belongs to.

Linear read-outs on each cell name the thing there, its colour, its texture, what is written on it and where
its centre lies, so the features that the language model will read carry all of that. Read-outs of the whole
image (CLIP's CLS; Qwen's mean token) say which coloured shapes and texts there are: CLS must attend to the
things, which is what methods that rank tokens by CLS attention rely on. All of them are thrown away.

Crowds come first: until CROWDS_UNTIL most scenes are dense, where most patches have something to say.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from harness.drawings.v2.scenes import REGIMES, Scene, sample_scene
from harness.pocket.recipe.families import Labels, PocketFamily
from harness.pocket.recipe.labels import CELL_CLASSES, IMAGE_CLASSES, NAMES, PRESENCE, SHAPES
from harness.pocket.recipe.progress import TrainingStage

BATCH, LR = 10, 2e-3
#: Shares of the steps: until when CLIP sees only some patches (Qwen: small canvases), and until when most
#: scenes are dense.
PART_UNTIL, CROWDS_UNTIL = 0.7, 0.6
#: Shares of sparse, medium and dense scenes until then; thirds afterwards.
CROWDS = (0.1, 0.25, 0.65)
COLUMNS = ("name", "text", "colour", "texture", "written", "presence", "regime")


def regimes(rng: np.random.Generator, crowds: bool, number: int) -> list[str]:
    shares = CROWDS if crowds else (1 / 3, 1 / 3, 1 / 3)
    return [list(REGIMES)[int(i)] for i in rng.choice(3, number, p=shares)]


class Batches(IterableDataset):
    """Labelled training scenes from a step on: (step, pixels, grid, labels). A step's are a function of the
    seed and the step."""

    def __init__(self, family: PocketFamily, seed: int, first: int, steps: int, batch: int) -> None:
        self.family, self.first, self.steps, self.batch = family, first, steps, batch
        self.seed = seed + family.seed_offset

    def scenes(self, step: int) -> list[Scene]:
        done = step / self.steps
        rng = np.random.default_rng([1, self.seed, step])
        canvas = self.family.canvas(self.seed, step, small=done < PART_UNTIL)
        kinds = regimes(rng, done < CROWDS_UNTIL, self.batch)
        first = step * self.batch
        return [sample_scene("train", self.seed, first + i, regime, canvas) for i, regime in enumerate(kinds)]

    def __iter__(self):
        for step in range(self.first, self.steps):
            scenes = self.scenes(step)
            pixels, grid = self.family.seen(scenes)
            yield step, pixels, grid, self.family.labels(scenes, grid)


class Heads(nn.Module):
    """Linear read-outs, used in stage 1 only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.cell = nn.ModuleDict({k: nn.Linear(width, n) for k, n in CELL_CLASSES.items()})
        self.offset = nn.Linear(width, 2)
        self.presence = nn.Linear(width, PRESENCE)
        self.image = nn.ModuleDict({k: nn.Linear(width, n) for k, n in IMAGE_CLASSES.items()})

    def forward(self, tokens: Tensor, pooled: Tensor, labels: Labels) -> tuple[Tensor, dict[str, float]]:
        """Sum of all losses, and accuracies on the cells that belong to a thing.

        tokens: float [B, N, width]. pooled: [B, width], what stands for the whole image.
        """
        x = self.norm(tokens)
        report: dict[str, float] = {}
        loss = x.new_zeros(())
        on_thing = labels["owner"].flatten() >= 0
        for key, head in self.cell.items():
            logits, target = head(x).flatten(0, 1), labels[key].flatten()
            weight = None
            if key in ("name", "colour", "written"):
                weight = torch.ones(logits.shape[-1])
                weight[-1] = 0.3
            loss = loss + (2.0 if key in ("name", "written") else 1.0) * F.cross_entropy(
                logits, target, weight=weight, ignore_index=-100
            )
            valid = on_thing & (target >= 0)
            if key == "written":
                valid &= target < logits.shape[-1] - 1
            hit = logits.detach().argmax(-1) == target
            report[key] = float(hit[valid].float().mean())
            if key == "name":
                text = valid & (target >= len(SHAPES)) & (target < len(NAMES))
                report["text"] = float(hit[text].float().mean())
        there = ~labels["offset"].isnan().any(-1)
        loss = loss + F.smooth_l1_loss(self.offset(x)[there], labels["offset"][there])
        presence = F.binary_cross_entropy_with_logits(self.presence(pooled), labels["presence"])
        loss = loss + 5 * presence
        report["presence"] = float(presence.detach())
        for key, head in self.image.items():
            logits = head(pooled)
            loss = loss + 0.3 * F.cross_entropy(logits, labels[key])
            report[key] = float((logits.detach().argmax(-1) == labels[key]).float().mean())
        return loss, report


def heads_of(family: PocketFamily) -> nn.ModuleDict:
    return nn.ModuleDict({name: Heads(width) for name, width in family.reads.items()})


def train(
    family: PocketFamily, stage: TrainingStage, model: nn.Module, heads: nn.ModuleDict, seed: int, batch: int
) -> None:
    """From where `stage` is to its end, or to where it has to stop."""
    stage.columns = ("loss", "grad_norm", *COLUMNS)
    batches = Batches(family, seed, stage.step, stage.steps, batch)
    loader = DataLoader(batches, batch_size=None, num_workers=1, prefetch_factor=2, collate_fn=tuple)
    for step, pixels, grid, labels in loader:
        part = seed * 1_000_003 + step if step / stage.steps < PART_UNTIL else None
        loss, report = 0.0, {}
        for reading in family.read(model, pixels, grid, labels, part):
            own, found = heads[reading.name](reading.tokens, reading.pooled, reading.labels)
            loss, report = loss + own, found | report
        loss.backward()
        if not stage.advance(loss, report, every=25):
            return
