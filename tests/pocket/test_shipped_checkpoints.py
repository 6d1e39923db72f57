"""The shipped checkpoints: small, ordinary, and they read their images."""

import pytest
import torch
from PIL import Image

import backbones
from harness.pocket.supplies import Pocket8

SCENES, MEGABYTES = 6, 40


@pytest.fixture(scope="module", params=backbones.available())
def shipped(request):
    return backbones.load(request.param)


@pytest.fixture(scope="module")
def questions(shipped):
    """Images and questions of all eight tasks, drawn from a split that no training has seen."""
    source = Pocket8("calibration", questions=8, seed=3, varied=shipped.family.any_size)
    return [(e.image, *asked) for e in map(source.__getitem__, range(SCENES)) for asked in e.asked]


@torch.inference_mode()
def right(shipped, images, questions) -> int:
    """How many questions are answered as they should, to the letter."""
    inputs = shipped.inputs(images, [prompt for _, prompt, _ in questions])
    ids = shipped.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    said = shipped.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(s.strip() == answer.strip() for s, (_, _, answer) in zip(said, questions))


def test_is_small(shipped):
    assert sum(f.stat().st_size for f in shipped.folder.iterdir()) <= MEGABYTES * 1e6
    assert {f.suffix for f in shipped.folder.iterdir()} <= {".json", ".safetensors", ".jinja"}


def test_answers_and_needs_the_image_for_it(shipped, questions):
    images = [image for image, _, _ in questions]
    grey = [Image.new("RGB", image.size, (127, 127, 127)) for image in images]
    seeing, blind = right(shipped, images, questions), right(shipped, grey, questions)
    assert seeing >= 0.7 * len(questions)
    assert blind <= 0.5 * len(questions)


def test_pocket_qwen_is_a_real_one():
    model = backbones.load("pocket-qwen").model
    vision, text = model.config.vision_config, model.config.get_text_config()
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert 0 < len(vision.fullatt_block_indexes) < vision.depth, "layers with windows and without"
    assert vision.window_size < 224, "several windows in every image"
    assert len(text.rope_parameters["mrope_section"]) == 3


def test_pocket_qwen_sees_images_of_different_sizes_in_one_batch():
    qwen = backbones.load("pocket-qwen")
    sizes = [(224, 448), (448, 224), (300, 301)]
    inputs = qwen.inputs([Image.new("RGB", size) for size in sizes], ["a"] * 3)
    counts = (inputs["input_ids"] == qwen.model.config.image_token_id).sum(1).tolist()
    assert counts[0] == counts[1] == 128 and counts[2] == 121
