"""A truncated checkpoint or training state: one line that names the file and the fix, nothing overwritten."""

import json

import pytest
import torch

from methods.errors import UserError
from methods.stepprune import checkpoint
from methods.stepprune.gate import LocalDenoiser
from methods.stepprune.policy import Policy, PolicyConfig
from methods.stepprune.training import state


@pytest.fixture
def saved(tmp_path):
    """A training state's folder, the module and optimiser it was saved from, and the facts."""
    torch.manual_seed(0)
    module = torch.nn.Linear(8, 8)
    optimiser = torch.optim.AdamW(module.parameters())
    module(torch.ones(2, 8)).sum().backward()
    optimiser.step()
    facts = {"step": 3, "control": {"mean_count": 7.5}}
    state.save(tmp_path / "run.training", module, optimiser, facts)
    return tmp_path / "run.training", module, optimiser, facts


def test_a_whole_state_is_restored(saved):
    folder, module, _, facts = saved
    other = torch.nn.Linear(8, 8)
    optimiser = torch.optim.AdamW(other.parameters())
    assert state.load(folder, other, optimiser) == facts
    assert torch.equal(other.weight, module.weight) and optimiser.state_dict()["state"]


@pytest.mark.parametrize("name", ["weights.safetensors", "moments.safetensors", "facts.json"])
@pytest.mark.parametrize("left", [0, 5, 30, None])
def test_a_damaged_state_is_named_and_nothing_is_restored(saved, name, left):
    folder, _, _, _ = saved
    path = folder / name
    if left is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:left])
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    other = torch.nn.Linear(8, 8)
    weight, optimiser = other.weight.clone(), torch.optim.AdamW(other.parameters())
    with pytest.raises(UserError, match="train anew, without --resume") as caught:
        state.load(folder, other, optimiser)
    assert str(path) in str(caught.value)
    assert torch.equal(other.weight, weight) and not optimiser.state_dict()["state"]
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


@pytest.mark.parametrize("left", [0, 20, 400])
def test_a_truncated_policy_is_named(tmp_path, left):
    config = PolicyConfig(width=16, text_width=16)
    own = checkpoint.Checkpoint(tmp_path / "k8.safetensors", config, "tiny")
    own.save(Policy(config), LocalDenoiser(16))
    assert checkpoint.read(own.path).load()
    own.path.write_bytes(own.path.read_bytes()[:left])
    named = r"k8\.safetensors (cannot be read .* restore it|holds other weights .* restore both)"
    with pytest.raises(UserError, match=named):
        checkpoint.read(own.path).load()
    assert own.path.stat().st_size == left


def test_a_truncated_description_is_named(tmp_path):
    config = PolicyConfig(width=16, text_width=16)
    own = checkpoint.Checkpoint(tmp_path / "k8.safetensors", config, "tiny")
    own.save(Policy(config), LocalDenoiser(16))
    path = own.path.with_suffix(".json")
    assert json.loads(path.read_text())
    path.write_text(path.read_text()[:50])
    with pytest.raises(UserError, match=r"k8\.json is damaged .* restore it"):
        checkpoint.read(own.path)
