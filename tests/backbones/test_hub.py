"""Checkpoints of the hub: found, refused with the fix, loaded with options; never a word to the network."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from PIL import Image

import backbones
from backbones.families.llava import SYSTEM_SENTENCE
from backbones.hub.find import find, missing_files
from backbones.hub.load import load
from backbones.hub.options import LoadOptions
from methods.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


pytestmark = pytest.mark.usefixtures("no_network")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty Hugging Face cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def put(cache: Path, repo: str, folder: Path, kind: str = "models") -> Path:
    """Lay a folder into the cache as a snapshot, as a download would."""
    place = cache / f"{kind}--{repo.replace('/', '--')}"
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / "main").write_text(COMMIT)
    shutil.copytree(folder, place / "snapshots" / COMMIT, dirs_exist_ok=True)
    return place / "snapshots" / COMMIT


def test_what_is_not_here_is_told_with_the_command(cache):
    with pytest.raises(UserError) as found:
        find("llava-1.5-7b")
    text = str(found.value)
    assert "hf download llava-hf/llava-1.5-7b-hf --include '*.json'" in text and "--download" in text
    with pytest.raises(UserError, match=r"hf download some/model --revision abc"):
        find("some/model", revision="abc")
    known = r"unknown backbone 'nosuch'.*pocket-llava, pocket-qwen, llava-1.5-7b"
    with pytest.raises(UserError, match=known):
        find("nosuch")


def test_a_cached_checkpoint_is_known_by_its_commit(cache, hub_checkpoints):
    put(cache, "llava-hf/llava-1.5-7b-hf", hub_checkpoints["llava"])
    by_name, by_id = find("llava-1.5-7b"), find("llava-hf/llava-1.5-7b-hf", revision=COMMIT)
    assert by_name.folder == by_id.folder and by_name.family.model_type == "llava"
    assert (by_name.name, by_id.name) == ("llava-1.5-7b", "llava-1.5-7b-hf")
    described = load("llava-1.5-7b", LoadOptions()).describe()
    assert (described["repository"], described["revision"]) == ("llava-hf/llava-1.5-7b-hf", COMMIT)
    assert described["name"] == "llava-1.5-7b"
    assert find(str(by_id.folder)).revision == COMMIT, "a snapshot named by its path"


def test_a_folder_made_by_the_hubs_command_knows_its_commit(hub_checkpoints, tmp_path):
    copy = shutil.copytree(hub_checkpoints["qwen2_5_vl"], tmp_path / "copy")
    assert find(str(copy)).revision is None
    note = copy / ".cache" / "huggingface" / "download" / "config.json.metadata"
    note.parent.mkdir(parents=True)
    note.write_text(f"{COMMIT}\netag\n1.0\n")
    assert find(str(copy)).revision == COMMIT
    with pytest.raises(UserError, match="local folder"):
        find(str(copy), revision="main")


def test_incomplete_checkpoints_are_told_by_what_they_lack(cache, hub_checkpoints, tmp_path):
    copy = shutil.copytree(hub_checkpoints["llava"], tmp_path / "copy")
    assert missing_files(copy) == []
    (copy / "model-00002-of-00003.safetensors").unlink()
    (copy / "preprocessor_config.json").unlink()
    (copy / "processor_config.json").unlink()
    assert missing_files(copy) == ["preprocessor_config.json", "model-00002-of-00003.safetensors"]
    put(cache, "org/half", copy)
    with pytest.raises(UserError, match=r"lacks .*00002-of-00003.*hf download org/half"):
        find("org/half")
    for path in list(copy.glob("*.safetensors*")):
        path.unlink()
    (copy / "pytorch_model.bin").write_bytes(b"pickled")
    with pytest.raises(UserError, match="other weight formats are not loaded"):
        find(str(copy))
    with pytest.raises(UserError, match=r"without config\.json"):
        find(str(tmp_path))


def test_a_download_is_announced_first(cache, hub_checkpoints, monkeypatch, caplog):
    def snapshot_download(repo, *, repo_type=None, revision=None, local_files_only=False, **more):
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not here")
        assert caplog.messages[-1].startswith("NETWORK: downloading org/tiny")
        assert "*.safetensors" in more["allow_patterns"] and "*.bin" not in more["allow_patterns"]
        return str(put(cache, repo, hub_checkpoints["llava"]))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert find("org/tiny", download=True).revision == COMMIT
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        find("org/tiny", download=True)
    assert len(caplog.messages) == 1


def test_plain_loading_describes_itself_as_before(tiny_checkpoint):
    """Keys of finished records depend on it."""
    assert (
        load(str(tiny_checkpoint), LoadOptions()).describe()
        == backbones.load(str(tiny_checkpoint)).describe()
    )


def test_original_llava_inputs(tiny_checkpoint):
    """A wide image stands in the middle of a square of the mean colour; the sentence opens the prompt."""
    plain = load(str(tiny_checkpoint), LoadOptions())
    original = load(str(tiny_checkpoint), LoadOptions(llava_inputs="original"))
    image, prompt = Image.new("RGB", (224, 112), "red"), "What is it?"
    cropped, padded = (b.inputs([image], [prompt]) for b in (plain, original))
    pixels = padded["pixel_values"][0]
    assert pixels.shape == cropped["pixel_values"][0].shape == (3, 112, 112)
    assert pixels[:, :24].abs().max() < 0.02 and pixels[:, -24:].abs().max() < 0.02, "the mean is 0"
    assert torch.allclose(pixels[:, 40:70, 56], cropped["pixel_values"][0][:, 40:70, 56], atol=1e-4)
    tokenizer = original.processor.tokenizer
    texts = [tokenizer.decode(b["input_ids"][0], skip_special_tokens=True).strip() for b in (cropped, padded)]
    assert texts[1] == f"{SYSTEM_SENTENCE} {texts[0]}"
    described = original.describe()
    assert (described["image_padding"], described["system_sentence"]) == ("square", SYSTEM_SENTENCE)
    assert described["chat_template"] != plain.describe()["chat_template"]
    assert (padded["input_ids"] == original.model.config.image_token_id).sum() == 64


def test_pixel_limits(tiny_qwen_checkpoint, tiny_checkpoint):
    limited = load(str(tiny_qwen_checkpoint), LoadOptions(min_pixels=9 * 784, max_pixels=16 * 784))
    described = limited.describe()
    assert (described["min_pixels"], described["max_pixels"]) == (9 * 784, 16 * 784)
    assert described["visual_tokens"] == limited.num_visual_tokens == 16
    for size in ((900, 900), (20, 20)):
        grid = limited.inputs([Image.new("RGB", size)], ["x"])["image_grid_thw"][0]
        assert 9 <= int(grid.prod()) // 4 <= 16
    with pytest.raises(UserError, match="min-pixels 7840 is more than"):
        load(str(tiny_qwen_checkpoint), LoadOptions(min_pixels=7840, max_pixels=784))
    with pytest.raises(UserError, match="one size"):
        load(str(tiny_checkpoint), LoadOptions(max_pixels=784))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_device_map_gives_the_same_answers(hub_checkpoints, family):
    image = Image.effect_mandelbrot((60, 50), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    answers = []
    for device_map in (None, "auto"):
        backbone = load(str(hub_checkpoints[family]), LoadOptions(device_map=device_map))
        with torch.inference_mode():
            inputs = backbone.inputs([image], ["What is it?"])
            answers.append(backbone.model.generate(**inputs, max_new_tokens=6, do_sample=False).tolist())
    assert answers[0] == answers[1]


@pytest.mark.parametrize("family, plain", [("llava", "tiny"), ("qwen2_5_vl", "tiny_qwen")])
def test_files_of_earlier_releases_load_alike(hub_checkpoints, tmp_path, family, plain):
    """The published repositories have them: other tensor names, flat settings, limits of pixels."""
    import importlib

    old = load(str(hub_checkpoints[family]), LoadOptions())
    new = load(str(importlib.import_module(plain).make_checkpoint(tmp_path / "new")), LoadOptions())
    index = json.loads((hub_checkpoints[family] / "model.safetensors.index.json").read_text())["weight_map"]
    config = json.loads((hub_checkpoints[family] / "config.json").read_text())
    if family == "llava":
        assert any(key.startswith("vision_tower.vision_model.encoder") for key in index)
    else:
        assert "text_config" not in config and config["rope_scaling"]["type"] == "mrope"
        assert old.describe()["max_pixels"] == new.describe()["max_pixels"]
    assert all(torch.equal(a, b) for a, b in zip(old.model.parameters(), new.model.parameters(), strict=True))
    inputs = [b.inputs([Image.new("RGB", (150, 90), "red")], ["What is it?"]) for b in (old, new)]
    assert all(torch.equal(inputs[0][key], inputs[1][key]) for key in inputs[1])
    with torch.inference_mode():
        logits = [b.model(**i).logits for b, i in zip((old, new), inputs)]
    assert torch.equal(*logits)


def test_quantising_without_the_library_names_the_extra(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'visual-token-pruning-bench\[quantize\]'"):
        load(str(tiny_checkpoint), LoadOptions(quantize="4bit"))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_quantised_weights(hub_checkpoints, family):
    """On a CPU, where bitsandbytes can do 4 bits. Only the language model is quantised, FLOPs do not
    change, and a method cuts."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from harness.costs import macs
    from methods import registry

    folder = str(hub_checkpoints[family])
    plain, small = load(folder, LoadOptions()), load(folder, LoadOptions(quantize="4bit"))
    assert small.describe()["quantized"] == "4bit" and "quantized" not in plain.describe()
    linear = {n for n, m in small.model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert len(linear) == 7 * 6 and all(".language_model.layers." in name for name in linear)
    inputs = small.inputs([Image.new("RGB", (150, 90), "red")], ["What is it?"])
    with torch.inference_mode(), registry.build("fastv", 4)(small.model) as trace:
        new = small.model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert trace.visual_tokens[0, -1] == 4 and new.shape[1] > inputs["input_ids"].shape[1]
    counters = [macs.ModelCounter(b.model) for b in (plain, small)]
    assert counters[0].llm([9] * 6, 20) == counters[1].llm([9] * 6, 20)
    assert counters[0].projector(9) == counters[1].projector(9)


def test_the_module_writes_a_checkpoint_in_the_hubs_layout(tmp_path, capsys):
    from backbones.random_checkpoint.__main__ import main

    folder = tmp_path / "tiny"
    assert main(["llava-1.5", str(folder)]) == 0
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1 and missing_files(folder) == []
    assert "image_processor" not in json.loads((folder / "processor_config.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert "crop_size" in json.loads((folder / "preprocessor_config.json").read_text())
    assert main(["llava-1.5", str(folder)]) == 2
    assert "not empty" in capsys.readouterr().err
