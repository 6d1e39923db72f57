"""DiffPrune on tiny models: what it keeps, what trains it, and the way from `train` to a pruned model."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from harness.cli import app, policies
from harness.costs import plan
from harness.pocket.supplies import Pocket8
from methods import learned, registry
from methods.diffprune.objective import OneShotObjective
from methods.diffprune.policy import Scorer, ScorerConfig
from methods.errors import UserError
from methods.stepprune import checkpoint as checkpoints
from methods.stepprune.gate import LocalDenoiser
from methods.stepprune.training import calibrate, train
from methods.stepprune.training.data import Collator
from methods.stepprune.training.objective import FrozenModel, Step

PROMPTS = ["Is there a red box?", "What?", "Is there a box in the image? Answer yes or no.", "A"]
STEP = Step(1.0, 1.0, 0.0, 9.0, seed=5)


def noise(size: tuple[int, int], seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def write(path, text=False, width=32):
    torch.manual_seed(0)
    calibration = {32: [(4.0, 1.5), (30.0, -0.5)], 64: [(4.0, 0.0), (30.0, -3.0)]}[width]
    config = ScorerConfig(width, width, text, heads=4)
    found = checkpoints.Checkpoint(path, config, "tiny", 12.0, calibration, visual_tokens=20.0)
    policy = config.build()
    with torch.no_grad():  # as wild as a trained one: attention is not flat, words are no dust
        for block in policy.encoder.blocks:
            block.qkv.weight.mul_(5)
        if text:
            policy.encoder.text.weight.mul_(100)
    found.save(policy, LocalDenoiser(width))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Untrained policies by whether they read text, and by the models' widths."""
    folder = tmp_path_factory.mktemp("policy")
    return {
        (text, width): write(folder / str(width) / f"k12{'-text' * text}.safetensors", text, width)
        for text in (False, True)
        for width in (32, 64)
    }


def spec(files, text=False, width=32, **settings):
    more = "".join(f",{k}={str(v).lower()}" for k, v in ({"text": text} | settings).items())
    return f"diffprune:checkpoint={files[text, width]}{more}"


#: width, images, their visual tokens
CASES = {
    "backbone": (32, [(112, 112)] * 4, [64] * 4),
    "qwen": (64, [(84, 112), (140, 56), (112, 140), (56, 56)], [12, 10, 20, 4]),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("settings", [{}, {"threshold": True}, {"text": True}], ids=str)
@torch.no_grad()
def test_a_batch_keeps_what_each_keeps_alone(request, files, name, settings):
    """The best b in spatial order, all of an image that has fewer; else a board depends on its batch."""
    backbone, (width, sizes, tokens) = request.getfixturevalue(name), CASES[name]
    images = [noise(size, seed) for seed, size in enumerate(sizes)]
    pruner = registry.build(spec(files, width=width, **settings), 11)
    with pruner(backbone.model) as trace:
        backbone.model(**backbone.inputs(images, PROMPTS), logits_to_keep=1)
    together = [k[0].tolist() for k in trace.kept]
    for b, (image, prompt) in enumerate(zip(images, PROMPTS)):
        with pruner(backbone.model) as alone:
            backbone.model(**backbone.inputs([image], [prompt]), logits_to_keep=1)
        assert alone.kept[0][0].tolist() == together[b] == sorted(set(together[b]))
    counts = [len(k) for k in together]
    if pruner.threshold:
        assert len(set(counts)) > 1 and all(1 <= k <= n for k, n in zip(counts, tokens))
    else:
        assert counts == [min(11, n) for n in tokens]


@torch.no_grad()
def test_it_keeps_the_best_scored(backbone, files):
    image = noise((112, 112), 0)
    inputs = backbone.inputs([image], ["What?"])
    with registry.build(spec(files), 11)(backbone.model) as trace:
        backbone.model(**inputs, logits_to_keep=1)
    features = FrozenModel(backbone.model, backbone.adapter).features(
        {"pixel_values": inputs["pixel_values"]}
    )
    scores = checkpoints.read(files[False, 32], ScorerConfig).load()[0](features[0][0][None], None)[0]
    assert trace.kept[0][0].tolist() == sorted(scores.topk(11).indices.tolist())


@torch.no_grad()
def test_only_with_text_does_the_question_count(backbone, files):
    image = noise((112, 112), 0)
    for text in (False, True):
        pruner = registry.build(spec(files, text), 11)
        assert pruner.independent_of_text != text
        with pruner(backbone.model) as trace:
            backbone.model(**backbone.inputs([image] * 2, [PROMPTS[0], PROMPTS[2]]), logits_to_keep=1)
        assert (trace.kept[0][0].tolist() != trace.kept[1][0].tolist()) == text
    with pytest.raises(UserError, match="k12 does not read the prompt; set text=false"):
        registry.build(f"diffprune:checkpoint={files[False, 32]},text=true", 11).resources(backbone.model)


def test_a_threshold_is_calibrated_and_a_budget_is_not(backbone, files):
    assert "score_threshold" not in registry.build(spec(files), 60).resources(backbone.model)
    pruner = registry.build(spec(files, threshold=True), 17)
    assert (
        pruner.resources(backbone.model)["score_threshold"] == pytest.approx(0.5) and pruner.may_exceed_budget
    )
    with pytest.raises(UserError, match=r"k12 is not calibrated .* calibrate diffprune"):
        registry.build(spec(files, threshold=True), 60).resources(backbone.model)


def test_another_methods_policy_is_refused(files, tmp_path):
    for method, other, kind in (("stepprune", "diffprune", None), ("diffprune", "stepprune", ScorerConfig)):
        path = tmp_path / f"{method}.safetensors"
        write(path)
        if kind is not None:
            body = json.loads(path.with_suffix(".json").read_text())
            path.with_suffix(".json").write_text(json.dumps(body | {"method": other}))
        with pytest.raises(UserError, match=f"{method}: .* describes a policy of {other}"):
            registry.build(f"{method}:checkpoint={path}", 11)


def test_without_a_policy_it_is_left_out_by_name(backbone):
    with pytest.raises(UserError, match=r"harness train diffprune --backbone tiny-llava .*--text on"):
        registry.build("diffprune:text=true", 12).resources(backbone.model)
    assert registry.build("diffprune").resources(backbone.model) == {}


def test_its_costs_are_planned_without_weights(backbone):
    """Encoder and head over N tokens, the same at every budget; words cost more."""
    config = backbone.model.config
    own = [plan.make(config, registry.build("diffprune", b), (8, 8), 5, 7).own for b in (8, 24)]
    n, d = 64, config.vision_config.hidden_size
    assert own == [2 * (12 * n * d * d + 2 * n * n * d) + n * d] * 2
    read = plan.make(config, registry.build("diffprune:text=true", 8), (8, 8), 5, 7)
    assert read.own > own[0] and read.visual_tokens[0] == 8 and not read.varies


# ---- training


@pytest.fixture(scope="module")
def own(tiny_checkpoint):
    """A model of this module's own: FrozenModel freezes it."""
    import backbones

    return backbones.load(str(tiny_checkpoint))


@pytest.fixture(scope="module")
def frozen(own):
    return FrozenModel(own.model, own.adapter)


@pytest.fixture(scope="module")
def batch(own, frozen):
    source = Pocket8(questions=2)
    return Collator(own, frozen)([source[0], source[1]])


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("k_from", ["sample", "batch"])
def test_gates_sum_to_the_budget_and_train_the_scorer(frozen, batch, k_from, text):
    torch.manual_seed(0)
    policy = Scorer(ScorerConfig(frozen.width, frozen.text_width, text, heads=4))
    objective = OneShotObjective(policy, LocalDenoiser(frozen.width), frozen, 9.0, k_from)
    outcome = objective(batch, STEP)
    outcome.loss.backward()
    for name, p in objective.named_parameters():
        # the gates do not depend on a common offset of an image's scores
        assert name == "policy.head.bias" or p.grad.abs().max() > 0 or name.startswith("denoiser"), name
    assert objective.denoiser.out.weight.grad.abs().max() > 0
    assert not any(p.grad is not None for p in frozen.model.parameters())
    sums = outcome.gates.sum(1)
    if k_from == "sample":
        torch.testing.assert_close(sums, torch.full((4,), 9.0), rtol=1e-3, atol=1e-2)
    else:
        assert math.isclose(float(sums.sum()), 36, rel_tol=1e-3) and sums.std() > 1e-3
    assert outcome.count.tolist() == [9] * 4
    assert calibrate.counts(outcome.margins, 0.0).tolist() == [9] * 4


def test_sharp_gates_are_the_best(frozen, batch):
    torch.manual_seed(0)
    policy = Scorer(ScorerConfig(frozen.width, frozen.text_width, heads=4))
    objective = OneShotObjective(policy, LocalDenoiser(frozen.width), frozen, 9.0)
    choices, gates = objective.chosen(batch, Step(1.0, 3e4, 0.0, 9.0, 0))
    for row, kept in zip(gates, choices.kept()):
        assert (row > 0.5).nonzero()[:, 0].tolist() == kept.tolist()


@pytest.fixture
def few_held_out(monkeypatch):
    """Two held-out images instead of 48."""
    original = train.held_out
    monkeypatch.setattr(train, "held_out", lambda s, b, f, images=2: original(s, b, f, 2))


def test_from_the_command_to_a_pruned_model(
    own, tiny_checkpoint, tmp_path, few_held_out, monkeypatch, capsys
):
    """In one go and in two the same bytes; then found for the backbone, at another budget, by threshold."""
    monkeypatch.setattr(checkpoints, "folder", lambda kind: tmp_path / kind.method)
    command = [
        "train",
        "diffprune",
        "--backbone",
        str(tiny_checkpoint),
        "--target-tokens",
        "8",
        "--text",
        "on",
    ]
    command += ["--steps", "2", "--batch-size", "4", "--questions", "2", "--warmup", "1", "--log-every", "1"]
    command += ["--device", "cpu"]
    whole = tmp_path / "diffprune" / tiny_checkpoint.name / "k8-text.safetensors"
    parts = tmp_path / "parts.safetensors"
    assert app.main(command) == 0
    for more in (["--stop-at", "1", "--save-every", "1"], ["--resume"]):
        assert app.main([*command, "--out", str(parts), *more]) == 0
    assert whole.read_bytes() == parts.read_bytes()
    curves = [pd.read_csv(path.with_suffix(".csv")) for path in (whole, parts)]
    pd.testing.assert_frame_equal(*curves, check_exact=True)
    assert (curves[0]["count"] == 8).all() and {"grad_head", "grad_text"} <= set(curves[0])
    assert "grad_pointer" not in curves[0]
    found = checkpoints.read(whole, ScorerConfig)
    assert found.training["method"] == "diffprune" and found.training["final_sharpness"] == 5.0
    summary = json.loads(whole.with_suffix(".summary.json").read_text())
    assert "hard, by threshold" in summary["pathways"] and abs(summary["mean_tokens"] - 8) < 0.6
    inputs = own.inputs([noise((112, 112), s) for s in (0, 1)], PROMPTS[:2])
    for more, counts in (("", {12}), (",threshold=true", None)):
        with torch.no_grad(), registry.build(f"diffprune:text=true{more}", 12)(own.model) as trace:
            own.model(**inputs, logits_to_keep=1)
        assert counts in (None, set(trace.visual_tokens[:, -1].tolist()))
    capsys.readouterr()
    calibrated = ["calibrate", "diffprune", "--backbone", str(tiny_checkpoint), "--checkpoint", str(whole)]
    assert app.main([*calibrated, "--tokens", "21", "--images", "2"]) == 0
    assert "mean 21: bias" in capsys.readouterr().out
    assert 21 in [round(k) for k, _ in checkpoints.read(whole, ScorerConfig).calibration]


def test_options_that_say_nothing_to_it_are_refused(capsys):
    assert app.main(["train", "diffprune", "--target-tokens", "8", "--gamma", "0.9"]) == 2
    assert capsys.readouterr().err == "error: --gamma says nothing to diffprune; leave it out\n"
    assert app.main(["train", "diffprune", "--length-weight", "0.1"]) == 2
    assert "--length-weight says nothing to diffprune" in capsys.readouterr().err


def test_a_method_is_learned_by_having_the_module():
    """Nothing in the harness names the methods; each module has all that the trainer asks for."""
    assert learned.names() == ("diffprune", "stepprune")
    wanted = {n for n in vars(learned.Learned) if not n.startswith("_")} | set(
        learned.Learned.__annotations__
    )
    for name in learned.names():
        method = learned.find(name)
        assert all(hasattr(method, attribute) for attribute in wanted), name
        assert method.kind().method == name and set(policies.Training.__annotations__) >= method.UNUSED
    with pytest.raises(UserError, match="'fastv' is no learned method; known: diffprune, stepprune"):
        learned.find("fastv")
