"""One model under each paper's way of counting, against figures that they print."""

import pytest

from backbones import shapes
from harness.cli import app
from harness.costs.conventions import CONVENTIONS
from harness.costs.shape_counter import TEXT_TOKENS, ShapeCounter
from harness.report import convention_report


@pytest.fixture(scope="module")
def counter():
    return ShapeCounter(shapes.load("llava-1.5-7b"), TEXT_TOKENS)


@pytest.mark.parametrize(
    "name, spec, printed",
    [
        ("stepprune", "vanilla", "8.89"), ("stepprune", "uniform", "2.13"), ("stepprune", "holov", "2.15"),
        ("hiprune", "vanilla", "8.63"), ("provip", "vanilla", "4.24"), ("pdrop", "vanilla", "3.82"),
        ("pdrop", "pdrop:schedule=stock", "1.78"), ("fastv", "vanilla", "2.99"),
    ],
)  # fmt: skip
def test_printed_figures_follow_under_their_papers_rule(counter, name, spec, printed):
    budget = None if spec == "vanilla" else 64
    assert f"{CONVENTIONS[name].tera(counter, spec, budget):.2f}" == printed


def test_ours_is_what_the_tables_print(counter):
    for spec, budget in (("vanilla", None), ("fastv", 64), ("stepprune", 128)):
        ours = counter.count(spec, budget).tflops
        assert CONVENTIONS["ours"].tera(counter, spec, budget) == pytest.approx(ours, rel=1e-12)


def test_conventions_on_a_windowed_tower():
    counter = ShapeCounter(shapes.load("qwen2.5-vl-7b"), TEXT_TOKENS)
    whole, without = (CONVENTIONS[n].tera(counter, "vanilla", None) for n in ("ours", "stepprune"))
    family, vision = counter.shape.family, counter.shape.config.vision_config
    pixels = counter.shape.image_pixels
    assert 0 < family.tower_attention_macs(vision, *pixels) < 0.1 * family.tower_macs(vision, *pixels)
    assert without < whole * 1.02


def test_the_command(capsys):
    arguments = ["flops", "--convention", "stepprune", "pdrop", "--methods", "holov", "--budget", "64"]
    assert app.main(arguments) == 0
    out = capsys.readouterr().out
    assert "causal attention counted half" in out and "found from the printed figures" in out
    rows = [line.replace(" ", "") for line in out.splitlines() if line.startswith("|")]
    assert "|holov|64|2.153|0.416|" in rows
    printed = [line.replace(" ", "") for line in out.splitlines() if "|2.15|" in line.replace(" ", "")]
    assert printed == ["|holov,64|arXiv2605.28051|holov|2.15|2.153=|0.416|"]
    assert [convention_report.reading(x, 2.98) for x in (2.984, 2.986, 2.991)] == ["rounded", "cut off", ""]
    assert app.main(["flops", "--convention", "nobody"]) == 2
    assert "known: ours, stepprune" in capsys.readouterr().err
    assert app.main(["flops", "--convention", "all", "--text-tokens", "5"]) == 2
