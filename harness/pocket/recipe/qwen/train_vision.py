"""Stage 1 of pocket-qwen: the vision tower learns to say what each patch, and each visual token, belongs to.

As in pocket-llava's first stage, with two sets of read-outs: one on the last block's patches, one on the
merger's output. A visual token covers four patches and may touch several things; it is taught the one whose
centre lies in it, else the one that covers most of it. Read-outs of the whole image take the mean token
(Qwen2.5-VL has no CLS). They are all thrown away afterwards.

A batch has images of one size. Most of the training draws small canvases, which are fuller and cost less.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from harness.pocket.data.scenes import VARIED_SIDES, Scene, sample_scene, varied_canvas
from harness.pocket.recipe.optim import Clock, Optimiser, Run
from harness.pocket.recipe.qwen.dense_tower import one_frame, run
from harness.pocket.recipe.qwen.shapes import MERGE, VISION, image_processor, vision_config
from harness.pocket.recipe.train_vision import Heads, drawn
from harness.pocket.recipe.vision_labels import label_image, label_patches

#: Defaults of the recipe.
STEPS, BATCH, LR = 1600, 10, 2e-3
#: Sides of the canvas in pixels, and until which share of the training.
SMALL_SIDES, SMALL_UNTIL = (168, 280), 0.7
#: A visual token belongs to a thing that covers at least this share of it.
MIN_COVER = 0.08
#: Training scenes of other seeds than pocket-llava's.
SEED_OFFSET = 100


class Batches(IterableDataset):
    """Endless batches of labelled training scenes, one size each, as `labelled` makes them. `progress`,
    shared with the trainer, sets the canvases' sides.
    """

    def __init__(self, seed: int, start: int, batch: int, progress: torch.Tensor) -> None:
        self.seed, self.start, self.batch, self.progress = seed + SEED_OFFSET, start, batch, progress

    def __iter__(self):
        index = self.start
        while True:
            sides = SMALL_SIDES if float(self.progress) < SMALL_UNTIL else VARIED_SIDES
            canvas = varied_canvas(self.seed, index, sides)
            numbers = range(index, index + self.batch)
            yield labelled([sample_scene("train", self.seed, i, fewest=2, canvas=canvas) for i in numbers])
            index += self.batch


def prepared(scenes: list[Scene]) -> tuple[torch.Tensor, tuple[int, int]]:
    """Scenes on canvases of one size -> patches float [B, 4 N, 588], and the grid (rows, columns) of the N
    visual tokens."""
    inputs = image_processor(fewest_tokens=1)(images=[drawn(s) for s in scenes], return_tensors="pt")
    _, rows, columns = inputs["image_grid_thw"][0].tolist()
    patches = one_frame(inputs["pixel_values"]).unflatten(0, (len(scenes), -1))
    return patches, (rows // MERGE, columns // MERGE)


def label_tokens(scene: Scene, grid: tuple[int, int]) -> dict[str, torch.Tensor]:
    """`label_patches` of the visual tokens."""
    found = label_patches(scene, grid, MIN_COVER, own_centre=True)
    return {key: torch.as_tensor(value) for key, value in found.items()}


def _stacked(found: list[dict]) -> dict[str, torch.Tensor]:
    return {k: torch.stack([torch.as_tensor(labels[k]) for labels in found]) for k in found[0]}


def labelled(scenes: list[Scene]):
    """(patches, grid, labels of patches in the patches' order, labels of tokens) of scenes of one size."""
    patches, (rows, columns) = prepared(scenes)
    fine = (rows * MERGE, columns * MERGE)
    raster = torch.arange(fine[0] * fine[1]).view(rows, MERGE, columns, MERGE)
    order = raster.transpose(1, 2).flatten().numpy()
    whole = [label_image(s) for s in scenes]
    of_patches = [
        {k: v[order] for k, v in label_patches(s, fine).items()} | image for s, image in zip(scenes, whole)
    ]
    of_tokens = [label_tokens(s, (rows, columns)) | image for s, image in zip(scenes, whole)]
    return patches, (rows, columns), _stacked(of_patches), _stacked(of_tokens)


def initialise(tower: Qwen2_5_VisionTransformerPretrainedModel) -> None:
    """Queries equal to keys, so that attention begins with what is alike and near; only starting values, as
    in pocket-llava's stage 1."""
    width, frames = VISION["hidden_size"], VISION["temporal_patch_size"]
    with torch.no_grad():
        embedding = tower.patch_embed.proj.weight
        one = torch.randn_like(embedding[:, :, 0]) * 1.2 / embedding[0, :, 0].numel() ** 0.5
        embedding.copy_((one / frames)[:, :, None].expand_as(embedding))
        for block in tower.blocks:
            queries, keys, values = block.attn.qkv.weight.chunk(3)
            keys.normal_(0, 0.8 / width**0.5)
            queries.copy_(keys)
            block.attn.qkv.bias.zero_()
            mlp = block.mlp
            for weight in (values, block.attn.proj.weight, mlp.gate_proj.weight, mlp.up_proj.weight):
                nn.init.xavier_uniform_(weight, gain=0.7)
            nn.init.xavier_uniform_(mlp.down_proj.weight, gain=0.7)
        for linear in (tower.merger.mlp[0], tower.merger.mlp[2]):
            nn.init.xavier_uniform_(linear.weight)
            linear.bias.zero_()


def train(folder: Path, log: Path, steps: int, batch: int, lr: float, seed: int) -> None:
    """Train for so many steps, over all resumes."""
    torch.manual_seed(seed)
    tower = Qwen2_5_VisionTransformerPretrainedModel(vision_config())
    initialise(tower)
    heads = nn.ModuleDict({"patch": Heads(VISION["hidden_size"]), "token": Heads(VISION["out_hidden_size"])})
    state = Run(folder, {"tower": tower, "heads": heads}, log)
    state.resume()
    optimiser = Optimiser(state.modules, lr, hidden=("blocks",))
    progress = torch.tensor(state.state["step"] / steps).share_memory_()
    data = Batches(seed, state.state["samples"], batch, progress)
    clock = Clock(state)
    mean: dict[str, float] = {}
    loader = DataLoader(data, batch_size=None, num_workers=1, prefetch_factor=4, collate_fn=tuple)
    for patches, grid, of_patches, of_tokens in loader:
        if float(progress) >= 1:
            break
        fine, tokens = run(tower, patches, grid)
        loss, report = heads["token"](tokens, tokens.mean(1), of_tokens)
        fine_loss, of_fine = heads["patch"](fine, fine.mean(1), of_patches)
        (loss + fine_loss).backward()
        report |= {f"patch_{key}": of_fine[key] for key in ("name", "colour", "text")}
        report |= {"loss": float(loss.detach()), "grad_norm": optimiser.step(float(progress))}
        state.state["step"] += 1
        state.state["samples"] += batch
        clock.tick()
        progress.fill_(state.state["step"] / steps)
        for key, value in report.items():
            if value == value:
                mean[key] = value if key not in mean else 0.95 * mean[key] + 0.05 * value
        if state.state["step"] % 50 == 0:
            state.write(mean)
        if state.state["step"] % 200 == 0:
            state.save()
    state.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("build/pocket-qwen/vision"),
        help="working folder (resumed if it holds a run)",
    )
    parser.add_argument("--log", type=Path, default=Path("results/pocket-qwen/training/vision.csv"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--lr", type=float, default=LR)
    parser.add_argument("--seed", type=int, default=0)
    train(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
