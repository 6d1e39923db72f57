"""A checkpoint that is not whole is refused in one line; a whole one loads by whatever name."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import backbones
from backbones.hub.integrity import check_headers
from backbones.hub.options import LoadOptions
from methods.errors import UserError

FAMILIES = ("llava", "qwen2_5_vl")


@pytest.fixture(params=FAMILIES)
def copy(request, tmp_path, tiny_checkpoint, tiny_qwen_checkpoint) -> Path:
    """A copy of a tiny checkpoint to damage."""
    source = dict(zip(FAMILIES, (tiny_checkpoint, tiny_qwen_checkpoint)))[request.param]
    return shutil.copytree(source, tmp_path / "mine")


def rewrite(folder: Path, change) -> None:
    """Let `change` edit the tensors of the folder in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def layers(folder: Path, number: int) -> None:
    """Another number of decoder layers in config.json."""
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    text["num_hidden_layers"] = number
    if "layer_types" in text:
        text["layer_types"] = ["full_attention"] * number
    (folder / "config.json").write_text(json.dumps(config))


def one(tensors: dict, pattern: str) -> str:
    return next(key for key in sorted(tensors) if re.search(pattern, key))


def refused(folder: Path, pattern: str, capfd, **options) -> None:
    """By the loader and by the check of the headers, in one line and nothing else on the terminal."""
    with pytest.raises(UserError, match=pattern) as error:
        backbones.load(str(folder), **options)
    assert "\n" not in str(error.value) and "mine" in str(error.value)
    assert str(folder.parent) not in str(error.value)
    with pytest.raises(UserError, match=pattern):
        check_headers("mine", folder)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("placed", [None, "auto"])
def test_a_missing_tensor_is_not_filled_in_with_random_numbers(copy, placed, capfd):
    def change(tensors):
        del tensors[one(tensors, r"layers\.2\.self_attn\.q_proj\.weight")]

    rewrite(copy, change)
    pattern = r"not whole: 1 of the model's tensors .*layers\.2\.self_attn\.q_proj\.weight\); restore"
    refused(copy, pattern, capfd, options=LoadOptions(device_map=placed))


def test_many_missing_tensors_are_counted_and_three_named(copy, capfd):
    def change(tensors):
        for key in [k for k in tensors if re.search(r"projector|merger", k)]:
            del tensors[key]

    rewrite(copy, change)
    refused(
        copy, r"not whole: \d of the model's tensors are not in its files \(\S+, \S+, \S+, \.\.\.\)", capfd
    )


@pytest.mark.parametrize("number", [3, 9])
def test_a_config_of_another_depth_is_named(copy, number, capfd):
    layers(copy, number)
    refused(copy, rf"config\.json says {number} layers in \S+layers, the files have 6", capfd)


def test_a_tensor_of_another_shape_is_named(copy, capfd):
    def change(tensors):
        key = one(tensors, r"layers\.1\.mlp\.down_proj\.weight")
        tensors[key] = tensors[key][:, :-1].contiguous()

    rewrite(copy, change)
    refused(
        copy, r"1 tensors have another shape .*layers\.1\.mlp\.down_proj\.weight \(\d+, \d+\) instead", capfd
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_named(copy, value):
    rewrite(copy, lambda t: t[one(t, r"layers\.5\.input_layernorm")].fill_(value))
    with pytest.raises(UserError, match=r"1 tensors hold numbers that are not finite .*5\.input_layernorm"):
        backbones.load(str(copy))


def test_weights_that_overflow_in_the_chosen_dtype_are_named(copy):
    rewrite(copy, lambda t: t[one(t, r"layers\.5\.input_layernorm")].fill_(1e6))
    backbones.load(str(copy))
    with pytest.raises(UserError, match=r"not finite in float16 .*another --dtype"):
        backbones.load(str(copy), dtype="float16")


def test_parts_that_are_not_held_in_memory_are_read_from_the_files(copy):
    """Quantised weights and parts left on disk."""
    from backbones.hub.integrity import check_finite

    rewrite(copy, lambda t: t[one(t, r"layers\.5\.input_layernorm")].fill_(float("nan")))
    model = torch.nn.Linear(2, 2, device="meta")
    with pytest.raises(UserError, match=r"1 tensors hold .*5\.input_layernorm"):
        check_finite("mine", model, copy)


def test_buffers_of_earlier_releases_are_no_fault(copy):
    """transformers wrote them into files once; it computes them today."""
    rewrite(copy, lambda t: t.update({"vision_tower.embeddings.position_ids": torch.arange(9)[None]}))
    assert backbones.load(str(copy)).num_layers == 6
    assert check_headers("mine", copy) > 100


def test_names_of_earlier_releases_pass_by_their_headers(hub_checkpoints):
    for folder in hub_checkpoints.values():
        assert check_headers("x", folder) > 100


def test_a_tokenizer_that_does_not_belong_to_the_model_is_named(copy):
    """Images would stand nowhere in the prompt."""
    config = json.loads((copy / "config.json").read_text())
    key = next(key for key in ("image_token_id", "image_token_index") if key in config)
    (copy / "config.json").write_text(json.dumps({**config, key: config[key] + 1}))
    with pytest.raises(UserError, match=r"mine: \S+ is token \d+ of its tokenizer, config\.json says \d+"):
        backbones.load(str(copy))


@pytest.mark.parametrize("body", ["[1, 2]", "{}", '{"model_type": "llava", "text_config": 3}'])
def test_an_odd_config_is_one_line(copy, body):
    (copy / "config.json").write_text(body)
    with pytest.raises(UserError) as error:
        backbones.load(str(copy))
    assert "\n" not in str(error.value) and "mine" in str(error.value)


def test_one_loader_knows_short_names_and_hub_ids(tmp_path, monkeypatch):
    """`harness train stepprune --backbone llava-1.5-7b`, its help's example, was an unknown backbone."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("llava-1.5-7b", "llava-hf/llava-1.5-7b-hf"):
        with pytest.raises(UserError, match=r"llava-hf/llava-1.5-7b-hf is not in .* hf download llava-hf/"):
            backbones.load(name)


def test_a_run_and_the_doctor_refuse_it(copy, capsys, tmp_path):
    from harness.cli import app

    layers(copy, 9)
    given = ["--backbone", str(copy), "--budget", "4", "--out", str(tmp_path / "out")]
    assert app.run_all(given) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "not whole" in error
    assert app.main(["doctor", *given, "--no-estimate"]) == 1
    assert re.search(r"MISSING  checkpoint: .*not whole.*says 9 layers", capsys.readouterr().out)
