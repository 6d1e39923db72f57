"""Upstream's task code on local files: known answers give known scores, and our units give lmms-eval's
numbers.
"""

import numpy as np
import pytest

from harness.run.score_cell import evaluate
from harness.tasks.lmms import Documents, build
from harness.tasks.sources import flat
from harness.tasks.suites import BENCHMARKS


class Table:
    """Stands in for PrunedModel.generate_until: answers come from a function of the document."""

    def __new__(cls, documents, say):
        from lmms_eval.api.instance import GenerationResult, TokenCounts

        from harness.tasks.pruned_model import PrunedModel

        class TableModel(PrunedModel):
            def generate_until(self, requests):
                self.prompts = [r.args[0] for r in requests]
                texts = [say(r.args[3], documents.rows[r.args[3]]) for r in requests]
                return [GenerationResult(t, TokenCounts(1, 1)) for t in texts]

        return TableModel(None, None, None, identity={})


def run(data, name, say, limit=None):
    documents = Documents(BENCHMARKS[name], flat(BENCHMARKS[name], data, "eval"), limit)
    model = Table(documents, say)
    result, official = evaluate(build(documents), model, documents)
    return result, official, model.prompts


def test_gqa(tiny_data):
    # case and punctuation do not count; two of ten are wrong
    result, official, prompts = run(
        tiny_data, "gqa", lambda i, d: "pink" if i in (3, 7) else d["answer"].upper() + "."
    )
    assert result.value == pytest.approx(80) and official["exact_match"] == pytest.approx(0.8)
    assert prompts[0] == "What color is box 0?\nAnswer the question using a single word or phrase."
    assert len(result.units.keys) == 5, "ten questions on five images are five clusters"


def test_gqa_shows_each_question_its_image(tiny_data):
    documents = Documents(BENCHMARKS["gqa"], flat(BENCHMARKS["gqa"], tiny_data, "eval"))
    task = build(documents)
    from PIL import ImageColor
    from synthetic import COLORS

    for i in (0, 3, 8):
        (image,) = task.doc_to_visual(documents.rows[i])
        assert image.mode == "RGB" and image.getpixel((0, 0)) == ImageColor.getrgb(COLORS[i % 5])


@pytest.mark.parametrize("name", ["mmbench_en", "mmbench_cn"])
def test_mmbench_needs_every_rotation(tiny_data, name):
    wrong = {6: lambda right: "A" if right != "A" else "B"}  # one rotation of the second question
    say = lambda i, d: wrong[i](d["answer"]) if i in wrong else d["answer"]  # noqa: E731
    result, official, prompts = run(tiny_data, name, say)
    assert result.value == pytest.approx(75) == official["gpt_eval_score"]
    assert result.documents == [1.0] * 4 + [0.0] * 4 + [1.0] * 8
    assert "There are several options:\nA. " in prompts[0]
    # an unparsable answer is wrong; it must not become a network call or a random letter
    result, _, _ = run(tiny_data, name, lambda i, d: "no idea" if i == 0 else d["answer"])
    assert result.value == pytest.approx(75)


def test_mme_points(tiny_data):
    # existence (two images): one question wrong -> accuracy 75, accuracy+ 50
    result, official, _ = run(tiny_data, "mme", lambda i, d: "No" if i == 0 else d["answer"] + ".")
    assert official == {"mme_perception_score": 525.0, "mme_cognition_score": 200.0}
    assert result.value == 725.0 and result.extra["maximum"] == 800.0
    assert len(result.units.keys) == 5 and set(result.units.strata) == {
        "existence",
        "color",
        "OCR",
        "code_reasoning",
    }


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 9])
def test_a_slice_of_mme_is_scorable(tiny_data, limit):
    result, _, prompts = run(tiny_data, "mme", lambda i, d: d["answer"], limit)
    assert len(prompts) % 2 == 0 and len(prompts) >= limit
    assert result.value == result.extra["maximum"]


def test_pope_is_the_mean_f1_of_the_parts(tiny_data):
    # per part two yes, two no. Adversarial: one yes missed; a "No." to a no-question is wrong, but no false
    # positive
    said = {0: "No", 3: "No."}
    result, official, _ = run(tiny_data, "pope", lambda i, d: said.get(i, d["answer"].capitalize()))
    assert result.extra["f1_adversarial"] == pytest.approx(100 * 2 / 3)
    assert result.value == pytest.approx((100 * 2 / 3 + 100 + 100) / 3)
    assert result.extra["accuracy"] == pytest.approx(100 * 10 / 12)
    assert result.extra["pooled_f1"] == pytest.approx(100 * official["pope_f1_score"])
    assert len(result.units.keys) == 6, "clusters are images"


def test_pope_reports_a_reading_that_forgives_a_full_stop(tiny_data):
    result, _, _ = run(tiny_data, "pope", lambda i, d: d["answer"].capitalize() + ".")
    assert result.value == 0 and result.extra["f1_normalised"] == pytest.approx(100)


def test_scienceqa(tiny_data):
    say = lambda i, d: "the answer is B" if i == 5 else "AB"[d["answer"]] + (". because" if i == 2 else "")  # noqa: E731
    result, _, prompts = run(tiny_data, "scienceqa", say)
    assert result.value == pytest.approx(87.5)
    assert prompts[0].startswith("Context: A hint.\nWhich letter")


@pytest.mark.parametrize("name", ["vqav2", "textvqa"])
def test_vqa_accuracy(tiny_data, name):
    from synthetic import COLORS

    result, _, _ = run(tiny_data, name, lambda i, d: COLORS[i])
    leave_one_out = [sum(min(1, (k - (j < k)) / 3) for j in range(10)) / 10 for k in (10, 3, 2, 1)]
    assert result.value == pytest.approx(100 * np.mean(leave_one_out))
    assert result.documents == pytest.approx(leave_one_out * 2)


def test_statistics_can_be_rebuilt_from_stored_counts(tiny_data):
    for name in ("gqa", "mme", "pope", "mmbench_en"):
        result, _, _ = run(tiny_data, name, lambda i, d: "No" if i % 3 == 0 else d["answer"])
        stored = np.array(result.units.counts.tolist())
        assert BENCHMARKS[name].scoring.statistic(stored.sum(0, keepdims=True))[0] == result.value


def test_lmms_eval_prints_nothing(tiny_data, capfd):
    run(tiny_data, "mmbench_en", lambda i, d: d["answer"])
    out, err = capfd.readouterr()
    assert out == "" and err == ""


def test_missing_data_is_named(tmp_path):
    from methods.errors import UserError

    with pytest.raises(UserError, match=r"no data for pope.*eval\.parquet"):
        Documents(BENCHMARKS["pope"], flat(BENCHMARKS["pope"], tmp_path, "eval"))
    (tmp_path / "pope").mkdir()
    (tmp_path / "pope" / "eval.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(UserError, match="no readable parquet"):
        Documents(BENCHMARKS["pope"], flat(BENCHMARKS["pope"], tmp_path, "eval"))
