"""Stage 2 of pocket-qwen: merger and language model learn to answer questions about a scene of any size.

It starts from pocket-llava's language model and a merger fitted to it (`warm_start`), so that what is left to
learn is to live with 64 to 256 visual tokens of 28 pixels, M-RoPE and Qwen's prompt. Questions, drills and
their packing behind one image are pocket-llava's. Half of the steps show only some visual tokens, for most of
the training; the last part shows all.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from harness.pocket.data.scenes import varied_canvas
from harness.pocket.recipe.drills import KINDS, Drill
from harness.pocket.recipe.optim import Clock, Optimiser, Run
from harness.pocket.recipe.qwen.dense_tower import run as run_tower
from harness.pocket.recipe.qwen.tokenizer import IMAGE_END, PROMPT_HEAD, PROMPT_TAIL, build_tokenizer
from harness.pocket.recipe.qwen.train_vision import SEED_OFFSET, label_tokens, prepared
from harness.pocket.recipe.qwen.warm_start import align, build_model, inherit, pocket_llava
from harness.pocket.recipe.tokenizer import PROMPT_TAIL as LLAVA_TAIL
from harness.pocket.recipe.train_language import (
    QUESTIONS,
    Questions,
    Schedule,
    answer_loss,
    collate_packs,
    keep_some,
)

#: Defaults of the recipe.
STEPS, BATCH, LR, OTHER_LR = 1600, 4, 1.5e-3, 1e-3
SCHEDULE = Schedule(drills_until=0.1, beside_until=0.7, full_scenes_from=0.05, lettered_from=0.2)
#: Every other step until this share of the training shows so many tokens of a thing, and of the background.
SPARSE_UNTIL, SPARSE = 0.7, (3, 16)
#: Images of one size whose features are computed together.
GROUP = 16


class Groups(Questions):
    """Endless groups of training scenes of one size, with packs of tokenised questions.

    Yields (patches, grid, owner int64 [GROUP, N] of visual tokens, packs a scene), the first two as
    `train_vision.prepared` makes them.
    """

    schedule = SCHEDULE

    def worded(self, drill: Drill) -> tuple[tuple[str, str | None], ...]:
        pieces = [(text.replace(LLAVA_TAIL, PROMPT_TAIL), thought) for text, thought in drill.pieces]
        pieces[0] = (pieces[0][0].removeprefix("\n"), pieces[0][1])
        return tuple(pieces)

    def __iter__(self):
        index = self.start
        while True:
            canvas = varied_canvas(self.seed, index)
            scenes, packs = [], []
            while len(scenes) < GROUP:
                scene, own = self.item(index, canvas)
                index += 1
                if all(own):
                    scenes.append(scene)
                    packs.append(own)
            patches, grid = prepared(scenes)
            owner = torch.stack([label_tokens(scene, grid)["owner"] for scene in scenes])
            yield patches, grid, owner, packs


class Prompt:
    """The constant parts of a prompt as ids: before the image, and its end."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.head, self.end = (torch.tensor(tokenizer.encode(text)) for text in (PROMPT_HEAD, IMAGE_END))


def forward(
    model: Qwen2_5_VLForConditionalGeneration,
    prompt: Prompt,
    fine: Tensor,
    grid: tuple[int, int],
    keep: Tensor | None,
    batch,
) -> tuple[Tensor, dict]:
    """`answer_loss` of packed questions about images of one size.

    fine: what the tower's last block makes of their patches [B, 4 N, d] (`dense_tower.run`). grid: rows and
    columns of visual tokens. keep: int64 [B, K], the visual tokens shown; None: all.
    """
    language, rows = model.model.language_model, len(fine)
    ids, offset = batch[0], batch[4]
    visual = model.model.visual.merger(fine).unflatten(0, (rows, -1))
    places = torch.cartesian_prod(*map(torch.arange, (1, *grid))).T[:, None].expand(-1, rows, -1)
    if keep is not None:
        visual = visual.gather(1, keep[..., None].expand(-1, -1, visual.shape[-1]))
        places = places.gather(2, keep.expand(3, -1, -1))
    embed = language.embed_tokens
    start = len(prompt.head)
    end = start + max(grid)
    x = torch.cat(
        [embed(prompt.head).expand(rows, -1, -1), visual, embed(prompt.end).expand(rows, -1, -1), embed(ids)],
        1,
    )
    positions = torch.cat(
        [
            torch.arange(start).expand(3, rows, -1),
            start + places,
            (end + torch.arange(len(prompt.end))).expand(3, rows, -1),
            (end + len(prompt.end) + offset).expand(3, -1, -1),
        ],
        2,
    )
    return answer_loss(language, model.lm_head, x, positions, batch)


def train(
    folder: Path,
    tower: Path,
    log: Path,
    steps: int,
    batch: int,
    lr: float,
    other_lr: float,
    seed: int,
    compiled: bool = True,
) -> None:
    """Train for so many steps, over all resumes."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, tower)
    visual = model.model.visual
    modules = {"merger": visual.merger, "language": model.model.language_model, "head": model.lm_head}
    state = Run(folder, modules, log)
    if not state.resume():
        llava = pocket_llava()
        inherit(model, llava, tokenizer)
        print(f"merger fitted: {align(model, llava, seed):.3f} of the variance explained", flush=True)
    if compiled:
        # One graph for all lengths, as in pocket-llava's recipe.
        model.model.language_model.compile(dynamic=True)
    optimiser = Optimiser(modules, lr, hidden=("layers",), other_lr=other_lr)
    progress = torch.tensor(state.state["step"] / steps).share_memory_()
    data = Groups(tokenizer, seed + SEED_OFFSET, state.state["samples"], progress)
    prompt, clock, mean = Prompt(tokenizer), Clock(state), {}
    loader = DataLoader(data, batch_size=None, num_workers=1, prefetch_factor=1, collate_fn=tuple)
    for patches, grid, owner, packs in loader:
        if float(progress) >= 1:
            break
        with torch.no_grad():
            fine, _ = run_tower(visual, patches, grid)
        for p in range(min(map(len, packs))):
            for at in range(0, GROUP, batch):
                span = slice(at, at + batch)
                sparse = float(progress) < SPARSE_UNTIL and state.state["step"] % 2
                keep = keep_some(owner[span], *SPARSE) if sparse else None
                questions = collate_packs([own[p] for own in packs[span]], tokenizer.pad_token_id)
                loss, score = forward(model, prompt, fine[span], grid, keep, questions)
                loss.backward()
                norm = optimiser.step(float(progress))
                state.state["step"] += 1
                clock.tick()
                progress.fill_(state.state["step"] / steps)
                report = {"loss": float(loss.detach()), "grad_norm": norm}
                report |= {task: right / asked for task, (right, asked) in score.items()}
                for key, value in report.items():
                    mean[key] = 0.97 * mean.get(key, value) + 0.03 * value
                if state.state["step"] % 50 == 0:
                    columns = ("loss", "grad_norm", *QUESTIONS, *KINDS)
                    state.write({k: mean.get(k, float("nan")) for k in columns})
                if state.state["step"] % 100 == 0:
                    state.save()
        state.state["samples"] += GROUP
    state.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("build/pocket-qwen/language"),
        help="working folder (resumed if it holds a run)",
    )
    parser.add_argument(
        "--tower",
        type=Path,
        default=Path("build/pocket-qwen/vision/tower.safetensors"),
        help="stage 1's result",
    )
    parser.add_argument("--log", type=Path, default=Path("results/pocket-qwen/training/language.csv"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--batch", type=int, default=BATCH, help="images a step, each with 20 questions")
    parser.add_argument("--lr", type=float, default=LR, help="of the hidden matrices (Muon)")
    parser.add_argument("--other-lr", type=float, default=OTHER_LR, help="of everything else (AdamW)")
    parser.add_argument("--seed", type=int, default=0)
    train(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
