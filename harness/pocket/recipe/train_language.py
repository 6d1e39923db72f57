"""Stage 2: projector and language model learn to answer questions about a scene; the vision tower stays
frozen.

First come drills of a few tokens (`drills`), then the benchmarks' questions beside drills of what is learnt
slowly, those with lettered options last, many packed behind one image. Each question sees the image and
itself only, at the positions it has in a conversation of one turn, so a packed sequence trains exactly what
is asked at evaluation. Scenes grow from few things to fourteen. For most of the training the language model
is given only some visual tokens (of each thing and of the background, at their original positions), which
makes a step about three times cheaper; the last part gives it all 576, as at evaluation.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from harness.pocket.data import documents
from harness.pocket.data.scenes import COLOURS, MAX_THINGS, SIZES, SQUARE, TEXTURES, Scene, sample_scene
from harness.pocket.recipe.drills import KINDS, SLOW, Drill, chooses, drills, picks
from harness.pocket.recipe.optim import Clock, Optimiser, Run
from harness.pocket.recipe.shapes import llava_config
from harness.pocket.recipe.tokenizer import PROMPT_HEAD, PROMPT_TAIL, build_tokenizer
from harness.pocket.recipe.train_vision import drawn, hidden_states
from harness.pocket.recipe.vision_labels import NAMES, SIDE, label_patches

IGNORE = -100
VISUAL_TOKENS = 576
#: Defaults of the recipe.
MINUTES, BATCH, LR = 105, 4, 2e-3
#: Shares of the training: until when four patches of a thing are shown, and until when all of them.
SPARSER_UNTIL, SPARSE_UNTIL = 0.6, 0.82
BACKGROUND_KEPT = 40


@dataclass(frozen=True)
class Schedule:
    """What is asked when, in shares of the training: drills alone until, drills beside questions until, full
    scenes from, questions with lettered options from.
    """

    drills_until: float
    beside_until: float
    full_scenes_from: float
    lettered_from: float


#: Questions with lettered options start late: drills teach letters at a third of the tokens.
SCHEDULE = Schedule(drills_until=0.2, beside_until=SPARSE_UNTIL, full_scenes_from=0.15, lettered_from=0.4)
#: Questions a task an image in one pack, once the drills are over.
QUESTIONS = {
    "gqa": 3, "mmbench_en": 2, "mmbench_cn": 3, "mme": 4, "pope": 1, "scienceqa": 2, "vqav2": 3, "textvqa": 2,
}  # fmt: skip
LETTERED = ("mmbench_en", "mmbench_cn", "scienceqa")
#: Drills beside the questions: of a scene, picks, chooses; before and after lettered questions start.
BESIDE, BESIDE_LATER = (36, 20, 6), (36, 4, 2)
#: Every image's features serve this many packs of fresh questions.
PACKS = 4
#: Scenes whose patches align the projector.
ALIGNMENT_SCENES = 480


def asked(task: str, row: documents.Row) -> Drill:
    """A benchmark's question as the harness words it, with a thought after each option: its letter if it is
    the right one, else "no".
    """
    question, answer = "\n" + documents.prompt(task, row) + PROMPT_TAIL, documents.target(task, row)
    if task not in LETTERED:
        return Drill.plain(task, question, answer)
    pieces = re.split(r"(?=\n[A-D]\. |\n+(?:Answer with|请直接))", question)
    thoughts = [(answer if p[1] == answer else "no") if p[2:4] == ". " else None for p in pieces[:-1]]
    return Drill(task, tuple(zip(pieces, [*thoughts, answer])))


class Questions(IterableDataset):
    """Endless training scenes with packs of tokenised questions.

    Yields (image uint8 [3, 336, 336], owner int64 [576], packs): a pack is a list of (task, ids,
    targets, asides), the last two as in `collate_packs`. `progress`, shared with the trainer, sets how many
    things a scene may hold.
    """

    schedule = SCHEDULE

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, seed: int, start: int, progress: torch.Tensor
    ) -> None:
        self.tokenizer, self.seed, self.start, self.progress = tokenizer, seed, start, progress

    def worded(self, drill: Drill) -> tuple[tuple[str, str | None], ...]:
        """A drill's pieces as they stand in this model's prompt, behind the image."""
        return drill.pieces

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _encode(self, drill: Drill) -> tuple[str, list[int], list[int], list[int]]:
        ids, asides = [], [IGNORE]
        for text, thought in self.worded(drill):
            tokens = self._tokens(text)
            ids += tokens
            asides += [IGNORE] * len(tokens)
            if thought is not None:
                asides[-1] = self._tokens(" " + thought)[0]
        asides[-1] = IGNORE  # the last one is the answer
        reply = [*self._tokens(" " + drill.pieces[-1][1]), self.tokenizer.eos_token_id]
        targets = [IGNORE] * len(ids) + reply
        return drill.kind, ids + reply, targets, asides + [IGNORE] * (len(reply) - 1)

    def _pack(self, scene: Scene, rng: np.random.Generator) -> list:
        pack = []
        done = float(self.progress)
        for task, times in QUESTIONS.items():
            if task in LETTERED and done < self.schedule.lettered_from:
                continue
            for _ in range(times):
                rows = documents.MAKERS[task](scene, rng)
                if rows:
                    row = rows[int(rng.integers(len(rows)))]
                    pack.append(self._encode(asked(task, row)))
        if done < self.schedule.beside_until:
            of_scene, of_letters, of_both = BESIDE if done < self.schedule.lettered_from else BESIDE_LATER
            pack += map(self._encode, drills(scene, rng, of_scene, SLOW))
            pack += map(self._encode, [*picks(rng, of_letters), *chooses(scene, rng, of_both)])
        return pack

    def item(self, index: int, canvas: tuple[int, int] = SQUARE) -> tuple[Scene, list]:
        """Scene number `index`, on a canvas of that width and height, and its packs (some may be empty)."""
        done = float(self.progress)
        share = min(1.0, 0.2 + 0.8 * done / self.schedule.full_scenes_from)
        most = max(3, round(MAX_THINGS * share))
        scene = sample_scene("train", self.seed + 1, index, most=most, canvas=canvas)
        rng = np.random.default_rng([self.seed, index])
        if done < self.schedule.drills_until:
            return scene, [[self._encode(drill) for drill in drills(scene, rng, 48)] for _ in range(PACKS)]
        return scene, [self._pack(scene, rng) for _ in range(PACKS)]

    def __iter__(self):
        worker = get_worker_info()
        step = worker.num_workers if worker else 1
        index = self.start + (worker.id if worker else 0)
        while True:
            scene, packs = self.item(index)
            if all(packs):
                yield drawn(scene), torch.from_numpy(label_patches(scene)["owner"]), packs
            index += step


def collate_packs(
    packs: list, pad: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, list[list[str]]]:
    """Packs of B images -> ids, targets (the answer's tokens at their places), asides (what to think of at
    the token before, see `Drill`), segment (1.. per question, 0 = padding), offset within its question:
    [B, M].
    """
    longest = max(sum(len(ids) for _, ids, _, _ in pack) for pack in packs)
    ids = torch.full((len(packs), longest), pad)
    targets, asides = torch.full_like(ids, IGNORE), torch.full_like(ids, IGNORE)
    segment, offset = torch.zeros_like(ids), torch.zeros_like(ids)
    for b, pack in enumerate(packs):
        at = 0
        for s, (_, question, target, aside) in enumerate(pack, 1):
            span = slice(at, at + len(question))
            ids[b, span], targets[b, span] = torch.tensor(question), torch.tensor(target)
            asides[b, span] = torch.tensor(aside)
            segment[b, span], offset[b, span] = s, torch.arange(len(question))
            at += len(question)
    return ids, targets, asides, segment, offset, [[task for task, *_ in pack] for pack in packs]


def shown(progress: float) -> tuple[int, int] | None:
    """How many patches of a thing, and of the background, the language model is shown; None: all there are.

    One patch a thing at first: what belongs to what is learnt sooner among few tokens.
    """
    if progress < SCHEDULE.drills_until:
        per_thing = 1 + int(6 * progress / SCHEDULE.drills_until)
        return per_thing, 4 * per_thing
    if progress < SPARSER_UNTIL:
        return 4, 16
    return (VISUAL_TOKENS, BACKGROUND_KEPT) if progress < SPARSE_UNTIL else None


def keep_some(owner: torch.Tensor, per_thing: int, background: int) -> torch.Tensor:
    """Patches to show, int64 [B, K], ascending: of each thing at random up to `per_thing`, and some
    `background`.

    owner: int64 [B, 576], the number of the thing a patch belongs to, or -1. Images with fewer patches to
    show than the fullest of the batch get more background.
    """
    order = torch.rand(owner.shape)
    same = owner[:, :, None] == owner[:, None]
    rank = (same & (order[:, None] < order[:, :, None])).sum(-1)
    wanted = (owner >= 0) & (rank < per_thing)
    k = min(owner.shape[1], int(wanted.sum(1).max()) + background)
    spare = (owner < 0) * 0.5
    return (wanted.float() * 2 + spare + 0.4 * order).topk(k, 1).indices.sort(1).values


def forward(
    model: LlavaForConditionalGeneration,
    head: torch.Tensor,
    features: torch.Tensor,
    keep: torch.Tensor | None,
    batch,
) -> tuple[torch.Tensor, dict]:
    """`answer_loss` of packed questions about images with these features."""
    ids, offset = batch[0], batch[4]
    language = model.model.language_model
    rows, prefix = len(ids), len(head)
    visual = model.model.multi_modal_projector(features)
    if keep is None:
        keep = torch.arange(VISUAL_TOKENS).expand(rows, -1)
    else:
        visual = visual.gather(1, keep[..., None].expand(-1, -1, visual.shape[-1]))
    embed = language.embed_tokens
    x = torch.cat([embed(head).expand(rows, -1, -1), visual, embed(ids)], 1)
    positions = torch.cat(
        [torch.arange(prefix).expand(rows, -1), prefix + keep, prefix + VISUAL_TOKENS + offset], 1
    )
    return answer_loss(language, model.lm_head, x, positions, batch)


def answer_loss(
    language: nn.Module, lm_head: nn.Module, x: torch.Tensor, positions: torch.Tensor, batch
) -> tuple[torch.Tensor, dict]:
    """Loss over the answers of packed questions behind what they share, and [right, asked] a task of first
    answer tokens.

    x: embeddings [B, L, d], the shared ones first, then those of the batch's ids. positions: [B, L], or
    [3, B, L] for M-RoPE. batch: as `collate_packs` makes it.
    """
    _, targets, asides, segment, _, tasks = batch
    rows, shared = len(x), x.shape[1] - segment.shape[1]
    group = torch.cat([torch.zeros(rows, shared, dtype=torch.long), segment], 1)
    is_shared = torch.arange(x.shape[1]) < shared
    sees = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril() & (
        is_shared[None, None] | (group[:, :, None] == group[:, None])
    )
    hidden = language(
        inputs_embeds=x, attention_mask=sees[:, None], position_ids=positions, use_cache=False
    ).last_hidden_state
    hidden = hidden[:, shared:-1]
    wanted = torch.where(asides == IGNORE, targets, asides)[:, 1:]
    answers = wanted != IGNORE
    logits = lm_head(hidden[answers])
    loss = F.cross_entropy(logits, wanted[answers])
    first = (targets[:, 1:] != IGNORE) & (targets[:, :-1] == IGNORE)
    right = torch.zeros_like(answers)
    right[answers] = logits.argmax(-1) == wanted[answers]
    score = defaultdict(lambda: [0, 0])
    for b, s in zip(*first.nonzero(as_tuple=True)):
        task = tasks[int(b)][int(segment[b, s + 1]) - 1]
        score[task][0] += int(right[b, s])
        score[task][1] += 1
    return loss, score


def build_model(tokenizer: PreTrainedTokenizerFast, tower: Path) -> LlavaForConditionalGeneration:
    """An untrained pocket-llava around the trained, frozen vision tower of stage 1."""
    config = llava_config(
        len(tokenizer),
        tokenizer.convert_tokens_to_ids("<image>"),
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(load_file(tower))
    model.model.vision_tower.requires_grad_(False)
    return model


def initialise(model: LlavaForConditionalGeneration) -> None:
    """Start with queries equal to keys and heads that copy what they attend to, so that like finds like.

    Only starting values, as in `train_vision.initialise`: everything is trained.
    """
    language = model.model.language_model
    width = language.config.hidden_size
    with torch.no_grad():
        language.embed_tokens.weight.normal_(0, 0.5)
        model.lm_head.weight.copy_(0.3 * language.embed_tokens.weight)
        for layer in language.layers:
            attention, mlp = layer.self_attn, layer.mlp
            attention.k_proj.weight.normal_(0, width**-0.5)
            attention.q_proj.weight.copy_(attention.k_proj.weight)
            torch.nn.init.orthogonal_(attention.v_proj.weight)
            attention.o_proj.weight.copy_(0.3 * attention.v_proj.weight.T)
            for linear in (mlp.gate_proj, mlp.up_proj):
                torch.nn.init.xavier_uniform_(linear.weight)
            mlp.down_proj.weight.zero_()


def align(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, seed: int) -> float:
    """Teach the projector alone to put a patch where the words for its thing are in the embedding space.

    A patch's target is the sum of the embeddings of its thing's name, colour, texture and size, and of the
    words for where its centre lies, in proportion to how far it lies from the middle. (With an arbitrary code
    of the position instead, nothing learnt to say "left" in 2,000 steps.) Returns the share of the targets'
    variance that is explained.
    """
    embeddings = model.model.language_model.embed_tokens.weight.detach()

    def table(words: Sequence[str]) -> torch.Tensor:
        ids = [tokenizer.encode(f" {word}", add_special_tokens=False)[-1] for word in words]
        return torch.cat([embeddings[ids], embeddings.new_zeros(1, embeddings.shape[1])])

    tables = {
        "name": table(NAMES),
        "colour": table(tuple(COLOURS)),
        "texture": table(TEXTURES),
        "size": table(SIZES),
    }
    generator = torch.Generator().manual_seed(seed)
    words = table(("left", "right", "above", "below"))
    axes = torch.stack([words[0] - words[1], words[2] - words[3]])
    inputs, targets = [], []
    for first in range(0, ALIGNMENT_SCENES, 16):
        scenes = [sample_scene("train", seed + 2, first + i, fewest=4) for i in range(16)]
        images = torch.stack([drawn(s) for s in scenes])
        with torch.no_grad():
            features = hidden_states(model.model.vision_tower, images, None)[0][:, 1:]
        for scene, feature in zip(scenes, features):
            labels = {k: torch.as_tensor(v) for k, v in label_patches(scene).items()}
            on_thing = labels["name"] != len(NAMES)
            rows, columns = (
                torch.arange(SIDE * SIDE)[on_thing] // SIDE,
                torch.arange(SIDE * SIDE)[on_thing] % SIDE,
            )
            centre = (labels["offset"][on_thing] + torch.stack([columns, rows], 1) + 0.5) / SIDE
            target = 2 * (0.5 - centre) @ axes
            for key, vectors in tables.items():
                target += vectors[labels[key][on_thing].clamp(min=-1)]
            inputs.append(feature[on_thing])
            targets.append(target)
    x, y = torch.cat(inputs), torch.cat(targets)
    projector = model.model.multi_modal_projector
    torch.nn.init.xavier_uniform_(projector.linear_1.weight, gain=float(x.square().mean()) ** -0.5)
    optimiser = torch.optim.AdamW(projector.parameters(), lr=3e-3)
    steps = 600
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (2048,), generator=generator)
        loss = F.mse_loss(projector(x[rows]), y[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return 1 - float(loss.detach() / y.var(0).mean())


def train(folder: Path, tower: Path, log: Path, minutes: float, batch: int, lr: float, seed: int) -> None:
    """Train for `minutes` of wall time (over all resumes); the schedule follows the time used."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, tower)
    modules = {
        "projector": model.model.multi_modal_projector,
        "language": model.model.language_model,
        "head": model.lm_head,
    }
    run = Run(folder, modules, log)
    if not run.resume():
        initialise(model)
        print(f"projector aligned: {align(model, tokenizer, seed):.3f} of the variance explained", flush=True)
    # One graph for all lengths; fuses the many small operations, which take a third of a step otherwise.
    model.model.language_model.compile(dynamic=True)
    optimiser = Optimiser(modules, lr, hidden=("self_attn", "mlp", "linear_2"))
    progress = torch.zeros(()).share_memory_()
    progress.fill_(run.state["seconds"] / (60 * minutes))
    group = 4 * batch
    data = Questions(tokenizer, seed, run.state["samples"], progress)
    loader = DataLoader(
        data, batch_size=group, num_workers=1, prefetch_factor=1, collate_fn=lambda items: items
    )
    head = torch.tensor(tokenizer.encode(PROMPT_HEAD))
    clock, mean = Clock(run), {}
    for items in loader:
        if float(progress) >= 1:
            break
        with torch.inference_mode():
            features = hidden_states(model.model.vision_tower, torch.stack([i[0] for i in items]), None)[0][
                :, 1:
            ]
        features = features.clone()
        owner = torch.stack([i[1] for i in items])
        size = batch * (2 if float(progress) < SCHEDULE.drills_until else 1)
        for p in range(min(len(i[2]) for i in items)):
            for at in range(0, group, size):
                span = slice(at, at + size)
                show = shown(float(progress))
                keep = keep_some(owner[span], *show) if show else None
                packs = collate_packs([i[2][p] for i in items[span]], tokenizer.pad_token_id)
                loss, score = forward(model, head, features[span], keep, packs)
                loss.backward()
                norm = optimiser.step(float(progress))
                run.state["step"] += 1
                clock.tick()
                progress.fill_(run.state["seconds"] / (60 * minutes))
                report = {"loss": float(loss.detach()), "grad_norm": norm} | {
                    t: r / n for t, (r, n) in score.items()
                }
                for key, value in report.items():
                    mean[key] = 0.97 * mean.get(key, value) + 0.03 * value
                if run.state["step"] % 50 == 0:
                    run.write(
                        {k: mean.get(k, float("nan")) for k in ("loss", "grad_norm", *QUESTIONS, *KINDS)}
                    )
                if run.state["step"] % 100 == 0:
                    run.save()
        run.state["samples"] += group
    run.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("build/pocket/language"),
        help="working folder (resumed if it holds a run)",
    )
    parser.add_argument(
        "--tower", type=Path, default=Path("build/pocket/vision/tower.safetensors"), help="stage 1's result"
    )
    parser.add_argument("--log", type=Path, default=Path("results/pocket-llava/training/language.csv"))
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--batch", type=int, default=BATCH, help="images a step, each with 20 questions")
    parser.add_argument("--lr", type=float, default=LR)
    parser.add_argument("--seed", type=int, default=0)
    train(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
