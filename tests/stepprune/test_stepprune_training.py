"""The training pathway on a tiny model: what gets a gradient, resuming, data formats, calibration."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from harness.cli import app, policies
from harness.pocket.supplies import Pocket8, PocketSupplies
from methods import learned
from methods.errors import UserError
from methods.stepprune import checkpoint as checkpoints
from methods.stepprune.gate import LocalDenoiser
from methods.stepprune.policy import Policy, PolicyConfig, counts, cut_at
from methods.stepprune.training import ablate, calibrate
from methods.stepprune.training import train as train_module
from methods.stepprune.training.data import Collator, LlavaInstructions
from methods.stepprune.training.objective import (
    IGNORE,
    FrozenModel,
    Objective,
    ObjectiveConfig,
    Step,
    compare_pathways,
)
from methods.stepprune.training.train import (
    LengthControl,
    TrainOptions,
    initialise,
    learning_rate,
    new_objective,
    start_at,
    text_gate,
    train,
)

STEP = Step(1.0, 3.0, 0.1, 8.0, seed=5)


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


def make(frozen, batch=None, tokens=8, **settings) -> Objective:
    torch.manual_seed(0)
    policy = Policy(PolicyConfig(frozen.width, frozen.text_width, heads=4, max_steps=20))
    if batch is not None:
        initialise(policy, frozen, batch)
        start_at(policy, frozen, batch, tokens)
    return Objective(policy, LocalDenoiser(frozen.width), frozen, ObjectiveConfig(0.95, **settings))


# ---- data


def test_pocket8_examples_are_functions_of_their_index():
    one, two = Pocket8(questions=8)[3], Pocket8(questions=8)[3]
    assert one.asked == two.asked and one.image.tobytes() == two.image.tobytes() and one.things > 0
    assert Pocket8(questions=8, seed=1)[3].asked != one.asked
    prompts = " ".join(prompt for prompt, _ in one.asked)
    assert "单" not in prompts and len({p for p, _ in one.asked}) == 8
    assert all(answer for _, answer in one.asked)


def test_batch_is_the_harness_prompt_and_the_answer(own, frozen, batch):
    """Ids and embeddings are those the method meets at inference; targets are the answer and the end."""
    examples = [Pocket8(questions=2)[i] for i in (0, 1)]
    asked = [pair for e in examples for pair in e.asked]
    images = [e.image for e in examples for _ in e.asked]
    inputs = own.inputs(images, [prompt for prompt, _ in asked])
    words, valid = frozen.words(batch)
    image = own.model.config.image_token_id
    for b, (_, answer) in enumerate(asked):
        ids = inputs["input_ids"][b][inputs["attention_mask"][b].bool()]
        text = ids[ids != image]
        assert torch.equal(words[b][valid[b]], own.model.get_input_embeddings()(text))
        target = batch.targets[b][batch.targets[b] != IGNORE]
        assert own.processor.tokenizer.decode(target) == f" {answer}</s>"
    with torch.no_grad():
        features = own.model.model.get_image_features(inputs["pixel_values"]).pooler_output
        torch.testing.assert_close(torch.stack(list(features)), frozen.adapter.project(batch.features))


def test_loss_is_the_models_own(own, frozen, batch):
    """On all tokens: what the model says with labels, over the whole batch's answers."""
    n, before = batch.features.shape[1], batch.before
    image = torch.full((n,), own.model.config.image_token_id)
    losses, counts = [], []
    pixels = own.processor.image_processor(
        [Pocket8(questions=2)[i].image for i in (0, 1)], return_tensors="pt"
    )["pixel_values"]
    for b in range(len(batch)):
        ids = torch.cat([before, image, batch.after[b]])[None]
        labels = torch.cat([torch.full((len(before) + n,), IGNORE), batch.targets[b]])[None]
        with torch.no_grad():
            out = own.model(input_ids=ids, pixel_values=pixels[b // 2 : b // 2 + 1], labels=labels)
        losses.append(float(out.loss))
        counts.append(int((labels != IGNORE).sum()))
    wanted = sum(x * c for x, c in zip(losses, counts)) / sum(counts)
    got, right = frozen.loss(batch, batch.features)
    assert math.isclose(float(got), wanted, rel_tol=1e-4) and 0 <= right <= 1


def test_llava_instructions(tmp_path, own, frozen):
    entries = [
        {"id": "a", "image": "x/one.png", "conversations": [
            {"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A box."},
            {"from": "human", "value": "Which color?"}, {"from": "gpt", "value": "Red."}]},
        {"id": "b", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"id": "c", "image": "two.jpg", "conversations": [
            {"from": "human", "value": "Describe.\n<image>"}, {"from": "gpt", "value": "A cat"}]},
    ]  # fmt: skip
    (tmp_path / "x").mkdir()
    Image.new("RGB", (80, 50), (200, 0, 0)).save(tmp_path / "x" / "one.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("L", (50, 90)).save(tmp_path / "two.jpg", exif=turned)
    path = tmp_path / "mix.json"
    path.write_text(json.dumps(entries))
    read = PocketSupplies().image
    source = LlavaInstructions(path, tmp_path, read, questions=2)
    seen = [source[i] for i in range(4)]
    pairs = {pair for e in seen for pair in e.asked}
    assert pairs == {("What is this?", "A box."), ("Which color?", "Red."), ("Describe.", "A cat")}
    assert {e.image.size for e in seen} == {(80, 50), (90, 50)}, "turned as its EXIF note says"
    assert source[1].asked == LlavaInstructions(path, tmp_path, read, questions=2)[1].asked
    made = Collator(own, frozen)(seen[:2])
    assert made.features.shape == (4, 64, 32) and (made.targets != IGNORE).any(1).all()
    (tmp_path / "two.jpg").write_bytes((tmp_path / "two.jpg").read_bytes()[:-200])
    with pytest.raises(UserError, match=r"image two\.jpg in .*: cannot be decoded"):
        [source[i] for i in range(2)]
    (tmp_path / "two.jpg").unlink()
    with pytest.raises(UserError, match=r"two\.jpg is not in"):
        [source[i] for i in range(2)]
    path.write_text("{}")
    with pytest.raises(UserError, match=r"no entry|instruction format"):
        LlavaInstructions(path, tmp_path, read)


# ---- the objective


@pytest.mark.parametrize("k_from", ["batch", "sample"])
def test_gradients_reach_the_policy_and_nothing_else(frozen, batch, k_from):
    objective = make(frozen, batch, k_from=k_from)
    outcome = objective(batch, STEP)
    outcome.loss.backward()
    assert not any(p.grad is not None or p.requires_grad for p in frozen.model.parameters())
    for name, p in objective.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
    for name in ("stop", "start", "encoder.text.weight", "pointer_query.weight", "decoder.0.key.weight"):
        assert objective.policy.get_parameter(name).grad.abs().max() > 0, name
    assert objective.denoiser.out.weight.grad.abs().max() > 0
    assert outcome.gates.shape == (4, 64)
    total = {"batch": torch.full((4,), 8.0), "sample": outcome.count.float()}[k_from]
    torch.testing.assert_close(outcome.gates.sum(1), total, rtol=1e-3, atol=1e-2)


def test_length_term_alone_reaches_the_stop_embedding(frozen, batch):
    """Its gradient is the difference between two length weights."""
    found = []
    for weight in (0.0, 1.0):
        objective = make(frozen, batch)
        out = objective(batch, Step(1.0, 3.0, weight, 8.0, seed=5))
        out.loss.backward()
        found.append((out, objective.policy.stop.grad, objective.policy.decoder[0].key.weight.grad))
    (none, *g0), (one, *g1) = found
    assert math.isclose(float((one.loss - none.loss).detach()), float(one.expected) / 64, rel_tol=1e-3)
    assert all((a - b).abs().max() > 1e-7 for a, b in zip(g0, g1))


def test_length_gradient_lengthens_and_shortens(frozen, batch):
    """A few steps along +- the length term alone move E[K] down and up."""
    lengths = {}
    for weight in (300.0, -300.0):
        objective = make(frozen, batch)
        optimiser = torch.optim.SGD(objective.policy.parameters(), lr=1e-3)
        for _ in range(6):
            out = objective(batch, Step(1.0, 3.0, weight, 8.0, seed=5))
            lengths.setdefault(weight, []).append(float(out.expected))
            optimiser.zero_grad()
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(objective.policy.parameters(), 30.0)
            optimiser.step()
    assert lengths[300.0][-1] < lengths[300.0][0] == lengths[-300.0][0] < lengths[-300.0][-1]


def test_noise_is_the_seeds(frozen, batch):
    objective = make(frozen, batch)
    losses = [float(objective(batch, Step(1.0, 3.0, 0.1, 8.0, seed)).loss.detach()) for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


def test_sharp_gates_are_the_hard_subset(frozen, batch):
    """As the polarisation sharpens, s-tilde tends to the indicator of S for a sample with K = K-bar."""
    objective = make(frozen, batch)
    words, valid = frozen.words(batch)
    memory = objective.policy.remember(batch.features, words, None, valid)
    choices = objective.policy.decode(memory)
    sure = torch.nn.functional.one_hot(choices.order, memory.stop + 1).float()
    for b, n in enumerate(choices.count.tolist()):
        step = Step(1.0, 50.0, 0.1, float(n), 0)
        gates = objective.gates(sure, choices, choices.count.float(), step)[b]
        assert sorted((gates > 0.5).nonzero()[:, 0].tolist()) == choices.kept()[b].tolist()
        assert ((gates < 1e-2) | (gates > 0.98)).all()


@pytest.mark.parametrize("slots", [4, 30])
def test_fewer_slots_keep_what_was_chosen_first(frozen, batch, slots):
    objective = make(frozen, batch, slots=slots)
    words, valid = frozen.words(batch)
    choices = objective.policy.decode(objective.policy.remember(batch.features, words, None, valid))
    assert int(choices.count.max()) > 4
    places = objective._slots(choices, None, torch.Generator().manual_seed(0), 64)
    assert places.shape == (4, slots)
    for row, order, n in zip(places.tolist(), choices.order.tolist(), choices.count.tolist()):
        assert row == sorted(set(row)) and set(order[: min(n, slots)]) <= set(row)
        assert max(row) < 64
    assert objective(batch, STEP).loss.isfinite()


def test_pathways(frozen, batch):
    found = compare_pathways(make(frozen, batch), batch, STEP)
    assert list(found) == ["vanilla", "gated", "gated, no denoiser", "hard", "hard, denoised"]
    losses = [loss for loss, _ in found.values()]
    assert losses[1] == losses[2] and losses[3] == losses[4], "the untrained denoiser is the identity"
    assert len(set(losses)) == 3


# ---- calibration


def test_counts_at_any_bias_are_what_decoding_gives(frozen, batch):
    policy = make(frozen, batch).policy
    base = float(policy.stop_bias)
    margins = calibrate.collect(policy, frozen, [batch])
    words, valid = frozen.words(batch)
    seen = set()
    for bias in (-50.0, -1.0, -0.3, -0.05, 0.0, 0.05, 0.3, 50.0):
        policy.stop_bias.fill_(base + bias)
        memory = policy.remember(batch.features, words, None, valid)
        choices = policy.decode(memory)
        count = choices.count
        assert counts(margins, bias).tolist() == count.tolist()
        cut = cut_at(*policy.explore(memory), memory.stop)
        assert torch.equal(cut.order, choices.order) and torch.equal(cut.count, count)
        seen.add(tuple(count.tolist()))
    assert len(seen) > 3


def test_the_bias_for_a_mean():
    margins = torch.randn(200, 60, generator=torch.Generator().manual_seed(0)).cumsum(1).neg() + 8
    everywhere = [float(counts(margins, float(b)).double().mean()) for b in margins.unique()[::5]]
    for tokens in (5, 20, 40, 60):
        bias = calibrate.bias_for(margins, tokens)
        miss = abs(float(counts(margins, bias).double().mean()) - tokens)
        assert miss < 0.5 and miss <= min(abs(k - tokens) for k in everywhere)
        # not at an edge, where rounding would decide
        distance = float((margins.cummin(1).values - bias).abs().min())
        assert distance > 1e-6
        for nudged in (bias - 0.9 * distance, bias + 0.9 * distance):
            assert torch.equal(counts(margins, nudged), counts(margins, bias))
    with pytest.raises(UserError, match="max-steps"):
        calibrate.bias_for(margins, 61)
    first_steps_always = margins.clone()
    first_steps_always[:, :3] = math.inf  # min_tokens
    bias = calibrate.bias_for(first_steps_always, 3)
    assert counts(first_steps_always, bias).unique().tolist() == [3]
    assert calibrate.bias_for(torch.full((4, 2), math.inf), 2) == 0.0
    means, biases = zip(*calibrate.table(margins, (40, 5, 20, 99), base=2.0))
    assert len(means) == 3 and list(means) == sorted(means) and list(biases) == sorted(biases)[::-1]


# ---- the loop


def options(tiny_checkpoint, out, **changes) -> TrainOptions:
    settings = dict(
        backbone=str(tiny_checkpoint), target_tokens=8, steps=6, batch_size=4, questions=2, warmup=2,
        log_every=1, save_every=2, device="cpu",
    )  # fmt: skip
    return TrainOptions(out=out, **settings | changes)


@pytest.fixture
def few_held_out(monkeypatch):
    """Two held-out images instead of 48."""
    from methods.stepprune.training import train as module

    original = module.held_out
    monkeypatch.setattr(module, "held_out", lambda s, b, f, images=2: original(s, b, f, 2))


@pytest.fixture
def trained(tiny_checkpoint, tmp_path, few_held_out):
    options_ = options(tiny_checkpoint, tmp_path / "a.safetensors")
    return options_, train(options_, PocketSupplies())


def test_two_processes_are_one_that_accumulates(tiny_checkpoint, tmp_path, few_held_out, new_accelerator):
    """Data parallel on two CPU processes: what one process with two micro-steps per step gives."""
    alone = options(tiny_checkpoint, tmp_path / "alone.safetensors", steps=2, accumulate=2)
    train(alone, PocketSupplies())
    together = tmp_path / "together.safetensors"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "harness", "train", "stepprune", "--backbone", str(tiny_checkpoint), "--steps", "2"]
    command += ["--target-tokens", "8", "--batch-size", "4", "--questions", "2", "--warmup", "2"]
    command += ["--log-every", "1", "--device", "cpu", "--out", str(together)]
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    for end in (".csv", "_k.csv"):
        tables = [pd.read_csv(o.with_name(o.stem + end)) for o in (alone.out, together)]
        pd.testing.assert_frame_equal(*tables, rtol=1e-4)
    ones, others = (checkpoints.read(o).load()[0].state_dict() for o in (alone.out, together))
    del ones["stop_bias"]  # of the end: calibrated on other held-out questions here; until then in the table
    # the file is in float16: two sums in another order can fall on both sides of an edge, a step apart
    step = torch.finfo(torch.float16).eps
    for name, value in ones.items():
        torch.testing.assert_close(others[name], value, atol=1e-6, rtol=1.01 * step)


def test_resume_gives_the_same_curve(trained, tiny_checkpoint, tmp_path):
    whole, summary = trained
    parts = options(tiny_checkpoint, tmp_path / "b.safetensors", resume=True, stop_at=4)
    assert train(parts, PocketSupplies()) == {} and not parts.out.exists()
    train(options(tiny_checkpoint, parts.out, resume=True), PocketSupplies())
    curves = [pd.read_csv(o.log) for o in (whole, parts)]
    pd.testing.assert_frame_equal(*curves, check_exact=True)
    assert curves[0]["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert {"lm_loss", "expected", "count", "grad_encoder", "grad_stop", "grad_denoiser"} <= set(curves[0])
    histogram = pd.read_csv(whole.out.with_name("a_k.csv"))
    assert (histogram.drop(columns="step").sum(1) == 4).all()
    for file in (".png", ".json", ".summary.json"):
        assert whole.out.with_suffix(file).stat().st_size > 100
    assert set(summary["pathways"]) == {"vanilla", "gated", "gated, no denoiser", "hard", "hard, denoised"}
    assert abs(summary["mean_tokens"] - 8) < 0.5, "held-out questions get the target"
    assert summary["cost"]["step_seconds"] > 0 < summary["cost"]["frozen_model_seconds"]
    found, again = (checkpoints.read(o.out) for o in (whole, parts))
    assert found.digest() == again.digest() and found.calibration == again.calibration
    assert found.bias_for(found.tokens) is not None and found.training["target_tokens"] == 8
    with pytest.raises(UserError, match="exists; give another --out"):
        train(whole, PocketSupplies())


def test_going_on_from_a_checkpoint(trained, tiny_checkpoint, frozen, batch, tmp_path):
    """Its weights, another length; a policy of another shape is refused."""
    first, _ = trained
    policy, denoiser = checkpoints.read(first.out).load()
    onward = options(tiny_checkpoint, tmp_path / "b.safetensors", start_from=first.out, target_tokens=20)
    made = new_objective(onward, frozen, batch)
    for name, value in policy.named_parameters():
        assert torch.equal(made.policy.get_parameter(name), value)
    assert torch.equal(made.denoiser.value.weight, denoiser.value.weight)
    margins = calibrate.collect(made.policy, frozen, [batch])
    assert abs(float(counts(margins, 0.0).double().mean()) - 20) < 2
    with pytest.raises(UserError, match="another shape"):
        new_objective(replace(onward, decoder_layers=2), frozen, batch)
    train(replace(onward, steps=1), PocketSupplies())
    assert checkpoints.read(onward.out).training["start_from"] == "a.safetensors"


@pytest.fixture
def new_accelerator():
    """A process otherwise has one precision for good."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_accumulation_and_mixed_precision(tiny_checkpoint, tmp_path, few_held_out, new_accelerator):
    train(
        options(
            tiny_checkpoint, tmp_path / "c.safetensors", steps=2, accumulate=2, precision="bf16",
            target_tokens=None, length_weight=0.05,
        ),
        PocketSupplies(),
    )  # fmt: skip
    table = pd.read_csv(tmp_path / "c.csv")
    assert len(table) == 2 and table["lm_loss"].notna().all() and table["stop_bias"].nunique() == 1
    histogram = pd.read_csv(tmp_path / "c_k.csv")
    assert (histogram.drop(columns="step").sum(1) == 8).all(), "two micro-steps of four questions"
    assert checkpoints.read(tmp_path / "c.safetensors").training["length_weight"] == 0.05


def test_ablate(tiny_checkpoint, tmp_path, few_held_out, monkeypatch, capsys):
    few = {"paper": dict(list(learned.find("stepprune").ABLATIONS["paper"].items())[:1])}
    monkeypatch.setattr(learned.find("stepprune"), "ABLATIONS", few)
    base = options(tiny_checkpoint, tmp_path / "x.safetensors", steps=1)
    folder = tmp_path / "t"
    results = ablate.run(base, folder, PocketSupplies(), seeds=(3, 4))
    assert {name: list(by_seed) for name, by_seed in results.items()} == {
        "stepprune": [3, 4], "encoder: causal": [3, 4]
    }  # fmt: skip
    causal = [checkpoints.read(folder / f"seed{s}" / "encoder-causal.safetensors") for s in (3, 4)]
    assert all(c.config.causal_encoder for c in causal) and [c.training["seed"] for c in causal] == [3, 4]
    assert "| encoder: causal | 2 |" in (folder / "ablations.md").read_text()
    monkeypatch.setattr(ablate, "train", lambda *_: pytest.fail("trained again"))
    ablate.run(base, folder, PocketSupplies(), seeds=(3, 4))


def test_every_ablation_changes_one_thing(tiny_checkpoint, tmp_path):
    base = options(tiny_checkpoint, tmp_path / "x.safetensors")
    rows = ablate.variants(base, tmp_path, list(learned.find("stepprune").ABLATIONS))
    settings = [replace(row, out=base.out) for row in rows.values()]
    assert settings[0] == base and len({str(s) for s in settings}) == len(rows) == len(
        {r.out for r in rows.values()}
    )


def test_ablations_are_means_over_seeds():
    def summary(tokens, right):
        paths = {p: {"lm_loss": tokens / 100, "right": r} for p, r in (("hard", right), ("vanilla", 0.8))}
        return {"mean_tokens": tokens, "std_tokens": 2.0, "pathways": paths | {"gated": {"lm_loss": 0.5}}}

    table = ablate.markdown(
        {"x": {0: summary(60.0, 0.4), 1: summary(70.0, 0.6)}, "y": {0: summary(64.0, 0.2)}}, 9
    )
    assert "| x | 2 | 65.0 ± 2.0 | 0.650 | 50.0 (40.0 to 60.0) | 62.5 | 0.500 |" in table
    assert "| y | 1 | 64.0 ± 2.0 | 0.640 | 20.0 | 25.0 | 0.500 |" in table


def test_default_place_of_a_checkpoint(monkeypatch, tmp_path):
    """Where it is found without being named; a shipped one is not in the way, and is not replaced."""
    monkeypatch.setattr(checkpoints, "folder", lambda kind: tmp_path)
    places = []
    monkeypatch.setattr(train_module, "train", lambda o, *_: places.append(o.out))
    command = ["train", "stepprune", "--backbone", "pocket-llava", "--target-tokens", "8"]
    found = tmp_path / "pocket-llava" / "k8.safetensors"
    assert app.main(command) == 0
    found.parent.mkdir()
    found.touch()
    assert app.main(command) == 0
    (found.parent / ".k8.training").mkdir()  # a run of the user's own
    assert app.main(command) == 0
    assert app.main([*command, "--out", "x.safetensors"]) == 0
    assert places == [
        found,
        policies.LOCAL / "stepprune/pocket-llava/k8.safetensors",
        found,
        Path("x.safetensors"),
    ]


def test_bad_options(tiny_checkpoint, tmp_path):
    for changes, words in (
        (dict(length_weight=0.1), "give one of"),
        (dict(batch_size=5), "no multiple of"),
        (dict(data=tmp_path / "x.json"), "needs --images"),
    ):
        with pytest.raises(UserError, match=words):
            options(tiny_checkpoint, tmp_path / "a.safetensors", **changes)
    with pytest.raises(UserError, match="1 to 64"):
        train(options(tiny_checkpoint, tmp_path / "a.safetensors", target_tokens=65), PocketSupplies())


def test_schedules():
    o = TrainOptions(out=None, target_tokens=64, steps=1000, warmup=100, text_gate_until=0.5)
    rates = [learning_rate(o, s) for s in range(1000)]
    assert rates[99] == max(rates) == 1 and rates[0] < 0.02 and rates[-1] < 0.021
    assert [text_gate(o, s) for s in (0, 250, 500, 900)] == [0, 0.5, 1, 1]


def test_length_control_holds_the_mean_while_logits_drift():
    """On made-up margins which fall from step to step of a selection, and which training raises."""
    generator = torch.Generator().manual_seed(0)
    for hidden, drift in ((-3.0, 0.05), (5.0, -0.05)):
        control, bias = LengthControl(64, 64.0), 0.0
        for step in range(200):
            noise = torch.randn(16, 1, generator=generator)
            margins = hidden + step * drift - bias + noise + torch.linspace(6, -6, 192).expand(16, -1)
            margins[:, 0] = math.inf
            if step > 20:
                assert 45 < float(counts(margins, 0.0).double().mean()) < 85
            bias += control.update(margins)
        assert abs(control.mean_count / 64 - 1) < 0.12
    fixed = LengthControl(None, 64.0)
    assert fixed.update(margins - 9) == 0 and fixed.mean_count < 64
