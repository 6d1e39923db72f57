"""What a policy learns from and how fast its parts move: words, learned vectors, length, evidence."""

import math
from dataclasses import replace

import pandas as pd
import pytest
import torch

from harness.pocket.supplies import EvidencePocket8, PocketSupplies
from methods import learned
from methods.errors import UserError
from methods.stepprune import checkpoint as checkpoints
from methods.stepprune.policy import Policy, PolicyConfig
from methods.stepprune.training import train as train_module
from methods.stepprune.training.data import Collator, Example
from methods.stepprune.training.objective import FrozenModel, Step, still_wanted, until_found
from methods.stepprune.training.train import TrainOptions, parameter_groups, start_words, train
from methods.views import cells

LEARNED = ("policy.stop", "policy.start", "policy.encoder.text.weight", "policy.encoder.text_offset")


def model_of(checkpoint):
    """With what freezes it: a model of this module's own."""
    import backbones

    own = backbones.load(str(checkpoint))
    return own, FrozenModel(own.model, own.adapter)


@pytest.fixture(scope="module")
def llava(tiny_checkpoint):
    return model_of(tiny_checkpoint)


@pytest.fixture(scope="module")
def qwen_model(tiny_qwen_checkpoint):
    return model_of(tiny_qwen_checkpoint)


def batch_of(own, frozen, images=3):
    source = EvidencePocket8(questions=2, varied=own.family.any_size)
    return Collator(own, frozen)([source[i] for i in range(images)])


@pytest.fixture(scope="module")
def batch(llava):
    return batch_of(*llava)


def options(out=None, method="stepprune", **changes) -> TrainOptions:
    settings = dict(steps=4, batch_size=4, questions=2, warmup=1, log_every=1, device="cpu", cost=False)
    if "length_weight" not in changes:
        settings["target_tokens"] = 8
    return TrainOptions(out=out, **learned.settled(method, settings | changes))


def objective_of(given: TrainOptions, frozen, batch):
    return learned.find(given.method).new_objective(given, frozen, batch)


# ---- words


def likeness(frozen, batch, source) -> tuple[float, float]:
    """How far words and patches that are alike for the language model are so in the tower's space, too (rank
    correlation, -1 to 1), and the scale of the words there."""
    encoder = objective_of(options(), frozen, batch).policy.encoder
    torch.manual_seed(1)
    start_words(encoder, frozen, batch, source)
    rows = batch.features.flatten(0, 1) if batch.valid is None else batch.features[batch.valid]
    words, valid = frozen.words(batch)
    with torch.no_grad():
        there = (words[valid] @ frozen.adapter.project(rows).T).flatten()
        moved = encoder.text(words[valid])
    here = (moved @ rows.T).flatten()
    ranks = torch.stack([x.argsort().argsort().double() for x in (there, here)])
    return float(torch.corrcoef(ranks)[0, 1]), float(moved.square().mean().sqrt())


@pytest.mark.parametrize("name", ["llava", "qwen_model"])
def test_words_start_as_near_to_patches_as_the_language_model_has_them(request, name):
    own, frozen = request.getfixturevalue(name)
    batch = batch_of(own, frozen)
    (near, scale), (far, other) = (likeness(frozen, batch, source) for source in ("patches", "random"))
    assert near > 0.9 and abs(far) < 0.5
    assert (scale, other) == pytest.approx((1, 1), rel=0.2), "the text offset counts on words of unit scale"


def test_on_the_shipped_backbone_a_word_starts_at_the_things_it_names():
    """A colour's or a shape's word against the patches of all things: the share of pairs that it orders
    right."""
    import backbones
    from harness.drawings.scenes import render, sample_scene

    own = backbones.load("pocket-llava")
    frozen, tokenizer = FrozenModel(own.model, own.adapter), own.processor.tokenizer
    scenes = [s for s in (sample_scene("train", 7, i) for i in range(30)) if len(s.objects) > 3][:6]
    batch = Collator(own, frozen)([Example(render(s), (("Which?", "None"),)) for s in scenes])
    embedding, found = own.model.get_input_embeddings(), {}
    for source in ("patches", "random"):
        torch.manual_seed(0)
        encoder = Policy(PolicyConfig(frozen.width, frozen.text_width)).encoder
        start_words(encoder, frozen, batch, source)
        shares = found.setdefault(source, [])
        for scene, rows in zip(scenes, torch.nn.functional.normalize(batch.features, dim=-1)):
            boxes = {t: tuple(side / 336 for side in t.box) for t in scene.objects}
            for word in {w for t in scene.objects for w in (t.colour, t.name)}:
                named, others = (
                    torch.from_numpy(
                        cells([b for t, b in boxes.items() if (word in (t.colour, t.name)) == is_it], 24, 24)
                    )
                    for is_it in (True, False)
                )
                ids = torch.tensor(tokenizer(f" {word}", add_special_tokens=False)["input_ids"])
                with torch.no_grad():
                    like = (rows @ encoder.text(embedding(ids)).T).amax(1)
                named, others = named.ravel(), (others & ~named).ravel()
                if others.any():
                    shares.append(float((like[named][:, None] > like[others]).float().mean()))
    shares = {source: sum(own) / len(own) for source, own in found.items()}
    assert shares["patches"] > 0.9 and shares["random"] < 0.7, shares


def test_words_count_before_the_learning_rate_is_at_its_highest():
    given = TrainOptions(out=None, target_tokens=64)
    full = next(s for s in range(given.steps) if train_module.text_gate(given, s) == 1)
    assert full < given.warmup < given.steps / 2
    late = TrainOptions(out=None, target_tokens=64, text_gate_until=1.0)
    assert train_module.text_gate(late, late.steps // 2) == 0.5


# ---- rates


@pytest.mark.parametrize("token_lr", [0.02, 0.0])
def test_learned_vectors_and_words_move(llava, batch, token_lr):
    """At the layers' rate the stop embedding moved by 0.6 % in a whole run, W_p by 2.6 %."""
    _, frozen = llava
    given = options(token_lr=token_lr)
    objective = objective_of(given, frozen, batch)
    before = {n: p.detach().clone() for n, p in objective.named_parameters()}
    optimiser = torch.optim.AdamW(parameter_groups(objective, given))
    for seed in range(5):
        objective(batch, Step(1.0, 0.3, 0.0, 8.0, seed)).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    for name in LEARNED:
        now = objective.get_parameter(name).detach()
        moved = float((now - before[name]).norm() / before[name].norm())
        assert (0.03 < moved < 0.15) if token_lr else moved < 0.01, (name, moved)
    other = objective.policy.decoder[0].key.weight.detach()
    assert 0 < float((other - before["policy.decoder.0.key.weight"]).abs().max()) < 6 * given.lr


# ---- length


def test_what_a_length_mode_goes_with():
    assert (options().length_mode, options().k_from) == ("held", "sample")
    paper = options(length_weight=0.1)
    assert (paper.length_mode, paper.k_from) == ("paper", "batch")
    assert options(length_weight=0.1, k_from="sample").k_from == "sample"
    for changes, words in (
        (dict(length_mode="paper"), "--length-mode paper goes with --length-weight"),
        (dict(length_mode="held", length_weight=0.1), "--length-mode held goes with --target-tokens"),
        (dict(supervise="evidence", drawn="v1"), "--supervise evidence needs data that has it"),
    ):
        with pytest.raises(UserError, match=words):
            options(**changes)


def test_the_papers_length_term_shortens_and_k_bar_is_the_running_mean(llava, batch):
    """Eq. 15 at two lambdas on one batch; Eq. 12's k is the batch's running mean, not a sample's own."""
    _, frozen = llava
    lengths = {}
    for weight in (0.0, 20.0):
        given = options(length_weight=weight, lr=2e-3)
        objective = objective_of(given, frozen, batch)
        optimiser = torch.optim.AdamW(parameter_groups(objective, given))
        bias = float(objective.policy.stop_bias)
        for seed in range(5):
            outcome = objective(batch, Step(1.0, 0.3, weight, 9.0, seed))
            assert outcome.gates.sum(1).tolist() == pytest.approx([9.0] * len(batch), rel=1e-3)
            outcome.loss.backward()
            optimiser.step()
            optimiser.zero_grad()
        lengths[weight] = float(outcome.expected)
        assert not learned.find("stepprune").holds(given) and float(objective.policy.stop_bias) == bias
    assert lengths[20.0] < 0.8 * lengths[0.0]


# ---- evidence


@pytest.mark.parametrize("name", ["llava", "qwen_model"])
def test_evidence_is_the_patches_below_its_boxes(request, name):
    own, frozen = request.getfixturevalue(name)
    batch, source = batch_of(own, frozen), EvidencePocket8(questions=2, varied=own.family.any_size)
    row = 0
    for i in range(3):
        example = source[i]
        pixels = own.processor.image_processor([example.image], return_tensors="pt")
        (grid,) = frozen.features(pixels)[1]
        for boxes in example.evidence:
            wanted = torch.from_numpy(cells(boxes, *grid).ravel())
            assert wanted.any() and torch.equal(batch.evidence[row, : len(wanted)], wanted)
            assert not batch.evidence[row, len(wanted) :].any()
            row += 1
    assert len(batch.rows(slice(1, 3)).evidence) == 2


def test_each_step_wants_the_evidence_that_is_left_then_the_stop():
    evidence = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).bool()
    path = until_found(torch.tensor([[3, 2, 1, 0], [0, 1, 2, 3], [0, 1, 2, 3]]), evidence, stop=4)
    assert path.count.tolist() == [3, 1, 4] and path.order.tolist()[1] == [0, 4, 4, 4]
    wanted = [[set(step.nonzero()[:, 0].tolist()) for step in row] for row in still_wanted(path, evidence)]
    assert wanted[0] == [{1, 2}, {1, 2}, {1}, {4}]
    assert wanted[1][:2] == [{0}, {4}]
    assert wanted[2] == [{0, 1, 2, 3}, {1, 2, 3}, {2, 3}, {3}]
    assert path.running.sum(1).tolist() == [4, 2, 4], "the step that should stop counts"


@pytest.mark.parametrize("method", ["stepprune", "diffprune"])
def test_evidence_teaches_to_find_it(llava, batch, method):
    """The upper bound of the architecture; StepPrune learns to stop where it ends, too. No language model
    runs."""
    _, frozen = llava
    size = float(batch.evidence.sum(1).float().mean())
    given = options(method=method, supervise="evidence", lr=3e-3, target_tokens=math.ceil(size), text="on")
    objective = objective_of(given, frozen, batch)
    trained = [p for p in objective.parameters() if p.requires_grad]
    assert not any(p.requires_grad for p in objective.denoiser.parameters())
    optimiser = torch.optim.AdamW(trained, lr=3e-3)
    found = []
    for seed in range(40):
        outcome = objective(batch, Step(1.0, 0.3, 0.0, 8.0, seed))
        found.append(float(outcome.recall))
        outcome.loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert found[-1] > max(0.6, found[0] + 0.3), found
    if method == "stepprune":
        assert float(outcome.count.float().mean()) == pytest.approx(size, rel=0.5)


@pytest.mark.parametrize("changes", [dict(length_weight=0.5), dict(supervise="evidence")], ids=str)
def test_resumed_is_the_same_to_the_byte(tiny_checkpoint, tmp_path, monkeypatch, changes):
    original = train_module.held_out
    monkeypatch.setattr(train_module, "held_out", lambda s, b, f, images=2: original(s, b, f, 2))
    whole, parts = (
        options(
            tmp_path / f"{name}.safetensors", backbone=str(tiny_checkpoint), steps=2, batch_size=2, **changes
        )
        for name in ("whole", "parts")
    )
    train(whole, PocketSupplies())
    train(replace(parts, stop_at=1), PocketSupplies())
    train(replace(parts, resume=True), PocketSupplies())
    assert whole.out.read_bytes() == parts.out.read_bytes()
    curves = [pd.read_csv(o.log) for o in (whole, parts)]
    pd.testing.assert_frame_equal(*curves, check_exact=True)
    assert curves[0]["stop_bias"].nunique() == 1, "nothing but the gradient moves the length"
    assert (
        curves[0]["recall"].notna().all()
        == (whole.supervise == "evidence")
        == curves[0]["lm_loss"].isna().all()
    )
    assert checkpoints.read(whole.out).training["length_mode"] == whole.length_mode
