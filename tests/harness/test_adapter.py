"""The adapter alone, as any lmms-eval user would hold it."""

import argparse
from itertools import pairwise

import pytest
from PIL import Image

from harness.store.journal import Journal
from harness.tasks.answering import Question, batches, capped, generate_arguments
from harness.tasks.environment import silenced
from harness.tasks.lmms import Documents, build
from harness.tasks.pruned_model import PrunedModel
from harness.tasks.sources import flat
from harness.tasks.suites import BENCHMARKS
from methods.base import Pruner


def documents(name: str, data, limit: int) -> Documents:
    return Documents(BENCHMARKS[name], flat(BENCHMARKS[name], data, "eval"), limit)


def evaluate(model, tasks):
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    with silenced():
        return simple_evaluate(
            model=model,
            tasks=tasks,
            task_manager=TaskManager(include_defaults=False),
            bootstrap_iters=0,
            process_docs_parallel=1,
            cli_args=argparse.Namespace(output_path=None, process_with_media=False),
        )


def test_several_tasks_in_one_evaluation(backbone, tiny_data, tmp_path):
    from methods import registry

    tasks = [build(documents(n, tiny_data, 4)) for n in ("gqa", "mme", "textvqa")]
    row_of = lambda task, doc_id: 1000 * [t.config.task for t in tasks].index(task) + doc_id  # noqa: E731
    texts = {}
    for size in (1, 5):
        journal = Journal(tmp_path / f"{size}.jsonl")
        pruner = registry.build("fastv", budget=16)
        model = PrunedModel(
            backbone, pruner, journal, identity={}, batch_size=size, max_new_tokens=3, row_of=row_of
        )
        results = evaluate(model, tasks)
        texts[size] = {t: [s["filtered_resps"] for s in v] for t, v in results["samples"].items()}
        assert len(journal.answers) == 12
        evaluate(model, tasks)  # upstream's clean() would have deleted the model by now
    assert texts[1] == texts[5]


def test_errors_are_not_answers(backbone, tiny_data, tmp_path):
    class Broken(Pruner):
        def select(self, image):
            raise RuntimeError("broken pruner")

    pruner = Broken(budget=16)
    model = PrunedModel(backbone, pruner, Journal(tmp_path / "j"), identity={}, max_new_tokens=3)
    with pytest.raises(RuntimeError, match="broken pruner"):
        evaluate(model, [build(documents("pope", tiny_data, 2))])


def test_a_blind_model_sees_grey(backbone, tiny_data, tmp_path):
    task = build(documents("gqa", tiny_data, 2))
    with silenced():
        task.build_all_requests()
    seen = {}
    for blind in (False, True):
        model = PrunedModel(backbone, None, Journal(tmp_path / f"{blind}"), identity={}, blind=blind)
        model.task_dict["gqa"] = task.dataset
        seen[blind] = model.inputs(task.instances)
    assert seen[True]["input_ids"].equal(seen[False]["input_ids"])
    grey = seen[True]["pixel_values"]
    assert (grey == grey[:1, :, :1, :1]).all() and not (seen[False]["pixel_values"] == grey).all()


def test_repr_is_stable_and_tells_configurations_apart():
    one, same, other = (PrunedModel(None, None, None, identity=i) for i in ({"a": 1}, {"a": 1}, {"a": 2}))
    assert repr(one) == repr(same) != repr(other)


def test_inputs_use_the_chat_template_and_pad_left(backbone):
    short, long = "Hi?", "What color is the box in the image?"
    inputs = backbone.inputs([Image.new("RGB", (50, 50))] * 2, [short, long])
    mask = inputs["attention_mask"]
    assert mask[1].all() and not mask[0, 0] and mask[0, -1]
    text = backbone.processor.tokenizer.decode(inputs["input_ids"][1], skip_special_tokens=True)
    assert text.startswith("USER:") and text.rstrip().endswith("ASSISTANT:") and long in text


def question(row, text, image, cap=16):
    return Question(row, text, image, {"max_new_tokens": cap})


def test_batches_keep_images_together_and_lose_nothing():
    questions = [question(i, "x" * (i % 5), f"image{i % 3}") for i in range(12)]
    for size in (1, 2, 5, 100):
        made = batches(questions, size)
        assert sorted(i for b in made for i in b) == list(range(12))
        assert max(map(len, made)) <= size
        order = [questions[i].image for b in made for i in b]
        assert [a for a, b in pairwise(order) if a != b] == list(dict.fromkeys(order))[:-1]


def test_batches_do_not_mix_generation_settings():
    questions = [question(i, "x", "a", cap=1 + i % 2) for i in range(6)]
    for batch in batches(questions, 6):
        assert len({questions[i].generation["max_new_tokens"] for i in batch}) == 1


def test_generation_settings():
    shared = {
        "max_new_tokens": 1024,
        "until": ["ASSISTANT:"],
        "temperature": 0,
        "image_aspect_ratio": "original",
    }
    settings = capped(shared, 16)
    assert settings["max_new_tokens"] == 16 and shared["max_new_tokens"] == 1024
    assert (
        capped({}, None)["max_new_tokens"] == 1024
        and capped({"max_new_tokens": 4}, 16)["max_new_tokens"] == 4
    )
    arguments = generate_arguments(settings)
    assert arguments == {
        "max_new_tokens": 16,
        "do_sample": False,
        "temperature": None,
        "top_p": None,
        "top_k": None,
    }
    assert generate_arguments({"temperature": 0.5})["do_sample"] is True
