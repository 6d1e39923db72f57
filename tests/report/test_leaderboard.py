"""The table's arithmetic, on made-up records."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny

from harness.costs import macs
from harness.report import figures, leaderboard, numbers
from harness.run.config import RunConfig
from harness.tasks.suites import BENCHMARKS

LAYERS = tiny.LAYERS


@pytest.fixture(scope="module")
def counter():
    return macs.ModelCounter(tiny.make_model(tiny.make_tokenizer()))


def build(config, cells, measured, counter, text_tokens):
    return numbers.build(
        cells, measured, budgets=config.budgets, tasks=[b.name for b in config.benchmarks], seed=config.seed,
        counter=counter, text_tokens=text_tokens,
    ).table  # fmt: skip


def config(*budgets, tasks=("gqa", "pope")):
    return RunConfig(budgets=budgets, benchmarks=tuple(BENCHMARKS[t] for t in tasks), out=Path("out"))


def cell(task, spec, budget, hits, kept):
    """A record with one document per cluster; hits: 0/1 per document."""
    columns = [[h, 1] for h in hits] if task != "pope" else [[h, 1 - h, 1 - h] for h in hits]
    score = 100 * sum(hits) / len(hits)
    return {
        "status": "done",
        "task": task,
        "method": {"spec": spec, "budget": budget},
        "metrics": {"score": score, "interval": [score - 5, score + 5], "resamples": 500},
        "visual_tokens": {
            "kept": kept, "mean_over_layers": kept, "text_tokens": 20.4,
            "rows": [[[kept] * LAYERS, len(hits)]],
        },
        "data": {"documents": len(hits), "documents_in_file": 2 * len(hits)},
        "units": {
            "cluster": [str(i) for i in range(len(hits))],
            "stratum": ["0"] * len(hits),
            "counts": columns,
        },
    }  # fmt: skip


def cost(spec, budget, total, selection=1000):
    part = {"p10": total / 3 - 1, "median": total / 3, "p90": total / 3 + 1}
    return {
        "status": "done",
        "method": {"spec": spec, "budget": budget},
        "macs": {"tower": 10_000, "projector": 100, "selection": selection},
        "latency_ms": {
            "total": {"p10": total - 1, "median": total, "p90": total + 1},
            **dict.fromkeys(("vision", "selection", "llm"), part),
            "vanilla_total_median": 30.0, "peak_bytes": None, "joules": None,
        },
    }  # fmt: skip


ALL, HALF = [1] * 40, [1, 0] * 20


def example(counter, budgets=(16,)):
    cells = [cell(t, "vanilla", None, ALL, 64) for t in ("gqa", "pope")]
    measured = [cost("vanilla", None, 30.0, selection=0)]
    for b in budgets:
        cells += [cell("gqa", "fastv", b, HALF, b), cell("pope", "fastv", b, ALL, b)]
        measured.append(cost("fastv", b, 15.0))
    return build(config(*budgets), cells, measured, counter, 20)


def test_average_is_the_mean_of_ratios(counter):
    row = example(counter).set_index("method").loc["fastv"]
    assert row["average"] == pytest.approx((50 + 100) / 2)
    # only gqa varies: its ratio has the spread of a proportion of 40, halved by the mean over two tasks
    half = 100 * 1.96 * np.sqrt(0.25 / 40) / 2
    assert row["average_low"] == pytest.approx(75 - half, abs=2) and row["average_high"] == pytest.approx(
        75 + half, abs=2
    )


def test_vanilla_against_itself_has_no_spread(counter):
    row = example(counter).set_index("method").loc["vanilla"]
    assert row["average"] == row["average_low"] == row["average_high"] == 100
    assert row["gflops_ratio"] == 1 and row["speedup"] == 1


def test_flops_are_measured_parts_plus_the_llm_at_the_measured_counts(counter):
    row = example(counter).set_index("method").loc["fastv"]
    assert row["gflops"] == pytest.approx(2 * (10_000 + 100 + 1000 + counter.llm([16] * LAYERS, 20)) / 1e9)
    assert row["speedup"] == 2


def test_kept_varies_from_document_to_document(counter):
    """Half of gqa's 40 documents keep 8 tokens, half 24; all of pope's 16."""
    cells = [cell(t, "vanilla", None, ALL, 64) for t in ("gqa", "pope")]
    cells += [cell("gqa", "fastv", 16, HALF, 16), cell("pope", "fastv", 16, ALL, 16)]
    cells[2]["visual_tokens"]["rows"] = [[[8] * LAYERS, 20], [[24] * LAYERS, 20]]
    measured = [cost("vanilla", None, 30.0, selection=0), cost("fastv", 16, 15.0)]
    table = build(config(16), cells, measured, counter, 20)
    spread = table.set_index("method")["kept_std"]
    assert spread["vanilla"] == 0 and spread["fastv"] == pytest.approx(32**0.5)
    text = leaderboard.render(config(16), table, [])
    assert " 16.0 ± 5.7 / 16.0 |" in text and " 64.0 / 64.0 |" in text


def test_one_block_a_budget_each_with_vanilla(counter):
    table = example(counter, (8, 16))
    assert list(zip(table["block"], table["method"])) == [
        (16, "vanilla"),
        (16, "fastv"),
        (8, "vanilla"),
        (8, "fastv"),
    ]
    text = leaderboard.render(config(8, 16), table, ["caption"])
    assert text.index("Budget 16 visual tokens") < text.index("Budget 8 visual tokens")
    assert text.count("| vanilla") == 4, "in the leaderboard and in the cost table of each block"


@pytest.mark.parametrize("columns", ["84", "300"])
def test_the_terminals_table_fits_the_terminal(counter, monkeypatch, columns):
    """A method's name gives way, down to eight letters; more than 100 columns are never used."""
    monkeypatch.setenv("COLUMNS", columns)
    table = example(counter, (16,)).replace({"method": {"fastv": "fastv:" + "k=3," * 40}})
    text = leaderboard.terminal(config(16), table, [])
    assert max(map(len, text.splitlines())) == min(int(columns), 100) and "fastv:" in text


def test_fractions_are_blocks_too(counter):
    text = leaderboard.render(config(0.25), example(counter, (0.25,)), ["caption"])
    assert "## Budget 25 % of an image's visual tokens (75 % pruned)\n" in text


@pytest.mark.parametrize(
    ("budgets", "where", "words"),
    [
        ((0.125, 0.5), [12.5, 50], "% of an image's visual tokens"),
        ((16, 0.5), [16, 32], "(visual tokens)"),
    ],
)
def test_budgets_on_the_axis(counter, tmp_path, monkeypatch, budgets, where, words):
    drawn = {}
    save = figures._save
    monkeypatch.setattr(figures, "_save", lambda f, path: (drawn.update({path.stem: f}), save(f, path))[1])
    paths = figures.draw(example(counter, budgets), tmp_path)
    assert all(path.stat().st_size > 1000 for path in paths)
    axes = drawn["accuracy_budget"].axes[0]
    assert list(axes.get_xticks()) == where and words in axes.get_xlabel()
    assert "vanilla (64 tokens)" in [text.get_text() for text in axes.get_legend().get_texts()]


def test_figures_tell_methods_apart_in_colour_and_in_grey(counter, tmp_path, monkeypatch):
    """Also with more methods than there are marker shapes; bars are there, and files are the same again."""
    look = figures.styles([f"m{i}" for i in range(24)])
    assert len({s.colour for s in look.values()}) == 24
    assert len({(s.marker, s.filled) for s in look.values()}) == 24
    drawn = {}
    save = figures._save
    monkeypatch.setattr(figures, "_save", lambda f, path: (drawn.update({path.stem: f}), save(f, path))[1])
    paths = figures.draw(example(counter, (16, 8)), tmp_path)
    assert {p.name for p in paths} == {f"{n}.{s}" for n in figures.NAMES for s in figures.FORMATS}
    assert all(figure.axes[0].containers for figure in drawn.values()), "error bars"
    svg = {p.name: p.read_bytes() for p in paths if p.suffix == ".svg"}
    assert all(b">fastv</text>" in body for body in svg.values()), "text stays text"
    figures.draw(example(counter, (16, 8)), tmp_path)
    assert svg == {name: (tmp_path / name).read_bytes() for name in svg}
    nothing = example(counter, (16,)).assign(average=float("nan"))
    assert figures.draw(nothing, tmp_path) == [] and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "average, cost, front",
    [
        ([100, 90, 80, 95], [10, 5, 6, 7], ([5, 7, 10], [90, 95, 100])),
        ([100, 100, 50], [10, 8, 8], ([8], [100])),
    ],
)
def test_the_pareto_front_has_what_no_other_beats(average, cost, front):
    names = ["a", "b", "c", "d"][: len(average)]
    rows = pd.DataFrame({"method": names, "average": average, "prefill": cost})
    key = pd.DataFrame({"method": ["oracle"], "average": [200], "prefill": [1]})
    assert figures._front(pd.concat([rows, key]), "prefill") == front


def test_a_failed_cell_leaves_gaps_and_no_average(counter):
    cells = [cell(t, "vanilla", None, ALL, 64) for t in ("gqa", "pope")]
    broken = {"status": "failed", "task": "pope", "method": {"spec": "fastv", "budget": 16}, "error": "boom"}
    cells += [cell("gqa", "fastv", 16, HALF, 16), broken]
    table = build(config(16), cells, [cost("vanilla", None, 30.0), cost("fastv", 16, 15.0)], counter, 20)
    row = table.set_index("method").loc["fastv"]
    assert row["gqa"] == 50 and pd.isna(row["average"]) and row["failed"] == ["pope"]
    assert "failed" in leaderboard.render(config(16), table, ["caption"])


def test_a_vanilla_score_of_zero_gives_no_ratio(counter):
    cells = [cell("gqa", "vanilla", None, [0] * 40, 64), cell("gqa", "fastv", 16, HALF, 16)]
    measured = [cost("vanilla", None, 30.0), cost("fastv", 16, 15.0)]
    table = build(config(16, tasks=("gqa",)), cells, measured, counter, 20)
    assert "average" not in table or table["average"].isna().all()
    assert "fastv" in leaderboard.render(config(16, tasks=("gqa",)), table, ["caption"])


def test_the_text_length_is_the_mean_over_all_documents():
    one, two = cell("gqa", "vanilla", None, ALL, 64), cell("pope", "vanilla", None, ALL + ALL, 64)
    two["visual_tokens"]["text_tokens"] = 50
    assert numbers.common_text_length([one, two]) == round((40 * 20.4 + 80 * 50) / 120)
