"""HoloV and VisionZip against recordings of their authors' Qwen2.5-VL code, through the public path: alone
and in batches of images of different sizes, positions included."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.parity import compare, drawn
from methods.errors import UserError

GOLDEN = Path(__file__).parent.parent / "golden"
OWN = "visionzip/qwen"
PLACES = {
    "holov": ("holov/qwen_vectors.safetensors", "qwen_model", "qwen_inputs.safetensors"),
    "visionzip": (f"{OWN}/vectors.safetensors", OWN, f"{OWN}/inputs.safetensors"),
}


@pytest.fixture(scope="module", params=PLACES)
def recorded(request):
    """(method, vectors, model, inputs)"""
    vectors, model, inputs = (GOLDEN / place for place in PLACES[request.param])
    return request.param, load_file(vectors), *compare._load_source(model, inputs, qwen=True)


def test_every_recording_agrees(recorded):
    method, vectors, model, inputs = recorded
    rows = list(compare.check(model, inputs, method, vectors))
    labels = {"holov": 7, "visionzip": 4}[method]
    assert len(rows) == labels * len(inputs) and all(row.agrees for row in rows)
    for row in rows:
        assert row.alone.difference is not None and row.batched is not None
        assert (row.batched.features is None) == (row.label == "vanilla")
    specs = {compare.setting_of(method, row.label).spec for row in rows}
    assert (
        specs
        == {
            "holov": {"vanilla", "holov", "holov:form=released"},
            "visionzip": {"vanilla", *(f"visionzip:dominant=0.{d},contextual=0.05" for d in (65, 45, 15))},
        }[method]
    )


def test_recorded_images_have_different_sizes(recorded):
    _, _, _, inputs = recorded
    assert len({sample.places for sample in inputs.values()}) == len(inputs)


@pytest.mark.parametrize("kind", ["position_ids", "kept", "features"])
def test_a_difference_is_seen(recorded, kind):
    method, vectors, model, inputs = recorded
    label = {"holov": "aligned.r22", "visionzip": "45+5"}[method]
    vectors = {k: v.clone() for k, v in vectors.items() if re.fullmatch(rf"\w+\.{re.escape(label)}\.1", k)}
    (row,) = compare.check(model, inputs, method, vectors)
    assert row.agrees
    if kind == "features":
        vectors[f"features.{label}.1"][3] += 1e-2
    elif kind == "kept":
        for key in (key for key in vectors if key.startswith("kept")):
            vectors[key] = vectors[key].roll(1)
    else:
        vectors[f"position_ids.{label}.1"][1, 20] += 1
    (row,) = compare.check(model, inputs, method, vectors)
    assert not row.agrees and row.alone.tokens and row.alone.kept == (kind == "features")


def test_the_released_form_is_another(recorded):
    """Otherwise its recordings would prove nothing: the repaired form disagrees with them."""
    method, vectors, model, inputs = recorded
    if method != "holov":
        pytest.skip("VisionZip has one form")
    renamed = {
        key.replace("r22", "aligned.r22"): value
        for key, value in vectors.items()
        if re.fullmatch(r"(greedy|kept|logits)\.r22\.0", key)
    }
    (row,) = compare.check(model, inputs, method, renamed)
    assert row.label == "aligned.r22" and not row.alone.kept and not row.agrees


def test_command_finds_them(tmp_path, capsys):
    """Beside recordings on LLaVA, in both layouts, by the method's name."""
    shutil.copytree(GOLDEN / "visionzip/qwen", tmp_path / "visionzip/qwen")
    path = tmp_path / "visionzip/qwen/vectors.safetensors"
    few = {k: v for k, v in load_file(path).items() if k.endswith(".15+5.1")}
    save_file(few, path)
    assert compare.main(tmp_path, ["visionzip"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^visionzip-qwen +15\+5 +1 .*left out: a single input$", out, re.M)
    assert out.endswith("1 rows, all agree\n")
    few["greedy.15+5.1"] = (few["greedy.15+5.1"] + 1) % 512
    save_file(few, path)
    assert compare.main(tmp_path, ["visionzip"]) == 1
    shutil.copy(GOLDEN / "holov/qwen_vectors.safetensors", tmp_path / "visionzip/qwen_vectors.safetensors")
    with pytest.raises(UserError, match="qwen_model: no such folder"):
        compare.main(tmp_path)
    weights = tmp_path / "visionzip/qwen/model.safetensors"
    save_file({k: v for k, v in drawn.read(weights).items() if "lm_head" not in k}, weights)
    weights.with_name("model.drawn.json").unlink()
    with pytest.raises(UserError, match="do not fit"):
        compare._load_source(weights.parent, weights.with_name("inputs.safetensors"), qwen=True)
    weights.unlink()
    with pytest.raises(UserError, match="no recorded model"):
        compare._load_source(weights.parent, weights.with_name("inputs.safetensors"), qwen=True)


def test_rates_keep_what_the_recordings_keep(recorded):
    """Truncated there, rounded here."""
    method, _, _, inputs = recorded
    if method == "holov":
        thirds = {"33": (1, 3), "22": (2, 9), "11": (1, 9)}
        for label, (a, b) in thirds.items():
            for sample in inputs.values():
                assert round(compare.RATES[label] * sample.places) == a * sample.places // b
    assert torch.is_tensor(next(iter(inputs.values())).grid)
