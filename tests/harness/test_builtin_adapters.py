"""Our answers without pruning are those of lmms-eval's own adapters; skipped where these do not import."""

import argparse
import dataclasses

import pytest

from backbones.hub.load import load
from backbones.hub.options import LoadOptions
from harness.store.journal import Journal
from harness.tasks.environment import import_lmms_eval, silenced
from harness.tasks.lmms import Documents, build
from harness.tasks.pruned_model import PrunedModel
from harness.tasks.sources import hub
from harness.tasks.suites import BENCHMARKS

TASKS = ("pope", "mme", "textvqa", "scienceqa")


def builtin(name: str, **arguments):
    """lmms-eval's adapter, on the CPU; skips with the reason."""
    import importlib

    import_lmms_eval()
    module, _, kind = name.partition(":")
    try:
        with silenced():
            cls = getattr(importlib.import_module(f"lmms_eval.models.{module}"), kind)
    except ImportError as error:
        pytest.skip(f"lmms-eval's {module} cannot be imported: {error}")
    with silenced():
        model = cls(**arguments)
    model.clean = lambda: None  # lmms-eval would drop the weights after the first evaluation
    return model


def answers(model, mirror) -> dict[str, list[str]]:
    """One evaluation a task, as their adapters do not mix tasks."""
    from lmms_eval.api.task import ConfigurableTask
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    found = {}
    for name in TASKS:
        task = build(Documents(BENCHMARKS[name], hub(BENCHMARKS[name], mirror)))
        if model.is_simple:
            task = simple(task, ConfigurableTask)
        task.config.generation_kwargs["max_new_tokens"] = 4
        with silenced():
            results = simple_evaluate(
                model=model,
                tasks=[task],
                task_manager=TaskManager(include_defaults=False),
                bootstrap_iters=0,
                process_docs_parallel=1,
                log_samples=True,
                cli_args=argparse.Namespace(output_path=None, process_with_media=False),
            )
        samples = sorted(results["samples"][name], key=lambda s: s["doc_id"])
        found[name] = [s["filtered_resps"][0].strip() for s in samples]
    return found


def simple(task, base):
    """The same task in the flavour whose requests carry doc_to_visual."""

    class Simple(base):
        def download(self, dataset_kwargs=None):
            self.dataset, self.dataset_no_image = task.dataset, task.dataset_no_image

    config = {f.name: getattr(task.config, f.name) for f in dataclasses.fields(task.config)}
    with silenced():
        return Simple(config={k: v for k, v in config.items() if v is not None}, model_name="harness")


def ours(checkpoint, mirror, tmp_path, rounded: bool = False, **options) -> dict[str, list[str]]:
    """rounded: weights that went through bfloat16, as theirs did."""
    from methods import registry

    backbone = load(str(checkpoint), LoadOptions(**options))
    for parameter in backbone.model.parameters() if rounded else ():
        parameter.data = parameter.data.bfloat16().float()
    model = PrunedModel(
        backbone, registry.build("vanilla", None), Journal(tmp_path / "journal"), identity={}, batch_size=4,
        row_of=lambda task, doc_id: 1000 * TASKS.index(task) + doc_id,
    )  # fmt: skip
    return answers(model, mirror)


def same(theirs: dict[str, list[str]], mine: dict[str, list[str]]) -> None:
    assert mine == theirs
    assert len({text for own in mine.values() for text in own}) > 3, (
        "a model that says one thing shows nothing"
    )


def test_llava(hub_checkpoints, mirror, tmp_path):
    folder = hub_checkpoints["llava"]
    theirs = builtin("simple.llava_hf:LlavaHf", pretrained=str(folder), device="cpu", device_map="cpu")
    # they pass the text, with its <image>, through a template of the tokenizer; this is the checkpoint's
    theirs.chat_template = "USER: {{ messages[0]['content'] }} ASSISTANT:"
    same(answers(theirs, mirror), ours(folder, mirror, tmp_path))


def test_qwen(hub_checkpoints, mirror, tmp_path):
    folder, pixels = hub_checkpoints["qwen2_5_vl"], {"min_pixels": 4 * 784, "max_pixels": 48 * 784}
    theirs = builtin(
        "chat.qwen2_5_vl:Qwen2_5_VL", pretrained=str(folder), device="cpu", device_map="cpu", **pixels
    )
    theirs.model.float()  # they load bfloat16, whose near-ties flip
    same(answers(theirs, mirror), ours(folder, mirror, tmp_path, rounded=True, **pixels))
