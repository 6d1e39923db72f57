"""Training on real models: the same command and options on tiny random ones, and what it needs of a GPU."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from harness.cli import app
from harness.pocket.supplies import EvidencePocket8, PocketSupplies
from methods import learned, registry
from methods.stepprune import checkpoint as checkpoints
from methods.stepprune.training import memory
from methods.stepprune.training.data import CAPTION_PROMPT, Collator, LlavaInstructions
from methods.stepprune.training.objective import FrozenModel, Step
from methods.stepprune.training.options import TrainOptions
from methods.stepprune.training.train import new_objective

STEP = Step(1.0, 0.3, 0.0, 8.0, seed=5)


@pytest.fixture(scope="module")
def captions(tmp_path_factory) -> tuple[Path, Path]:
    """A json of captions and the folder of its images."""
    folder = tmp_path_factory.mktemp("captions")
    noise = np.random.default_rng(0)
    entries = []
    for i in range(20):
        size = (112, 84 + 28 * (i % 3), 3)
        Image.fromarray(noise.integers(0, 256, size, dtype=np.uint8)).save(folder / f"{i}.png")
        entries.append({"image": f"{i}.png", "caption": f"A picture of {i} things."})
    (folder / "captions.json").write_text(json.dumps(entries))
    return folder / "captions.json", folder


@pytest.fixture
def new_accelerator():
    """A process otherwise has one precision for good."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(("method", "name"), [("diffprune", "llava"), ("stepprune", "qwen2_5_vl")])
def test_the_command_for_real_models(method, name, hub_checkpoints, captions, tmp_path, new_accelerator):
    """As `train diffprune --backbone llava-1.5-7b --preset 2605.28051 --data FILE --images DIR`: bfloat16
    weights, mixed precision, layers computed twice; then it prunes that model."""
    import backbones

    data, images = captions
    out = tmp_path / "k8.safetensors"
    command = ["train", method, "--backbone", str(hub_checkpoints[name]), "--target-tokens", "8"]
    command += ["--preset", "2605.28051", "--data", str(data), "--images", str(images), "--device", "cpu"]
    assert app.main([*command, "--steps", "1", "--batch-size", "2", "--out", str(out)]) == 0
    found = checkpoints.read(out, learned.find(method).kind())
    told = {
        k: found.training[k] for k in ("dtype", "checkpointing", "precision", "lr", "data", "sharpen_until")
    }
    assert told == {
        "dtype": "bfloat16", "checkpointing": True, "precision": "bf16", "lr": 2e-4, "data": "captions.json",
        "sharpen_until": 0.5,
    }  # fmt: skip
    backbone = backbones.load(str(hub_checkpoints[name]))
    inputs = backbone.inputs([Image.open(images / "0.png")], ["What is it?"])
    budget = round(found.tokens)
    with torch.no_grad(), registry.build(f"{method}:checkpoint={out}", budget)(backbone.model) as trace:
        backbone.model(**inputs, logits_to_keep=1)
    assert trace.visual_tokens[0, -1] > 0 and (method == "stepprune" or trace.visual_tokens[0, -1] == budget)


def test_a_tenth_of_the_images_is_kept_back(captions):
    """Calibration and the comparison of the pathways else stand on what was trained on."""
    data, images = captions
    read = PocketSupplies().image
    sources = [LlavaInstructions(data, images, read, held_out=back) for back in (False, True)]
    assert [len(s) for s in sources] == [18, 2]
    answers = [{s[i].asked[0][1] for i in range(len(s))} for s in sources]
    assert not answers[0] & answers[1] and len(answers[0] | answers[1]) == 20
    assert sources[0][0].asked[0][0] == CAPTION_PROMPT


# ---- memory


def own_model(checkpoint, checkpointing=False):
    import backbones

    own = backbones.load(str(checkpoint))
    return own, FrozenModel(own.model, own.adapter, checkpointing)


def test_checkpointing_keeps_less_and_gives_the_same_gradient(tiny_checkpoint):
    given = TrainOptions(out=None, target_tokens=8)
    norms, kept = [], []
    for checkpointing in (False, True):
        own, frozen = own_model(tiny_checkpoint, checkpointing)
        batch = Collator(own, frozen)([EvidencePocket8(questions=2)[0]])
        objective = new_objective(given, frozen, batch)
        objective(batch, STEP).loss.backward()
        norms.append(torch.stack([p.grad.norm() for p in objective.parameters() if p.grad is not None]))
        noise = torch.randn_like(batch.features).requires_grad_()
        kept.append(memory.kept(lambda f=frozen, b=batch, n=noise: f.loss(b, n)[0], own.model))
        assert not own.model.training and not any(m.training for m in own.adapter.layers[0].children())
    torch.testing.assert_close(*norms)
    assert kept[1] < 0.5 * kept[0], kept


@pytest.mark.parametrize("method", ["stepprune", "diffprune"])
def test_the_estimate_is_what_autograd_keeps(tiny_checkpoint, method):
    """Of a real step on the CPU, policy and language model; else a run is killed that the doctor let pass."""
    own, frozen = own_model(tiny_checkpoint)
    given = TrainOptions(out=None, **learned.settled(method, {"target_tokens": 8}))
    batch = Collator(own, frozen)([EvidencePocket8(questions=2)[i] for i in range(2)])
    objective = learned.find(method).new_objective(given, frozen, batch)
    if method == "stepprune":
        objective.policy.stop_bias.fill_(-1e4)  # the longest way there is
    parts = torch.nn.ModuleList([objective, own.model])
    real = memory.kept(lambda: objective(batch, STEP).loss, parts)
    answers = int((batch.targets != -100).sum()) // len(batch)
    text = len(batch.before) + batch.after.shape[1]
    meta = own.model.to("meta")
    found = memory.need(meta, own.adapter, given, memory.Sizes(64, text, answers))
    assert found.frozen == sum(4 * p.numel() for p in meta.parameters())
    assert found.trained == 16 * sum(p.numel() for p in objective.parameters())
    logits = found.logits * len(batch)  # their gradients are not kept but made
    assert found.activations(len(batch), False) == pytest.approx(real, rel=0.15, abs=logits)


def test_the_doctor_says_whether_training_fits(capsys):
    given = ["doctor", "--train", "diffprune", "--budget", "64", "--backbone"]
    assert app.main([*given, "llava-1.5-7b", "--dtype", "bfloat16"]) == 0
    told = capsys.readouterr().out
    assert "frozen weights 14.1 GB in bfloat16" in told and "--batch-size 32: " in told
    assert app.main([*given, "llava-1.5-13b", "--memory", "24"]) == 1
    assert "MISSING  24 GB: not one question fits" in (told := capsys.readouterr().out)
    assert "fix: --dtype bfloat16" in told
    assert app.main([*given, "nosuch"]) == 2
    assert "no shape of that name is known" in capsys.readouterr().err
