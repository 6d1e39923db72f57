"""The training pathway where images differ in size: Qwen2.5-VL's merged tokens and M-RoPE positions."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image

from harness.pocket.supplies import PocketSupplies
from methods.stepprune import StepPrune
from methods.stepprune import checkpoint as checkpoints
from methods.stepprune.gate import LocalDenoiser
from methods.stepprune.policy import Policy, PolicyConfig
from methods.stepprune.training.data import Collator, Example
from methods.stepprune.training.objective import (
    IGNORE,
    FrozenModel,
    Objective,
    ObjectiveConfig,
    Step,
    compare_pathways,
)
from methods.stepprune.training.train import TrainOptions, initialise, start_at, train

STEP = Step(1.0, 3.0, 0.1, 4.0, seed=5)
SIZES = ((112, 84), (56, 140), (140, 112))


def example(size: tuple[int, int], seed: int, questions: int = 2) -> Example:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (*size[::-1], 3)).astype("uint8")
    asked = tuple((f"What is number {i}?", f"A {'very ' * i}red box.") for i in range(questions))
    return Example(Image.fromarray(pixels), asked)


@pytest.fixture(scope="module")
def own(tiny_qwen_checkpoint):
    """A model of this module's own: FrozenModel freezes it."""
    import backbones

    return backbones.load(str(tiny_qwen_checkpoint))


@pytest.fixture(scope="module")
def frozen(own):
    return FrozenModel(own.model, own.adapter)


@pytest.fixture(scope="module")
def batch(own, frozen):
    return Collator(own, frozen)([example(size, i) for i, size in enumerate(SIZES)])


@pytest.fixture(scope="module")
def objective(frozen, batch):
    torch.manual_seed(0)
    policy = Policy(PolicyConfig(frozen.width, frozen.text_width, heads=4, max_steps=12))
    initialise(policy, frozen, batch)
    start_at(policy, frozen, batch, 4)
    return Objective(policy, LocalDenoiser(frozen.width), frozen, ObjectiveConfig(0.95, k_from="sample"))


def test_sizes_and_padding(batch):
    assert batch.visual_tokens.tolist() == [12, 12, 10, 10, 20, 20]
    assert batch.features.shape[1] == 20 and not batch.features[~batch.valid].any()
    assert batch.positions.shape[:2] == (3, 6)


def test_loss_is_the_models_own(own, frozen, batch):
    """On all tokens: what the model says with labels and its own positions, image by image."""
    losses, counts = [], []
    for b, size in enumerate(size for size in SIZES for _ in range(2)):
        pixels = own.processor.image_processor([example(size, b // 2).image], return_tensors="pt")
        n = int(batch.visual_tokens[b])
        image = torch.full((n,), own.model.config.image_token_id)
        ids = torch.cat([batch.before, image, batch.after[b]])[None]
        labels = torch.cat([torch.full((len(batch.before) + n,), IGNORE), batch.targets[b]])[None]
        kinds = (ids == own.model.config.image_token_id).int()
        with torch.no_grad():
            out = own.model(input_ids=ids, mm_token_type_ids=kinds, labels=labels, **pixels)
        losses.append(float(out.loss))
        counts.append(int((labels != IGNORE).sum()))
    wanted = sum(x * c for x, c in zip(losses, counts)) / sum(counts)
    assert math.isclose(float(frozen.loss(batch, batch.features)[0]), wanted, rel_tol=1e-4)


@pytest.mark.parametrize("slots", [None, 14])
def test_padding_is_never_chosen_gated_or_read(frozen, batch, objective, slots):
    words, valid_words = frozen.words(batch)
    memory = objective.policy.remember(batch.features, words, batch.valid, valid_words)
    choices = objective.policy.decode(memory)
    for kept, n in zip(choices.kept(), batch.visual_tokens.tolist()):
        assert len(kept) and int(kept.max()) < n
    changed = batch.features.masked_fill(~batch.valid[..., None], 9.0)
    other = Objective(
        objective.policy, objective.denoiser, frozen, ObjectiveConfig(0.95, k_from="sample", slots=slots)
    )
    ones, others = other(batch, STEP), other(replace(batch, features=changed), STEP)
    assert not ones.gates[~batch.valid].any()
    torch.testing.assert_close(ones.loss, others.loss)


def test_each_image_alone_is_the_same(own, frozen, batch, objective):
    """Hard pathway: the loss of the batch is that of its images, weighted by their answers' tokens."""
    losses, counts = [], []
    for i, size in enumerate(SIZES):
        alone = Collator(own, frozen)([example(size, i)])
        assert alone.valid is None
        losses.append(compare_pathways(objective, alone, STEP)["hard"][0])
        counts.append(int((alone.targets != IGNORE).sum()))
    together = compare_pathways(objective, batch, STEP)["hard"][0]
    wanted = sum(x * c for x, c in zip(losses, counts)) / sum(counts)
    assert math.isclose(together, wanted, rel_tol=1e-4)


def test_gradients(frozen, batch, objective):
    objective.zero_grad(set_to_none=True)
    objective(batch, STEP).loss.backward()
    assert objective.policy.stop.grad.abs().sum() > 0
    assert all(p.grad is None for p in frozen.model.parameters())


@dataclass
class Source:
    """Endless examples of three sizes."""

    def __getitem__(self, i: int) -> Example:
        return example(SIZES[i % 3], i)


def test_a_trained_checkpoint_prunes(tiny_qwen_checkpoint, tmp_path, monkeypatch, own):
    """From training to `with StepPrune(...)`, with a budget that is a share."""
    from methods.stepprune.training import train as module

    monkeypatch.setattr(module, "data_source", lambda *_: Source())
    monkeypatch.setattr(
        module,
        "held_out",
        lambda s, b, f, images=3: iter([Collator(b, f)([example(s, i) for i, s in enumerate(SIZES)])]),
    )
    options = TrainOptions(
        out=tmp_path / "q.safetensors", backbone=str(tiny_qwen_checkpoint), target_tokens=4, steps=3,
        batch_size=6, questions=2, warmup=1, log_every=1, device="cpu", max_steps=21,
    )  # fmt: skip
    train(options, PocketSupplies())
    assert checkpoints.read(options.out).visual_tokens == pytest.approx(14)
    inputs = own.inputs([example(size, 0).image for size in SIZES], ["What is it?"] * 3)
    with StepPrune(budget=0.3, checkpoint=str(options.out))(own.model) as trace:
        own.model.generate(**inputs, max_new_tokens=2, do_sample=False)
    counts = trace.visual_tokens[:, -1].tolist()
    assert all(0 <= k <= n for k, n in zip(counts, (12, 10, 20)))
