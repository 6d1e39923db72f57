"""Stage 1: the CLIP vision tower learns to say what each patch belongs to, and its CLS token what the image
holds.

The per-patch heads read the output of the layer LLaVA will read (the second to last), so those features carry
what the thing is, its colour, texture, size and where its centre lies. The CLS heads read the pooled output
as a caption would: which coloured shapes, words and digits there are, how many things, which background. So
CLS must attend to the things, which is what methods that rank tokens by CLS attention rely on. All heads are
thrown away afterwards.

Most of the time the tower sees only some of the patches (all that touch a thing plus a random share of the
background), which makes a step about 2.5 times cheaper; the last part of the training sees all 576.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import CLIPVisionModel

from harness.pocket.data.scenes import Scene, render, sample_scene
from harness.pocket.recipe.optim import Clock, Optimiser, Run
from harness.pocket.recipe.shapes import FEATURE_LAYER, VISION, vision_config
from harness.pocket.recipe.vision_labels import (
    IMAGE_CLASSES,
    NAMES,
    PATCH,
    PATCH_CLASSES,
    PRESENCE,
    SIDE,
    label_image,
    label_patches,
)

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
#: Share of the training that sees only some patches, and how many background patches those steps keep.
SPARSE_UNTIL = 0.75
BACKGROUND_KEPT = 56


def drawn(scene: Scene) -> torch.Tensor:
    """The scene's pixels, uint8 [3, 336, 336]."""
    return torch.from_numpy(np.asarray(render(scene)).transpose(2, 0, 1).copy())


class Scenes(IterableDataset):
    """Endless labelled training scenes: (image uint8 [3, 336, 336], labels)."""

    def __init__(self, seed: int, start: int = 0) -> None:
        self.seed, self.start = seed, start

    def __iter__(self):
        index = self.start
        while True:
            scene = sample_scene("train", self.seed, index, fewest=2)
            image = drawn(scene)
            labels = {k: torch.as_tensor(v) for k, v in (label_patches(scene) | label_image(scene)).items()}
            yield image, labels
            index += 1


def normalise(images: torch.Tensor) -> torch.Tensor:
    """uint8 [B, 3, H, W] -> float32, CLIP's mean and standard deviation."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) * 255 for v in (PIXEL_MEAN, PIXEL_STD))
    return (images.float() - mean) / std


def initialise(tower: CLIPVisionModel) -> None:
    """Start from smooth 2-D sinusoidal positions and from queries equal to keys, so that attention begins
    local.

    Both are only starting values (compare "mimetic initialisation", Trockman & Kolter 2023); everything is
    trained.
    """
    width = VISION["hidden_size"]
    omega = torch.logspace(np.log10(1.6), np.log10(0.06), width // 4)
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    waves = [f(p.reshape(-1, 1) * omega) for p in (rows, columns) for f in (torch.sin, torch.cos)]
    with torch.no_grad():
        embeddings = tower.embeddings
        embeddings.position_embedding.weight[1:] = 0.5 * torch.cat(waves, 1)
        embeddings.position_embedding.weight[0] = 0
        embeddings.class_embedding.normal_(0, 0.3)
        embeddings.patch_embedding.weight.normal_(0, 0.6 / (3 * PATCH**2) ** 0.5)
        for layer in tower.encoder.layers:
            attention = layer.self_attn
            attention.k_proj.weight.normal_(0, 0.8 / width**0.5)
            attention.q_proj.weight.copy_(attention.k_proj.weight)
            for linear in (attention.v_proj, attention.out_proj, layer.mlp.fc1, layer.mlp.fc2):
                nn.init.xavier_uniform_(linear.weight, gain=0.7)


def hidden_states(
    tower: CLIPVisionModel, images: torch.Tensor, keep: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The feature layer's output [B, 1 + K, d] and the pooled CLS output [B, d], of the kept patches only.

    Args:
        images: uint8 [B, 3, 336, 336].
        keep: int64 [B, K] patch indices, or None for all.
    """
    embeddings = tower.embeddings
    patches = F.unfold(normalise(images), PATCH, stride=PATCH).transpose(1, 2)
    positions = embeddings.position_embedding.weight
    if keep is None:
        places = positions[1:].expand(len(images), -1, -1)
    else:
        patches = patches.gather(1, keep[..., None].expand(-1, -1, patches.shape[-1]))
        places = positions[1:][keep]
    x = patches @ embeddings.patch_embedding.weight.flatten(1).T + places
    cls = (embeddings.class_embedding + positions[0]).expand(len(images), 1, -1)
    x = tower.pre_layrnorm(torch.cat([cls, x], 1))
    layers = tower.encoder.layers
    for i, layer in enumerate(layers):
        x = layer(x, attention_mask=None)
        x = x[0] if isinstance(x, tuple) else x
        if i == len(layers) + FEATURE_LAYER:
            features = x
    return features, tower.post_layernorm(x[:, 0])


class Heads(nn.Module):
    """Linear read-outs used in stage 1 only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.patch = nn.ModuleDict({k: nn.Linear(width, n) for k, n in PATCH_CLASSES.items()})
        self.offset = nn.Linear(width, 2)
        self.presence = nn.Linear(width, PRESENCE)
        self.image = nn.ModuleDict({k: nn.Linear(width, n) for k, n in IMAGE_CLASSES.items()})

    def forward(
        self, tokens: torch.Tensor, pooled: torch.Tensor, labels: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Sum of all losses, and the accuracies on tokens that belong to a thing.

        tokens: float [B, N, width]. pooled: [B, width], what stands for the whole image.
        """
        x = self.norm(tokens)
        report: dict[str, float] = {}
        loss = x.new_zeros(())
        for key, head in self.patch.items():
            logits, target = head(x).flatten(0, 1), labels[key].flatten()
            weight = None
            if key in ("name", "colour"):
                weight = torch.ones(logits.shape[-1])
                weight[-1] = 0.3
            loss = loss + (2.0 if key == "name" else 1.0) * F.cross_entropy(
                logits, target, weight=weight, ignore_index=-100
            )
            on_thing = labels["name"].flatten() != len(NAMES)
            valid = on_thing & (target >= 0)
            report[key] = float((logits.argmax(-1) == target)[valid].float().mean())
        is_text = (labels["name"] >= 8) & (labels["name"] < len(NAMES))
        report["text"] = float((self.patch["name"](x).argmax(-1) == labels["name"])[is_text].float().mean())
        there = ~labels["offset"].isnan().any(-1)
        loss = loss + F.smooth_l1_loss(self.offset(x)[there], labels["offset"][there])
        presence = F.binary_cross_entropy_with_logits(self.presence(pooled), labels["presence"])
        loss = loss + 5 * presence
        report["presence_bce"] = float(presence.detach())
        for key, head in self.image.items():
            logits = head(pooled)
            loss = loss + 0.3 * F.cross_entropy(logits, labels[key])
            report[key] = float((logits.argmax(-1) == labels[key]).float().mean())
        return loss, report


def sparse(labels: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Patches to keep [B, K] (all on things in the fullest image), and their labels."""
    on_thing = labels["name"] != len(NAMES)
    k = min(on_thing.shape[1], int(on_thing.sum(1).max()) + BACKGROUND_KEPT)
    keep = (on_thing + torch.rand(on_thing.shape)).topk(k, 1).indices
    cut = dict(labels)
    for key in PATCH_CLASSES:
        cut[key] = labels[key].gather(1, keep)
    cut["offset"] = labels["offset"].gather(1, keep[..., None].expand(-1, -1, 2))
    return keep, cut


def train(folder: Path, log: Path, minutes: float, batch: int, lr: float, seed: int) -> None:
    """Train for `minutes` of wall time (over all resumes); the schedule follows the time used."""
    torch.manual_seed(seed)
    tower = CLIPVisionModel(vision_config())
    initialise(tower)
    heads = Heads(VISION["hidden_size"])
    run = Run(folder, {"tower": tower, "heads": heads}, log)
    run.resume()
    optimiser = Optimiser(run.modules, lr, hidden=("self_attn", "mlp"))
    loader = DataLoader(
        Scenes(seed, run.state["samples"]), batch_size=batch, num_workers=1, prefetch_factor=4
    )
    clock = Clock(run)
    mean: dict[str, float] = {}
    for images, labels in loader:
        progress = run.state["seconds"] / (60 * minutes)
        if progress >= 1:
            break
        keep = None
        if progress < SPARSE_UNTIL:
            keep, labels = sparse(labels)
        features, cls = hidden_states(tower, images, keep)
        loss, report = heads(features[:, 1:], cls, labels)
        loss.backward()
        report |= {"loss": float(loss.detach()), "grad_norm": optimiser.step(progress)}
        run.state["step"] += 1
        run.state["samples"] += batch
        clock.tick()
        for key, value in report.items():
            if value == value:
                mean[key] = value if key not in mean else 0.95 * mean[key] + 0.05 * value
        if run.state["step"] % 50 == 0:
            run.write(mean)
        if run.state["step"] % 200 == 0:
            run.save()
    run.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("build/pocket/vision"),
        help="working folder (resumed if it holds a run)",
    )
    parser.add_argument("--log", type=Path, default=Path("results/pocket-llava/training/vision.csv"))
    parser.add_argument("--minutes", type=float, default=35)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    train(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
