"""A model family is one object: registered from one file (siglip_family.py), it is known to every command,
and nothing in `harness/` names it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import siglip_family
import torch
from engine_helpers import generate
from PIL import Image

import backbones
from backbones import families, random_checkpoint, shapes
from harness.cli import app
from harness.costs import macs, random_weights
from methods import registry
from methods.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TOKENS = 36


@pytest.fixture(scope="module")
def family():
    yield siglip_family.register()
    del families._FAMILIES["siglip_llava"]


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    return random_checkpoint.make("siglip-llava", tmp_path_factory.mktemp("own") / "tiny-siglip")


@pytest.fixture(scope="module")
def own(folder):
    return backbones.load(str(folder))


@pytest.fixture(scope="module")
def inputs(own):
    image = Image.effect_mandelbrot((96, 80), (-2, -1.5, 1, 1.5), 40).convert("RGB")
    return own.inputs([image, image.rotate(90)], ["What is it?", "Is there a red box in it, or none?"])


def run(*arguments) -> int:
    return app.main([str(a) for a in arguments])


def test_the_harness_names_it_nowhere():
    found = [p for p in (ROOT / "harness").rglob("*.py") if "siglip" in p.read_text(encoding="utf-8").lower()]
    assert not found


def test_facts(own, family):
    assert own.family is family and own.num_visual_tokens == TOKENS and own.num_layers == 6
    assert own.describe()["family"] == "siglip_llava"


@pytest.mark.parametrize("spec", ["random", "uniform", "fastv", "pdrop:schedule=kept", "sparsevlm"])
@torch.inference_mode()
def test_keeping_everything_is_the_unpruned_model(own, inputs, spec):
    ours, theirs = generate(own.model, inputs, registry.build(spec, TOKENS)), generate(own.model, inputs)
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1], atol=1e-5, rtol=1e-5)
    pruned = generate(own.model, inputs, registry.build(spec, 9))
    assert not torch.equal(pruned[1], theirs[1]) and (pruned[2].visual_tokens[:, -1] < TOKENS).all()


def test_costs_by_formula_and_by_fvcore(own, inputs):
    one = {name: x[:1] for name, x in inputs.items()}
    counter = macs.ModelCounter(own.model)
    count = macs.count_prefill(counter, own, registry.build("uniform", 9), one)
    assert count.tower == own.family.tower_macs(own.model.config.vision_config, 96, 96)
    assert count.projector == own.family.projector_macs(own.model.config, 9) and count.selection == 0


def test_random_weights_and_narrow_shape(folder):
    shape = shapes.load(str(folder / "config.json"))
    made = random_weights.build(random_weights.narrow(shape), "cpu", "float32")
    with torch.inference_mode():
        assert macs.prefill(made.model, made.synthetic(text_tokens=8, batch=2)).isfinite().all()


def test_leaderboard(folder, tiny_data, tmp_path, capsys):
    """Every method that can be used there; the others are left out, with the reason."""
    arguments = ["--backbone", folder, "--data", tiny_data, "--tasks", "pope", "--methods", "all"]
    arguments += ["--budget", "9", "--limit", "4", "--max-new-tokens", "2", "--latency-repeats", "1"]
    assert app.run_all([str(a) for a in (*arguments, "--device", "cpu", "--out", tmp_path)]) == 0
    table = pd.read_csv(tmp_path / "leaderboard.csv")
    assert {"vanilla", "random", "uniform", "downsample", "fastv", "pdrop", "sparsevlm"} <= {*table["method"]}
    assert not {"visionzip", "holov"} & {*table["method"]}
    said = " ".join("".join(capsys.readouterr()).split())  # lines are wrapped
    assert "reads 'received' of the vision tower, which is not offered for SigLIP-LLaVA" in said


def test_a_named_method_that_cannot_be_used_is_refused(folder, tiny_data, tmp_path, capsys):
    arguments = ["--backbone", folder, "--data", tiny_data, "--tasks", "pope", "--methods", "visionzip"]
    assert app.run_all([str(a) for a in (*arguments, "--budget", "9", "--out", tmp_path)]) == 2
    assert "visionzip reads" in capsys.readouterr().err


def test_flops(folder, capsys):
    assert run("flops", "--backbone", folder / "config.json", "--budget", "9") == 0
    out = capsys.readouterr().out
    assert "| fastv" in out and "equal to the last MAC" in out
    assert "visionzip is left out: visionzip reads 'received'" in out


def test_overlay(folder, tmp_path, capsys):
    arguments = ["--methods", "random,fastv", "--budget", "9", "--out", tmp_path / "overlay.png"]
    Image.new("RGB", (60, 90), "red").save(tmp_path / "a.png")
    more = ["--images", tmp_path / "a.png", "--question", "What is it?"]
    assert run("overlay", "--backbone", folder, *arguments, *more) == 0
    assert "random 9 tokens" in capsys.readouterr().out and (tmp_path / "overlay.png").is_file()


def test_doctor(folder, mirror, tmp_path, capsys):
    arguments = ["--backbone", folder, "--tasks", "paper:mme", "--data", mirror, "--budget", "9"]
    code = run("doctor", *arguments, "--device", "cpu", "--out", tmp_path / "out")
    out = capsys.readouterr().out
    assert code == 0 and "36 places for the first image (6 x 6)" in out, out
    assert "answer as the unpruned model does" in out


def test_the_list_names_it(family, capsys):
    assert app.run_all(["--list"]) == 0
    assert "SigLIP-LLaVA" in capsys.readouterr().out


def test_another_package_brings_one_by_its_entry_point(monkeypatch):
    module = SimpleNamespace(Mine=type("Mine", (families.Family,), {"model_type": "mine", "title": "Mine"}))
    monkeypatch.setitem(sys.modules, "my_package", module)
    point = SimpleNamespace(name="mine", value="my_package:Mine", load=lambda: module.Mine)
    monkeypatch.setattr(families, "entry_points", lambda group: [point])
    monkeypatch.setattr(families, "_looked_for_others", False)
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))
    assert families.of_type("mine").title == "Mine"
    point.load = lambda: 1 / 0
    monkeypatch.setattr(families, "_looked_for_others", False)
    with pytest.raises(UserError, match=r"entry point mine = my_package:Mine .*ZeroDivisionError"):
        families.known()
