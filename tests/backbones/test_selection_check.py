"""An answer that cannot be applied is refused by method and field, before and inside the language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from PIL import Image

from methods.base import Pruner, Selection, Stage
from methods.errors import BadSelection, UserError

N = 8


def five(device="cpu"):
    return torch.arange(5, device=device)


#: what the method answers, given how many tokens of which values it is offered -> what the message says
BAD = {
    "None": (lambda n, x: None, "returned None"),
    "a tensor": (lambda n, x: five(), "returned a Tensor"),
    "a list": (lambda n, x: Selection([0, 1]), r"Selection\.kept is a list"),
    "a mask": (lambda n, x: Selection(torch.arange(n) < 5), r"Selection\.kept is a boolean mask"),
    "floats": (lambda n, x: Selection(five().float()), r"Selection\.kept has dtype float32"),
    "int32": (lambda n, x: Selection(five().int()), r"Selection\.kept has dtype int32"),
    "two dimensions": (lambda n, x: Selection(five()[None]), r"Selection\.kept has shape \(1, 5\)"),
    "none": (lambda n, x: Selection(five()[:0]), r"Selection\.kept is empty"),
    "too many": (lambda n, x: Selection(torch.arange(n + 1)), r"Selection\.kept has \d+ tokens of \d+"),
    "out of range": (lambda n, x: Selection(five() + n - 2), r"Selection\.kept names token \d+"),
    "negative": (lambda n, x: Selection(five() - 1), r"Selection\.kept names token -1"),
    "a token twice": (lambda n, x: Selection(five() // 2), r"Selection\.kept names a token twice"),
    "NaN": (
        lambda n, x: Selection(five(), x[:5] * float("nan")),
        r"Selection\.tokens holds numbers .* not fin",
    ),
    "infinite": (
        lambda n, x: Selection(five(), x[:5] / 0),
        r"Selection\.tokens holds numbers that are not fin",
    ),
    "too few values": (lambda n, x: Selection(five(), x[:4]), r"Selection\.tokens has shape \(4, "),
    "narrow values": (lambda n, x: Selection(five(), x[:5, :-1]), r"Selection\.tokens has shape \(5, "),
    "half values": (lambda n, x: Selection(five(), x[:5].half()), r"Selection\.tokens has dtype float16"),
    "no tensor": (lambda n, x: Selection(five(), [1.0]), r"Selection\.tokens is a list"),
    "projected alone": (lambda n, x: Selection(five(), projected=True), r"Selection\.projected is set"),
    "places short": (
        lambda n, x: Selection(five(), x[:5], places=five()[:3]),
        r"Selection\.places has 3 ent",
    ),
    "places off": (
        lambda n, x: Selection(five(), x[:5], places=five() + n),
        r"Selection\.places names token",
    ),
    "places below": (
        lambda n, x: Selection(five(), x[:5], places=five() - 9),
        r"Selection\.places names token -9",
    ),
    "places float": (
        lambda n, x: Selection(five(), places=five() * 1.0),
        r"Selection\.places has dtype float32",
    ),
    "merged without tokens": (
        lambda n, x: Selection(five(), merged=torch.full((n,), -1)),
        r"Selection\.merged is set, but there are no tokens",
    ),
    "merged short": (
        lambda n, x: Selection(five(), x[:5], merged=five()),
        r"Selection\.merged has 5 entries for \d+ tokens offered",
    ),
    "merged off": (
        lambda n, x: Selection(five(), x[:5], merged=torch.full((n,), 5)),
        r"Selection\.merged names place 5; 5 tokens are kept",
    ),
    "merged yet kept": (
        lambda n, x: Selection(five(), x[:5], merged=torch.zeros(n, dtype=torch.long)),
        r"Selection\.merged says of a token in Selection\.kept",
    ),
    "merged float": (
        lambda n, x: Selection(five(), x[:5], merged=torch.zeros(n)),
        r"Selection\.merged has dtype float32",
    ),
    "over the budget": (
        lambda n, x: Selection(torch.arange(N + 1)),
        rf"{N + 1} visual tokens .* budget is {N}",
    ),
}


@dataclass
class Before(Pruner):
    name: ClassVar[str] = "plugin"
    answer: object = None

    def select(self, image):
        return self.answer(len(image.features), image.features)


@dataclass
class Inside(Pruner):
    name: ClassVar[str] = "plugin"
    answer: object = None

    def stages(self, visual_tokens, layers):
        return [Stage(2, lambda s: self.answer(len(s.kept), s.hidden), attention=None)]


@pytest.fixture(scope="module")
def prompts(backbone, qwen):
    image = Image.effect_mandelbrot((120, 90), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    return {
        b.family.model_type: (b.model, b.inputs([image, image], ["What?", "Is it a fractal?"]))
        for b in (backbone, qwen)
    }


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("where", [Before, Inside])
@pytest.mark.parametrize("what", BAD)
def test_a_bad_answer_is_refused_by_method_and_field(prompts, family, where, what):
    answer, message = BAD[what]
    model, inputs = prompts[family]
    with (
        torch.inference_mode(),
        pytest.raises(BadSelection, match=rf"^plugin: .*{message}") as error,
        where(N, answer)(model),
    ):
        model(**inputs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("where", [Before, Inside])
def test_good_answers_pass(prompts, family, where):
    model, inputs = prompts[family]
    made = torch.tensor([3, -1, 3, 0])  # with values of its own a method may name what it likes
    for answer in (
        lambda n, x: Selection(five().flip(0)),
        lambda n, x: Selection(made, x[:4], places=torch.tensor([3, 3, 2, 0])),
    ):
        with torch.inference_mode(), where(N, answer)(model) as trace:
            model(**inputs)
        assert set(trace.visual_tokens[:, -1].tolist()) <= {4, 5}


def test_a_wrong_number_of_answers(prompts):
    class Short(Before):
        def select_all(self, images):
            return []

    model, inputs = prompts["llava"]
    with (
        pytest.raises(BadSelection, match="plugin: select_all returned 0 answers for 1 images"),
        Short(4)(model),
    ):
        model(**{k: v[:1] for k, v in inputs.items()})


def test_a_method_may_choose_its_own_number_if_it_says_so(prompts):
    class Own(Before):
        may_exceed_budget = True

    model, inputs = prompts["llava"]
    with torch.inference_mode(), Own(N, lambda n, x: Selection(torch.arange(n - 1)))(model) as trace:
        model(**inputs)
    assert trace.visual_tokens[:, -1].tolist() == [63, 63]


def test_a_misspelt_select_is_no_unpruned_model_under_a_budget():
    @dataclass
    class Typo(Pruner):
        name: ClassVar[str] = "typo"

        def selct(self, image):
            return Selection(five())

    assert not Typo().acts
    with pytest.raises(UserError, match="typo: a budget prunes nothing, since Typo overrides none of select"):
        Typo(budget=4)


def test_the_released_methods_pass(prompts):
    """Also with settings that keep more than the budget, as their docstrings say."""
    from methods import registry

    # weights of their own, or the answer key
    needs_more = ("stepprune", "diffprune", "cdpruner", "oracle", "things")
    specs = [s for s in registry.available() if s not in needs_more]
    specs += ["fastv:kept=20", "pdrop:schedule=stock", "visionzip:dominant=0.6", "holov:form=released"]
    specs += [
        "prumerge:schedule=adaptive",
        "prumerge_plus:schedule=adaptive",
        "prumerge_plus:schedule=released",
    ]
    for spec in specs:
        for model, inputs in prompts.values():
            with torch.inference_mode(), registry.build(spec, 16 if "pdrop" not in spec else 20)(model):
                model(**inputs)


def test_in_a_run_the_others_go_on(backbone, tmp_path, tiny_checkpoint, tiny_data, capsys, monkeypatch):
    from harness.cli import app
    from methods import registry

    @dataclass
    class Masked(Pruner):
        name: ClassVar[str] = "masked"

        def select(self, image):
            return Selection(torch.arange(len(image.features)) < 5)

    registry.available()
    monkeypatch.setitem(registry._registered, "masked", Masked)
    given = ["--backbone", str(tiny_checkpoint), "--data", str(tiny_data), "--methods", "masked,uniform"]
    given += [
        "--budget",
        "16",
        "--tasks",
        "pope",
        "--limit",
        "4",
        "--out",
        str(tmp_path),
        "--latency-repeats",
        "1",
    ]
    assert app.run_all(given) == 1
    said = capsys.readouterr().out
    assert "FAILED pope / masked / 16: " in said and "Selection.kept is a boolean mask" in said
    assert "FAILED pope / uniform" not in said and "uniform" in (tmp_path / "leaderboard.md").read_text()
