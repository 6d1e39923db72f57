"""Going on with a training: with the options it was begun with, and by one process at a time."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from methods.errors import UserError
from methods.stepprune.training import state
from methods.stepprune.training.options import TrainOptions


@pytest.mark.parametrize("name, value", [("seed", 1), ("lr", 1e-3), ("aggregation", "last"), ("steps", 9)])
def test_other_options_are_refused_on_resume(tmp_path, name, value):
    """They were taken without a word."""
    begun = TrainOptions(out=tmp_path / "a.safetensors", target_tokens=8.0)
    module = torch.nn.Linear(2, 2)
    optimiser = torch.optim.AdamW(module.parameters())
    folder = begun.working_folder
    state.save(folder, module, optimiser, {"step": 3, "settings": state.settings(begun)})
    free = replace(begun, resume=True, stop_at=5, workers=3)
    assert state.load(folder, module, optimiser, state.settings(free))["step"] == 3
    before = module.weight.detach().clone()
    with torch.no_grad():
        module.weight.add_(1)
    with pytest.raises(UserError, match=f"begun with {name} .*, not {value}"):
        state.load(folder, module, optimiser, state.settings(replace(begun, **{name: value})))
    assert (module.weight == before + 1).all(), "nothing is restored"


def test_two_trainings_do_not_write_one_folder(tmp_path):
    options = TrainOptions(out=tmp_path / "deep" / "a.safetensors", target_tokens=8.0)
    other = (
        "from pathlib import Path\n"
        "from methods.stepprune.training import state\n"
        "from methods.stepprune.training.options import TrainOptions\n"
        f"with state.only_training(TrainOptions(out=Path({str(options.out)!r}), target_tokens=8.0)): pass\n"
    )
    # a process of its own: lmms-eval, once imported, lets one process take a file's lock twice
    with state.only_training(options):
        done = subprocess.run([sys.executable, "-c", other], capture_output=True, text=True)
        assert done.returncode != 0 and "another training is writing" in done.stderr
    with state.only_training(options):
        pass
    assert not list((tmp_path / "deep").iterdir())
