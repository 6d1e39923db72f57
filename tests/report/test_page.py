"""The page of a run, in a real browser: rows, sorting, filters, overlays, links; nothing fetched."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from harness.report import page
from harness.report.page import lineage
from harness.tasks import sampling

needs_chromium = pytest.mark.skipif(
    not shutil.which("chromium") or not shutil.which("chromedriver"),
    reason="needs Debian's packages chromium and chromium-driver",
)
TASKS = [
    {"name": "gqa", "title": "GQA", "group": "task"}, {"name": "mme", "title": "MME <b>", "group": "task"},
    {"name": "regime: dense", "title": "dense", "group": "regime"},
    {"name": "kind: hop", "title": "hop <i>", "group": "kind"},
]  # fmt: skip
EVIL = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">"
#: method, role, where, average, GQA, MME
ROWS = [
    ("vanilla", "reference", "none", 100.0, 80.0, 1500.0),
    ("stepprune", "method", "before", 92.0, 70.0, 1400.0),
    ("fastv", "method", "inside", 85.0, 75.0, 1100.0),
    ("evil<i>x</i>", "method", "before", 70.0, 60.0, 1000.0),
    ("random", "control", "before", 60.0, 50.0, 900.0),
    ("oracle", "answer key", "before", 99.0, 79.0, 1490.0),
]


def question(number: int, right: dict[str, bool]) -> page.Explored:
    answers = {
        m: {
            "text": "red" if ok else EVIL,
            "score": float(ok),
            "kept": [0, 5],
            "ordered": m == "stepprune",
            "tokens": 2,
            "merged": [-1] * 10 + [1] * 2 + [-1] * 4 if m == "fastv" else None,
        }
        for m, ok in right.items()
    }
    return page.Explored(
        f"gqa/{number}", "gqa", "GQA", f"What colour? {EVIL}", "red", Image.new("RGB", (64, 64)), (4, 4),
        "dense" if number else "sparse", "look-up", [3], answers,
    )  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A page of two budgets, a failed cell, a method's name and a question that hold markup."""
    rows = []
    for budget in (128, 64):
        for at, (name, role, _, average, gqa, mme) in enumerate(ROWS):
            less = 0 if role == "reference" or budget == 128 else at
            row = {"block": budget, "method": name, "budget": None if role == "reference" else budget}
            row |= {"average": average - less, "average_low": average - 5, "average_high": average + 5}
            row |= {"gqa": gqa, "gqa_low": gqa - 6, "gqa_high": gqa + 6, "mme": mme, "mme_low": mme - 90}
            row |= {"mme_high": mme + 90, "kept": budget, "kept_std": 0.0, "mean_over_layers": budget}
            row |= {"regime: dense": 50.0 + at, "recall": 80.0 - at, "recall_alone": 40.0, "capped": at}
            row |= {"kind: hop": None if role == "reference" else 30.0 - at, "regime: dense_low": 40.0}
            row |= {"regime: dense_high": 60.0, "equal_cost": 50.0 + at, "equal_cost_budget": 48.0}
            row |= {"gflops": 5.0 + at, "gflops_ratio": 0.5, "prefill": 30.0 + at, "speedup": 1.5}
            rows.append(
                {**row, "failed": ["mme"] if name == "random" else [], "group": "a" if at < 3 else "b"}
            )
    cells = [[None, [7.0, 1.0, 13.0, 0.01, True]], [[-7.0, -13.0, -1.0, 0.01, True], None]]
    data = page.build(
        "tiny",
        pd.DataFrame(rows),
        TASKS,
        {128: "128 visual tokens", 64: "64 visual tokens"},
        {name: (role, where, "ours" if name == "fastv" else "") for name, role, where, *_ in ROWS},
        {64: {"methods": ["stepprune", "fastv"], "cells": cells}},
        [question(0, {"stepprune": True, "fastv": False}), question(1, {"stepprune": False, "fastv": True})],
        asked=77,
    )
    out = tmp_path_factory.mktemp("page") / "index.html"
    printed = lineage.section("llava", [], {64.0: {"visionzip": 80.0, "fastv": 85.0, "unknown": 1.0}})
    printed["tables"][0]["rows"][1]["note"] = printed["tables"][0]["others"][0] = EVIL
    return page.write(out, data, [f"caption {EVIL}"], "Six methods", "made by a test", printed)


def test_the_data_of_the_page_can_be_read_back(written):
    text = written.read_text(encoding="utf-8")
    body = text.split('<script type="application/json" id="data">')[1].split("</script>")[0]
    data = json.loads(body)
    assert [r["method"] for r in data["blocks"][1]["rows"]] == [name for name, *_ in ROWS]
    assert data["pictures"][data["questions"][0]["image"]].startswith("data:image/webp;base64,")
    assert len(data["pictures"]) == 1, "two questions on one picture"


def test_markup_in_names_questions_and_captions_stays_text(written):
    text = written.read_text(encoding="utf-8")
    assert text.count("<script") == 2 and 'onerror="document' not in text.replace("&#34;", "'")


def test_nothing_is_fetched(written):
    text = written.read_text(encoding="utf-8")
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "") and "https://" not in text


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Headless Chromium that records its console and its requests."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--disable-dev-shm-usage", "--window-size=1280,1600",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser, written):
    browser.get_log("performance"), browser.get_log("browser")
    browser.get("about:blank")
    browser.get(written.as_uri())
    return browser


def rows(driver) -> list[str]:
    return driver.execute_script(
        "return [...document.querySelectorAll('#board tbody tr')].map(r => r.dataset.method)"
    )


def choose(driver, select: str, value: str) -> None:
    driver.execute_script(
        "const s = document.getElementById(arguments[0]); s.value = arguments[1];"
        "s.dispatchEvent(new Event('change'))",
        select,
        value,
    )


def shown(driver, select: str, value: str) -> list[str]:
    choose(driver, select, value)
    return rows(driver)


@needs_chromium
def test_rows_stand_best_first_below_the_reference(opened):
    assert rows(opened) == ["vanilla", "oracle", "stepprune", "fastv", "evil<i>x</i>", "random"]
    assert "failed: mme" in opened.find_element("id", "board").text


@needs_chromium
def test_columns_budgets_and_filters(opened):
    assert shown(opened, "column", "gqa")[2:4] == ["fastv", "stepprune"]
    assert shown(opened, "where", "inside") == ["vanilla", "oracle", "fastv", "random"]
    opened.find_element("id", "controls").click()
    assert rows(opened) == ["vanilla", "fastv"]
    choose(opened, "where", "")
    choose(opened, "column", "average")
    choose(opened, "budget", "1")
    assert "91.0" in opened.find_element("id", "board").text  # at 128 tokens it has 92.0
    head = opened.find_element("css selector", "#board th[data-sort=method]")
    head.click()
    assert rows(opened) == ["vanilla", "evil<i>x</i>", "fastv", "stepprune"]


@needs_chromium
def test_regimes_kinds_evidence_and_cut_answers(opened):
    """Columns that only some data has: they sort, and a row without a number stands last."""
    assert shown(opened, "column", "regime: dense")[1:3] == ["oracle", "random"]
    assert shown(opened, "column", "kind: hop")[-1] == "oracle"
    text = opened.find_element("id", "board").text
    assert all(head in text for head in ("Evidence", "unmerged", "Cut", "hop <i>", "52.0 @ 48"))
    opened.find_element("css selector", "#board th[data-sort=recall]").click()
    assert rows(opened)[1] == "stepprune"
    groups = opened.find_elements("css selector", "#column optgroup")
    assert [g.get_attribute("label") for g in groups] == ["Tasks", "Scenes (regime)", "Kinds of question"]
    assert "2 of 77 questions are embedded" in opened.find_element("id", "embedded").text


@needs_chromium
def test_pairs_tell_what_is_significant(opened):
    choose(opened, "budget", "1")
    opened.find_element("css selector", "#pairs-box summary").click()
    sure = opened.find_elements("css selector", "#pairs td.sure")
    assert [cell.text for cell in sure] == ["+7.0", "-7.0"] and "1.0 to 13.0" in sure[0].get_attribute(
        "title"
    )


@needs_chromium
@pytest.mark.parametrize("axis", ["prefill", "gflops", "mean_over_layers"])
def test_every_method_is_in_the_plot_in_a_colour_of_its_own(opened, axis):
    choose(opened, "axis", axis)
    groups = opened.find_elements("css selector", "#plot g[data-method]")
    assert len(groups) == 2 * len(ROWS)
    colours = opened.execute_script(
        "return [...document.querySelectorAll('#plot g[data-method]')].map(g => [g.dataset.method, "
        "g.querySelector('path, circle').getAttribute('fill')])"
    )
    assert len({tuple(c) for c in colours}) == len({c for _, c in colours}) == len(ROWS)


@needs_chromium
def test_the_lineage_of_printed_cells_is_told(opened):
    section = opened.find_element("id", "published")
    table = section.find_element("css selector", "table.lineage")
    lines = {r.text.split(" tokens")[0]: r for r in table.find_elements("css selector", "tbody tr")}
    assert len(lines) == 16 and "the method's own paper" in lines["stepprune, 64"].text
    (cell,) = lines["visionzip, 64"].find_elements("css selector", "td.other")
    assert cell.text == "50.4" and "55.4 in six papers" in cell.get_attribute("title")
    (mean,) = lines["fastv, 64"].find_elements("css selector", "td.further")
    assert "follows over 10 columns, with seed, vizwiz" in mean.get_attribute("title")
    assert len(lines["visionzip, 192"].find_elements("css selector", "td.checked")) >= 6, "a second source"
    assert "<script>" in section.find_element("css selector", "ul.others").text, "markup stays text"
    order = [r.text for r in section.find_elements("css selector", "#order tbody tr")]
    assert order == ["visionzip 64 92.0 80.0", "fastv 64 76.8 85.0"], "in the printed order"
    costs = section.find_element("css selector", "table.costs").text
    assert "holov, 64 tokens 77.39 31.96 + 2.77 + 41.48 2.15" in costs


def test_cells_stand_beside_the_printed_ones_only_where_they_compare():
    def record(name, layers, comparable, spec="fastv"):
        return {
            "status": "done", "task": "gqa", "method": {"spec": spec, "budget": 64},
            "backbone": {"name": name, "layers": layers}, "data": {"comparable_to_paper": comparable},
            "metrics": {"score": 45.0, "interval": [44.0, 46.04]},
        }  # fmt: skip

    alike = record("some/llava-1.5-7b-hf", 32, True)
    (row,) = lineage.section("llava", [alike], None)["beside"]
    assert row == {"row": "Table 1: fastv, 64 tokens", "task": "GQA", "theirs": "46.1", "ours": "45.0",
                   "interval": "44.0–46.0"}  # fmt: skip
    others = [record("pocket-llava", 12, True), record("llava-1.5-7b", 12, True)]
    others += [record("llava-1.5-7b", 32, False), record("llava-1.5-7b", 32, True, "fastv:k=3")]
    assert lineage.section("llava", others, None)["beside"] == []


@needs_chromium
def test_the_explorer_finds_where_one_is_right_and_the_other_wrong(opened):
    choose(opened, "right", "stepprune")
    choose(opened, "wrong", "fastv")
    assert opened.find_element("id", "found").text == "1 of 1"
    assert opened.current_url.endswith("#q=gqa%2F0")
    assert "<script>" in opened.find_element("id", "question").text  # as text
    choose(opened, "regime", "dense")
    assert opened.find_element("id", "found").text == "no such question"


@needs_chromium
def test_an_overlay_is_drawn_for_a_chosen_method(opened):
    pixels = (
        "const c = document.querySelector('#question canvas'); const d = c.getContext('2d');"
        "return [d.getImageData(60, 60, 1, 1).data[3], d.getImageData(300, 300, 1, 1).data[3]]"
    )
    opened.find_element("css selector", "#question button[data-method=fastv]").click()
    kept, dropped = opened.execute_script(pixels)
    assert kept == 0 < dropped  # place 0 is kept: the picture shows; place 10 is not
    assert "2 places merged into 1 tokens" in opened.find_element("id", "question").text
    tint = opened.execute_script(
        "return [...document.querySelector('#question canvas').getContext('2d').getImageData(300, 300, 1, 1)"
        ".data]"
    )
    assert max(tint[:3]) - min(tint[:3]) > 60, "place 10 went into the second token: its colour"
    assert "yellow: where the answer is" in opened.find_element("id", "question").text


@needs_chromium
def test_a_link_opens_its_question(opened, written):
    opened.get("about:blank")
    opened.get(written.as_uri() + "#q=gqa%2F1")
    assert opened.find_element("id", "found").text == "2 of 2"


@needs_chromium
def test_no_error_in_the_console_and_no_request_leaves_the_file(opened, written):
    errors = [entry for entry in opened.get_log("browser") if entry["level"] == "SEVERE"]
    asked = [
        message["params"]["request"]["url"]
        for message in (json.loads(entry["message"])["message"] for entry in opened.get_log("performance"))
        if message["method"] == "Network.requestWillBeSent"
    ]
    assert asked and not errors
    assert all(url.startswith((written.as_uri(), "data:", "about:")) for url in asked)
    assert opened.title == "tiny: visual-token pruning leaderboard"


@needs_chromium
@pytest.mark.parametrize("width", [400, 1280])
def test_the_page_is_no_wider_than_the_window(opened, width):
    opened.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 800},
    )
    wide = opened.execute_script("return document.documentElement.scrollWidth")
    opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert wide <= width


@pytest.mark.parametrize("places", [[], [0], [5, -3, 35], [1295, 7], [40000, -1]])
def test_places_are_packed_and_come_back(places):
    text = page.packed(places)
    width = int(text[0])
    parts = [text[i : i + width] for i in range(1, len(text), width)]
    assert [-1 if part[0] == "." else int(part, 36) for part in parts] == [max(p, -1) for p in places]
    assert page.packed(None) is None


def test_the_explorers_sample_is_fixed_and_nested():
    rows = {"gqa": range(40), "mme": range(5)}
    assert sampling.sample(rows, 6) == sampling.sample(rows, 20)[:6]
    assert len(sampling.sample(rows, 100)) == 45


def test_hard_questions_are_those_that_downsampling_loses():
    scores = {"a": [1, 1, 0, 0], "b": [0, 1, 1, 0]}
    assert page.hard(scores, vanilla=[1, 1, 1, 0], reduced=[0, 1, 0, 0]) == {"a": 50.0, "b": 50.0}
    assert page.hard(scores, vanilla=[0] * 4, reduced=[0] * 4) == {}
