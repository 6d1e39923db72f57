"""A policy's files: other weights, damaged ones, or numbers that are none are refused in one line."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from methods.errors import UserError
from methods.stepprune import checkpoint as checkpoints

SHIPPED = checkpoints.SHIPPED / "pocket-llava"


@pytest.fixture
def path(tmp_path):
    for end in ("safetensors", "json"):
        shutil.copy(SHIPPED / f"k64.{end}", tmp_path)
    return tmp_path / "k64.safetensors"


def refused(path, words):
    with pytest.raises(UserError, match=words) as error:
        checkpoints.read(path).load()
    assert "\n" not in str(error.value) and "k64" in str(error.value)


def edit(path, change):
    """Edit the JSON file's body in place."""
    description = path.with_suffix(".json")
    body = json.loads(description.read_text())
    change(body)
    description.write_text(json.dumps(body))


def rewrite(path, change):
    """Edit the weights, and write the JSON file for them."""
    weights = load_file(path)
    change(weights)
    save_file(weights, path)
    checkpoints._described(path).seal()


def test_all_shipped_policies_are_sealed_and_load():
    for folder in checkpoints.SHIPPED.iterdir():
        for found in checkpoints.shipped(folder.name):
            found.load()


def test_another_policys_weights_under_this_name(path):
    shutil.copy(SHIPPED.parent / "pocket-qwen" / "k48.safetensors", path)
    refused(path, r"k64\.safetensors holds other weights than k64\.json")


def test_a_description_of_no_weights_names_the_command(path):
    edit(path, lambda body: body.pop("weights_sha256"))
    refused(path, r"python -m methods\.stepprune\.checkpoint .*k64\.safetensors")
    checkpoints._described(path).seal()
    checkpoints.read(path).load()


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite(path, value):
    rewrite(path, lambda weights: weights[min(weights)].flatten()[:1].fill_(value))
    refused(path, r"not finite in denoiser\.\S+ \(1 tensors\)")


def test_missing_tensors_are_named(path):
    def change(weights):
        for key in sorted(weights)[:5]:
            del weights[key]

    rewrite(path, change)
    refused(path, r"lacks denoiser\.\S+, \S+, \S+ \(5 tensors\)")


def test_other_shapes_are_named(path):
    rewrite(path, lambda weights: weights.update({min(weights): torch.zeros(3)}))
    refused(path, r"other shapes than its JSON says: denoiser\.\S+ \(1 tensors\)")


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body["calibration"].append([float("nan"), 1.0]),
        lambda body: body["calibration"][0].__setitem__(1, float("inf")),
        lambda body: body["calibration"][0].__setitem__(0, "16"),
        lambda body: body.update(calibration=5),
        lambda body: body.update(tokens=float("nan")),
        lambda body: body.update(tokens=-3),
        lambda body: body.update(config=[]),
        lambda body: body.update(colour="red"),
    ],
)
def test_a_description_that_makes_no_sense(path, change):
    edit(path, change)
    refused(path, r"k64\.json is damaged \(")


@pytest.mark.parametrize("text", ["", "[]", "5", "{", "\x00"])
def test_a_description_that_is_none(path, text):
    path.with_suffix(".json").write_text(text)
    refused(path, r"k64\.json is damaged \(")


def test_saved_files_are_sealed(path, tmp_path):
    found = checkpoints.read(path)
    policy, denoiser = found.load()
    found.path = tmp_path / "k64b.safetensors"
    found.save(policy, denoiser)
    again = checkpoints.read(found.path)
    assert again.weights_sha256 == checkpoints.read(path).weights_sha256, "the same weights"
