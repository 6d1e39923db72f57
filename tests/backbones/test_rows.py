"""Attention read row by row equals what eager attention computes in full."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from engine_helpers import alone, generate

from methods.base import Pruner, Selection, Stage, cls_attention


@dataclass
class Listener(Pruner):
    """Keeps everything and notes the attention it is shown."""

    name: ClassVar[str] = "listener"
    layer: int = 3
    kind: str = "previous"
    raters: bool = False
    heard: list = field(default_factory=list)

    def stages(self, visual_tokens, layers):
        def select(s):
            self.heard.append(s.attention)
            return Selection(torch.arange(len(s.kept)))

        rows = (lambda prompt: torch.tensor([-3, -1])) if self.raters else None
        return [Stage(self.layer, select, self.kind, rows)]


@pytest.mark.parametrize("raters", [False, True])
@pytest.mark.parametrize("kind", ["previous", "own"])
def test_decoder_rows(model, batch, kind, raters):
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    listener = Listener(budget=64, kind=kind, raters=raters)
    assert model.config.text_config._attn_implementation == "sdpa"
    generate(model, batch, listener)
    rows = [-3, -1] if raters else [-1]
    for row, heard in enumerate(listener.heard):
        own = alone(batch, row)  # eager attention in float64 has no finite mask for padding
        with torch.no_grad():
            maps = eager(**own, output_attentions=True).attentions
        visual = own["input_ids"][0] == model.config.image_token_id
        theirs = maps[2 if kind == "previous" else 3][0][:, rows][..., visual].float()
        assert heard.shape == theirs.shape == (4, len(rows), 64) and heard.dtype == torch.float32
        torch.testing.assert_close(heard, theirs, atol=3e-6, rtol=1e-4)
        assert theirs.max() > 5 * theirs.mean(), "flat attention would prove little"


@pytest.mark.parametrize("layer", [-1, -2])
def test_cls_row(model, batch, layer):
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        maps = eager.model.vision_tower(batch["pixel_values"], output_attentions=True).attentions
    heard = []

    @dataclass
    class Looker(Pruner):
        name: ClassVar[str] = "looker"
        signals: ClassVar[tuple] = cls_attention(layer)

        def select(self, image):
            heard.append(image.cls_attention(layer))
            return Selection(torch.arange(3))

    generate(model, batch, Looker(budget=3))
    for row, own in enumerate(heard):
        assert own.shape == (4, 65)
        torch.testing.assert_close(own, maps[layer][row][:, 0].float(), atol=1e-6, rtol=1e-4)
