"""The models and inputs that recordings were made on are drawn again, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from harness.parity import drawn
from methods.errors import UserError

GOLDEN = Path(__file__).parent.parent / "golden"
DESCRIBED = sorted(GOLDEN.rglob("*.drawn.json"))


def test_descriptions_are_found():
    assert len(DESCRIBED) == 8


@pytest.mark.parametrize("described", DESCRIBED, ids=lambda path: str(path.relative_to(GOLDEN)))
def test_what_is_drawn_is_what_was_recorded(described):
    """Else recordings would be compared with runs on other numbers than the released code had."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("torch's normal numbers have other last digits on this processor")
    tensors = drawn.draw(described)
    expected = json.loads(described.read_text())["sha256"]
    assert drawn.digest(tensors) == expected
    next(iter(tensors.values())).view(-1)[5] += 1e-6
    assert drawn.digest(tensors) != expected


def test_stored_and_drawn_tensors_are_read_together(tmp_path):
    described = GOLDEN / "visionzip/qwen/inputs.drawn.json"
    (tmp_path / described.name).write_text(described.read_text())
    path = tmp_path / "inputs.safetensors"
    save_file({"input_ids.1": torch.arange(3)}, path)
    both = drawn.read(path)
    assert both["input_ids.1"].tolist() == [0, 1, 2]
    assert {k: tuple(v.shape) for k, v in both.items() if k.startswith("pixel")} == {
        "pixel_values.1": (256, 1176), "pixel_values.2": (340, 1176),
    }  # fmt: skip
    path.unlink()
    assert drawn.read(path).keys() == both.keys() - {"input_ids.1"}


@pytest.mark.parametrize("text", ["{", "[]", '{"recipe": "other"}', '{"recipe": "noise", "seed": 1}'])
def test_a_wrong_description_is_one_line(tmp_path, text):
    (tmp_path / "inputs.drawn.json").write_text(text)
    with pytest.raises(UserError, match=r"cannot read .*inputs\.safetensors: "):
        drawn.read(tmp_path / "inputs.safetensors")
    with pytest.raises(UserError, match="cannot read"):
        drawn.read(tmp_path / "absent.safetensors")
