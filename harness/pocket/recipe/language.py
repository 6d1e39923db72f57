"""Stages 2 to 4: connector and language model learn to answer questions about a scene; the tower is frozen.

Until the last stage, "depth", the language model has a third of its layers, which learns as much per step in
a third of the time; then each layer gets two copies that at first add nothing, and all are trained.

First the connector alone is fitted: a patch shall stand, in the embedding space, where the words for its
thing are. Stage "drills" asks in a few tokens, stage "questions" asks the benchmarks' questions beside
drills, those with lettered options last; many are packed behind one image (`packing`). Each sees the image
and itself only, at the positions it has in a conversation of one turn, so a packed sequence trains exactly
what is asked at evaluation. For most of the training the language model is given only some visual tokens, of
each thing and of the background, which makes a step several times cheaper; the last part gives it all, as at
evaluation. Some stand at their own positions, or, in half of the questions, renumbered as methods that prune
before the language model leave them: so places are read off what a token holds, too.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from harness.drawings.v2.scenes import COLOURS, TEXTURES, Scene, sample_scene
from harness.pocket.data import documents
from harness.pocket.recipe.drills import DRILLS, LETTERED, Drill, Lessons, picks
from harness.pocket.recipe.families import PocketFamily
from harness.pocket.recipe.labels import NAMES, TEXTS
from harness.pocket.recipe.packing import IGNORE, Encoded, Gaze, PackLayout, Packs, attention_of, collate
from harness.pocket.recipe.progress import TrainingStage
from harness.pocket.recipe.tower import regimes

BATCH = 4
#: Learning rates of the stages, in their order.
LR = {"drills": 2e-3, "questions": 2e-3, "depth": 5e-4}
#: What is added to the seed of the scenes of each stage.
STREAMS = {"drills": 10, "questions": 20, "depth": 30}
#: A layer becomes so many in the end.
GROWTH = 3
#: Batches that are drawn at once, and rounds in which they are asked, each time other questions: the tower
#: runs once for all. In turn, not one batch several times in a row, which the model would learn by heart.
BATCHES, ROUNDS = 16, 4
#: Shares of the drills: only what one look at one thing answers until, sparse and medium scenes until.
FIRST_UNTIL, CROWDS_FROM = 0.3, 0.4
#: Shares of the questions: drills beside them until; those with lettered options from; four visual tokens of
#: a thing are shown until, and all of them (with some background) until.
BESIDE_UNTIL, LETTERED_FROM, SPARSER_UNTIL, SPARSE_UNTIL = 0.75, 0.18, 0.65, 0.78
BACKGROUND = 40
#: Weight of the loss of attention that does not lie on the evidence, where some visual tokens are shown.
GAZE = 0.5
#: Questions of a task in one pack of stage "questions".
QUESTIONS = {
    "gqa": 4, "mmbench_en": 2, "mmbench_cn": 3, "mme": 4, "pope": 2, "scienceqa": 2, "vqav2": 4, "textvqa": 3,
}  # fmt: skip
#: Drills of a pack of stage "drills"; beside questions: of the scene, picks and chooses, before and
#: after lettered questions begin.
ALONE, BESIDE, BESIDE_LATER = 48, (30, 16, 5), (30, 4, 2)
#: Scenes whose cells the connector is fitted to, and its steps.
ALIGN_SCENES, ALIGN_STEPS = 480, 600
#: Starting values: spread of a word's embedding; length of its mark in those of an embedding; from which of a
#: head's rotary frequencies, as a share of them, a word is compared with visual tokens.
SPREAD, MARK, SLOW_FROM = 0.5, 0.7, 0.56


def encode(family: PocketFamily, drill: Drill) -> Encoded:
    """What the packs hold of one question."""
    ids: list[int] = []
    asides = [IGNORE]
    for i, (text, thought) in enumerate(drill.pieces):
        text = family.lead * (drill.whole and i == 0) + text
        text += family.tail * (drill.whole and i == len(drill.pieces) - 1)
        tokens = family.ids(text)
        ids += tokens
        asides += [IGNORE] * len(tokens)
        if thought is not None:
            asides[-1] = family.ids(f" {thought}")[0]
    asides[-1] = IGNORE  # the last one is the answer
    reply = [*family.ids(f" {drill.pieces[-1][1]}"), family.tokenizer.eos_token_id]
    targets = [IGNORE] * len(ids) + reply
    return drill.kind, ids + reply, targets, asides + [IGNORE] * (len(reply) - 1), drill.looks


class Groups(IterableDataset):
    """Groups of BATCHES batches of `batch` scenes, from a step on: (first step, of each batch: pixels, grid,
    owner int64 [B, N], the Packs of its images in each round). A group is a function of the seed and its
    first step."""

    def __init__(
        self, family: PocketFamily, stage: str, seed: int, first: int, steps: int, batch: int
    ) -> None:
        self.family, self.stage, self.first, self.steps, self.batch = family, stage, first, steps, batch
        self.seed = seed + family.seed_offset + STREAMS[stage]

    def pack(self, lessons: Lessons, done: float) -> list[Encoded]:
        """One pack of questions at that share of the stage."""
        if self.stage == "drills":
            drills = (lessons.first_drills if done < FIRST_UNTIL else lessons.drills)(ALONE)
        else:
            drills = []
            for task, number in QUESTIONS.items():
                if task not in LETTERED or self.stage == "depth" or done >= LETTERED_FROM:
                    drills += lessons.questions(task, number)
            if self.stage == "questions" and done < BESIDE_UNTIL:
                of_scene, letters, both = BESIDE if done < LETTERED_FROM else BESIDE_LATER
                drills += lessons.drills(of_scene)
                drills += [*picks(lessons.rng, letters), *lessons.chooses(both)]
        # about a lone word no benchmark asks anything
        return [encode(self.family, drill) for drill in drills or lessons.drills(ALONE)]

    def scenes(self, step: int) -> tuple[list[Scene], list[list[list[Encoded]]]]:
        """The scenes of a batch that is asked at that step first, and for each of its rounds a pack for every
        scene."""
        rng = np.random.default_rng([2, self.seed, step])
        canvas = self.family.canvas(self.seed, step, small=False)
        scenes, lessons = [], []
        for i, regime in enumerate(regimes(rng, False, self.batch)):
            if self.stage == "drills" and step < CROWDS_FROM * self.steps and regime == "dense":
                regime = "medium"
            index = step * self.batch + i
            scenes.append(sample_scene("train", self.seed, index, regime, canvas))
            lessons.append(Lessons(scenes[-1], np.random.default_rng([3, self.seed, index])))
        asked_at = [(step + i * BATCHES) / self.steps for i in range(ROUNDS)]
        return scenes, [[self.pack(own, done) for own in lessons] for done in asked_at]

    def drawn(self, step: int):
        """The batch that is asked at that step first."""
        scenes, packs = self.scenes(step)
        pixels, grid = self.family.seen(scenes)
        owner = next(iter(self.family.labels(scenes, grid).values()))["owner"]
        pad = self.family.tokenizer.pad_token_id
        return pixels, grid, owner, [[collate([pack], pad) for pack in own] for own in packs]

    def __iter__(self):
        size = BATCHES * ROUNDS
        for first in range(self.first - self.first % size, self.steps, size):
            yield first, [self.drawn(first + i) for i in range(min(BATCHES, self.steps - first))]


def shown(stage: str, done: float) -> tuple[int, int] | None:
    """How many visual tokens of a thing, and of the background, the language model is shown at that share of
    a stage; None: all.

    One of a thing at first: what belongs to what is learnt sooner among few tokens.
    """
    if stage == "drills":
        per_thing = 1 + int(4 * done)
        return per_thing, 4 * per_thing
    if stage == "depth" or done >= SPARSE_UNTIL:
        return None
    return (4, 16) if done < SPARSER_UNTIL else (10_000, BACKGROUND)


def keep_some(owner: Tensor, per_thing: int, background: int, seed: int) -> Tensor:
    """Visual tokens to show, int64 [B, K], ascending: of each thing at random up to `per_thing`, and some
    `background`.

    owner: int64 [B, N], the number of the thing that a token belongs to, or -1. Images with fewer to show
    than the fullest of the batch get more background.
    """
    order = torch.rand(owner.shape, generator=torch.Generator().manual_seed(seed))
    same = owner[:, :, None] == owner[:, None]
    rank = (same & (order[:, None] < order[:, :, None])).sum(-1)
    wanted = (owner >= 0) & (rank < per_thing)
    k = min(owner.shape[1], int(wanted.sum(1).max()) + background)
    spare = (owner < 0) * 0.5
    return (wanted.float() * 2 + spare + 0.4 * order).topk(k, 1).indices.sort(1).values


def answer_loss(
    family: PocketFamily,
    model: nn.Module,
    features: Tensor,
    grid: tuple[int, int],
    keep: Tensor | None,
    packs: Packs,
    owner: Tensor | None = None,
    renumbered: bool = False,
) -> tuple[Tensor, dict[str, list[int]]]:
    """Loss over the answers of packed questions about images of one size, and [right, asked] of first answer
    tokens by kind.

    features: of `PocketFamily.features`, B images. keep: int64 [B, K], the visual tokens shown; None: all.
    owner: int64 [B, N], see `keep_some`, of one image (B = 1): the loss is also of where answers are looked
    for (`gaze_of`), with weight GAZE. renumbered: see `PocketFamily.positions`.
    """
    language, images = model.model.language_model, len(features)
    visual = family.visual(model, features)
    if keep is None:
        keep = torch.arange(visual.shape[1]).expand(images, -1)
    else:
        visual = visual.gather(1, keep[..., None].expand(-1, -1, visual.shape[-1]))
    embed = language.embed_tokens
    head, end = (embed(ids).expand(images, -1, -1) for ids in (family.head_ids, family.end_ids))
    prefix = head.shape[1] + visual.shape[1] + end.shape[1]
    gaze = None
    if owner is not None:
        owner = owner.gather(1, keep)
        gaze = gaze_of(packs, owner, head.shape[1], prefix, len(language.layers))
    x = torch.cat([head, visual, end, embed(packs.ids.flatten(1))], 1)
    with attention_of(language):
        hidden = language(
            inputs_embeds=x,
            attention_mask=torch.empty(1, 1, 0, 0),  # four-dimensional: it makes none of its own
            position_ids=family.positions(grid, keep, packs.offset.flatten(1), renumbered),
            use_cache=False,
            packed=PackLayout.of(packs, prefix, gaze),
        ).last_hidden_state[:, prefix:-1]
    segment, wanted = packs.segment.flatten(1), packs.wanted
    answers = wanted != IGNORE
    logits = model.lm_head(hidden[answers])
    loss = F.cross_entropy(logits, wanted[answers])
    if gaze is not None:
        loss = loss + GAZE * sum(gaze.losses) / len(gaze.losses)
    right = torch.zeros_like(answers)
    right[answers] = logits.detach().argmax(-1) == wanted[answers]
    score: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for b, s in zip(*packs.first.nonzero(as_tuple=True)):
        kind = packs.kinds[int(b)][int(segment[b, s + 1]) - 1]
        score[kind][0] += int(right[b, s])
        score[kind][1] += 1
    return loss, score


def gaze_of(packs: Packs, owner: Tensor, visual: int, prefix: int, depth: int) -> Gaze | None:
    """Of one image, for the middle half of the layers; None if no token shown holds an answer.

    owner: int64 [1, K], of the visual tokens shown. visual, prefix: places of the first of them and of the
    first question. depth: layers.
    """
    asked = packs.first[0].nonzero().flatten()
    numbers = packs.segment[0].flatten()[1:][asked] - 1
    looks = [packs.looks[0][n] or (frozenset(),) for n in numbers]
    halves = [[torch.tensor(sorted(look[i]), dtype=torch.int64) for look in looks] for i in (0, -1)]
    evidence = torch.stack([torch.stack([torch.isin(owner[0], own) for own in half]) for half in halves])
    there = evidence.any(-1).all(0)
    if not there.any():
        return None
    evidence = evidence[:, there] / evidence[:, there].sum(-1, keepdim=True)
    layers = range(depth // 4, max(1, 3 * depth // 4))
    return Gaze(layers, asked[there] + prefix, visual, evidence)


def step_gradients(
    threads: ThreadPoolExecutor,
    family: PocketFamily,
    model: nn.Module,
    features: Tensor,
    grid: tuple[int, int],
    keep: Tensor | None,
    packs: Sequence[Packs],
    owner: Tensor | None = None,
    renumbered: bool = False,
) -> tuple[Tensor, dict[str, float]]:
    """`answer_loss` of a step, and the share of right answers by kind; its gradients are left in `.grad`.

    threads: of one core each (`one_thread`). Each takes an image at a time, whose activations stay in a
    core's cache: nearly twice as fast as all images at once with every operation split over the cores.
    packs: of one image each. owner, renumbered: see `answer_loss`; no owner: no loss of where answers are
    looked for. Gradients are added up in the images' order, so they do not depend on which
    thread was first.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    answers = [int((own.wanted != IGNORE).sum()) for own in packs]

    def of_image(i: int) -> tuple[Tensor, dict[str, list[int]], tuple[Tensor, ...]]:
        own = slice(i, i + 1)
        shown = None if keep is None else keep[own]
        looked = None if owner is None else owner[own]
        loss, score = answer_loss(family, model, features[own], grid, shown, packs[i], looked, renumbered)
        loss = loss * (answers[i] / sum(answers))
        return loss.detach(), score, torch.autograd.grad(loss, trained)

    # set outside too: the first thread to end must not take the packed attention from the others
    with attention_of(model.model.language_model), one_thread():
        losses, scores, gradients = zip(*threads.map(of_image, range(len(packs))))
    for parameter, *grads in zip(trained, *gradients):
        parameter.grad = sum(grads[1:], grads[0])
    report = {}
    for kind in sorted(set().union(*scores)):
        right, asked = map(sum, zip(*(score[kind] for score in scores if kind in score)))
        report[kind] = right / asked
    return sum(losses), report


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, an operation is not split over the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def markers(width: int) -> Tensor:
    """Two directions of the embedding space, orthonormal float32 [2, width]: what all words start with, and
    what all visual tokens start with."""
    return torch.linalg.qr(torch.randn(width, 2, generator=torch.Generator().manual_seed(0))).Q.T


def start(model: nn.Module) -> None:
    """In half of the heads a word looks at the visual tokens that are like it and copies what they hold, in a
    quarter at the words before it, so that an answer knows the whole question.

    Only starting values, as those of the towers: everything is trained. Queries are equal to keys, so like
    finds like, on the rotary frequencies that hardly turn over an image, so it does at any distance; and a
    word is drawn to anything with the mark of visual tokens. Without that mark a word is most like itself:
    it looks at nothing else, and after 350 steps the image had not been used yet; with it, after 60.
    """
    language = model.model.language_model
    width, heads = language.config.hidden_size, language.config.num_attention_heads
    copied = 0.3 * (12 / len(language.layers)) ** 0.5
    word, image = markers(width)
    head = torch.arange(heads).repeat_interleave(width // heads)  # of each row of a projection
    looks, gathers = head < heads // 2, (head >= heads // 2) & (head < 3 * heads // 4)
    slow = torch.arange(width // heads) % (width // heads // 2) >= SLOW_FROM * (width // heads // 2)
    gain = torch.where(looks | gathers, torch.where(slow, 2.2, 0.1).repeat(heads), 0.4)[:, None]
    with torch.no_grad():
        language.embed_tokens.weight.normal_(0, SPREAD).add_(MARK * SPREAD * width**0.5 * word)
        model.lm_head.weight.copy_(0.3 * language.embed_tokens.weight)
        for layer in language.layers:
            attention, mlp = layer.self_attn, layer.mlp
            keys = attention.k_proj.weight.normal_(0, width**-0.5).mul_(gain)
            of_words, of_visual = keys @ word, keys @ image
            keys -= torch.where(gathers[:, None], torch.outer(of_visual, image), torch.outer(of_words, word))
            drawn = torch.where(gathers, of_words, of_visual * looks)
            attention.q_proj.weight.copy_(keys - torch.outer(keys @ image, image))
            attention.q_proj.weight *= torch.where(gathers, 0.2, 1.0)[:, None]
            attention.q_proj.weight += 2.5 * torch.outer(drawn, word)
            values = nn.init.orthogonal_(attention.v_proj.weight)
            attention.o_proj.weight.copy_(copied * values.T)
            values -= values @ torch.stack([word, image]).T @ torch.stack([word, image])
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
                if linear.bias is not None:
                    linear.bias.zero_()
            for linear in (mlp.gate_proj, mlp.up_proj):
                nn.init.xavier_uniform_(linear.weight)
            mlp.down_proj.weight.zero_()


def make_shallow(model: nn.Module) -> None:
    """Leave the language model a third of its layers; its configuration stays."""
    language = model.model.language_model
    language.layers = language.layers[: max(1, len(language.layers) // GROWTH)]


def deepen(model: nn.Module) -> None:
    """Give the language model its full number of layers: behind each, copies that at first add nothing, so
    that it says what it said."""
    language = model.model.language_model
    shallow, depth = language.layers, language.config.num_hidden_layers
    sources = [i * len(shallow) // depth for i in range(depth)]
    config = {id(language.config): language.config}  # stays one, of all layers
    language.layers = nn.ModuleList(copy.deepcopy(shallow[source], dict(config)) for source in sources)
    for i, layer in enumerate(language.layers):
        layer.self_attn.layer_idx = i
        if i and sources[i] == sources[i - 1]:
            nn.init.zeros_(layer.self_attn.o_proj.weight)
            nn.init.zeros_(layer.mlp.down_proj.weight)


def align(family: PocketFamily, model: nn.Module, seed: int, scenes: int, steps: int) -> float:
    """Teach the connector alone to put a cell where the words for its thing are in the embedding space.

    A cell's target is the sum of the embeddings of its thing's name, colour, texture, and what is written on
    it, and of the words for where its centre lies, in proportion to how far it lies from the middle, and the
    mark of visual tokens (`markers`). Returns the share of the targets' variance that is explained.
    """
    embeddings = model.model.language_model.embed_tokens.weight.detach()
    word, image = markers(embeddings.shape[1])
    embeddings = embeddings - torch.outer(embeddings @ word, word)

    def table(words: Sequence[str]) -> Tensor:
        ids = [family.ids(f" {word}")[-1] for word in words]
        return torch.cat([embeddings[ids], embeddings.new_zeros(1, embeddings.shape[1])])

    tables = {
        "name": table(NAMES),
        "colour": table(tuple(COLOURS)),
        "texture": table(TEXTURES),
        "written": table(TEXTS),
    }
    mark = 2.2 * MARK * SPREAD * embeddings.shape[1] ** 0.5 * image
    words = table(("left", "right", "above", "below", "top", "bottom"))
    axes = torch.stack([words[0] - words[1], words[2] - words[3] + words[4] - words[5]])
    inputs, targets = [], []
    read = next(iter(family.reads))
    for first in range(0, scenes, 8):
        canvas = family.canvas(seed + 5, first // 8, small=False)
        stream = seed + family.seed_offset + 5
        drawn = [sample_scene("train", stream, first + i, canvas=canvas) for i in range(8)]
        pixels, grid = family.seen(drawn)
        labels = family.labels(drawn, grid)[read]
        with torch.no_grad():
            features = family.features(model, pixels, grid)
        row, column = torch.cartesian_prod(*map(torch.arange, grid)).T
        middle = torch.stack([column, row], 1) + 0.5
        place = (labels["offset"] + middle) / torch.tensor([grid[1], grid[0]])
        target = mark + 2 * (0.5 - place) @ axes
        for key, vectors in tables.items():
            known = labels[key].clamp(min=-1)
            target += vectors[torch.where(known < 0, len(vectors) - 1, known)]
        on_thing = labels["owner"] >= 0
        inputs.append(features.unflatten(1, (on_thing.shape[1], -1))[on_thing])
        targets.append(target[on_thing])
    x, y = torch.cat(inputs), torch.cat(targets)
    connector = family.connector(model)
    family.start_connector(model, float(x.square().mean()) ** 0.5)
    optimiser = torch.optim.AdamW(connector.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(x), (2048,), generator=generator)
        loss = F.mse_loss(family.visual(model, x[rows]).flatten(0, 1), y[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return 1 - float(loss.detach() / y.var(0).mean())


def train(family: PocketFamily, stage: TrainingStage, model: nn.Module, seed: int, batch: int) -> None:
    """From where `stage` is to its end, or to where it has to stop."""
    stage.columns = ("loss", "grad_norm", *documents.tasks(), *DRILLS)
    groups = Groups(family, stage.name, seed, stage.step, stage.steps, batch)
    loader = DataLoader(groups, batch_size=None, num_workers=1, prefetch_factor=1, collate_fn=tuple)
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        for first, batches in loader:
            with torch.no_grad():
                features = [family.features(model, pixels, grid) for pixels, grid, _, _ in batches]
            for step in range(max(first, stage.step), min(first + BATCHES * ROUNDS, stage.steps)):
                turn, at = divmod(step - first, BATCHES)
                _, grid, owner, packs = batches[at]
                show = shown(stage.name, step / stage.steps)
                keep = keep_some(owner, *show, seed=seed * 1_000_003 + step) if show else None
                looked = owner if keep is not None else None
                renumbered = stage.name == "questions" and keep is not None and turn % 2 == 1
                loss, report = step_gradients(
                    threads, family, model, features[at], grid, keep, packs[turn], looked, renumbered
                )
                if not stage.advance(loss, report, every=25):
                    return
