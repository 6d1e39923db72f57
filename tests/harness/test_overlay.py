"""`harness overlay`: what is kept is where the picture shows it, and in the order it was chosen."""

import numpy as np
import pytest
import torch
from PIL import Image

from harness.cli import app
from harness.report import overlay
from methods import registry
from methods.errors import UserError
from methods.stepprune import checkpoint as checkpoints
from methods.stepprune.gate import LocalDenoiser
from methods.stepprune.policy import Policy, PolicyConfig


@pytest.fixture(scope="module")
def picture():
    noise = torch.randint(0, 255, (112, 112, 3), generator=torch.Generator().manual_seed(0))
    return overlay.Picture(Image.fromarray(noise.to(torch.uint8).numpy()), "What is there?")


def test_dropped_tokens_are_faded():
    pixels = np.zeros((12, 8, 3))
    shown = overlay._faded(pixels, np.array([0, 5]), (3, 2))
    assert (shown[:4, :4] == 0).all() and (shown[8:, 4:] == 0).all()
    assert (shown[:4, 4:] == 0.85).all() and (shown[4:8] == 0.85).all()


def test_methods_inside_the_llm_are_taken_at_their_end(backbone, picture):
    found = overlay.look(backbone, registry.build("fastv", budget=12), picture)
    with torch.no_grad(), registry.build("fastv", budget=12)(backbone.model) as trace:
        backbone.model(**backbone.inputs([picture.image], [picture.question]))
    assert found.kept.tolist() == trace.kept[0][-1].tolist() and len(found.kept) == 12
    assert found.order is None
    assert len(overlay.look(backbone, registry.build("vanilla"), picture).kept) == 64


def test_order_of_choice(backbone, picture, tmp_path):
    torch.manual_seed(0)
    policy = Policy(PolicyConfig(32, 32, heads=4, max_steps=40))
    checkpoint = checkpoints.Checkpoint(
        tmp_path / "p.safetensors", policy.config, "tiny-llava", 12.0, [(4.0, 2.0), (12.0, 0.3)]
    )
    checkpoint.save(policy, LocalDenoiser(32))
    pruner = registry.build(f"stepprune:checkpoint={checkpoint.path}", budget=12)
    found = overlay.look(backbone, pruner, picture)
    chosen = pruner.orders[0].tolist()
    assert sorted(chosen) == found.kept.tolist() and len(chosen) > 2
    assert [chosen[place] for place in found.order] == found.kept.tolist()
    layer = overlay._coloured(found, (8, 8))
    assert (layer[..., 3] > 0).sum() == len(chosen)


def test_command(tiny_checkpoint, picture, tmp_path, capsys):
    picture.image.save(tmp_path / "a.png")
    out = tmp_path / "made/overlay.png"
    arguments = ["overlay", "--backbone", str(tiny_checkpoint), "--methods", "random,fastv", "--budget", "9"]
    arguments += ["--images", str(tmp_path / "a.png"), "--out", str(out)]
    assert app.main(arguments) == 2 and "--question" in capsys.readouterr().err
    assert app.main([*arguments, "--question", "What?"]) == 0
    assert "random 9 tokens" in capsys.readouterr().out and Image.open(out).width > 500
    with pytest.raises(UserError, match="cannot read the image"):
        overlay._from_file(tmp_path / "none.png", "What?")


def test_default_scenes(backbone):
    sparse, dense = overlay.scenes(None, backbone)
    assert sparse.answer and dense.answer and sparse.image.size == dense.image.size == (336, 336)
    assert {p.question for p in overlay.scenes("What?", backbone)} == {"What?"}
