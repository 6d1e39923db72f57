"""Scores straight from answers: each benchmark's rule applied to the text of an answer and its document.

None of the run's own path is used: no task object, no record. The rules are the benchmarks' own; where theirs
is a long list of cases (VQA's normalisation of answers, MMBench's reading of options), the released functions
are called on the text, loaded from their files alone.
"""

from __future__ import annotations

import functools
import importlib.util
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

#: image: identity of the image; group: key of the documents scored together; document: the row's columns
Question = Mapping[str, object]


@dataclass(frozen=True)
class Rescored:
    """Attributes:
    value: the benchmark's score, in its unit.
    documents: score of each document, 0 to 1.
    clusters: summed counts by cluster, as the bootstrap resamples them.
    """

    value: float
    documents: list[float]
    clusters: dict[str, list[float]]


def rescore(task: str, questions: Sequence[Question], texts: Sequence[str]) -> Rescored | None:
    """The score of answers; None for a benchmark that has no rule here."""
    rule = RULES.get(task)
    return rule(questions, texts) if rule else None


def _mean(each: Sequence[float], keys: Sequence[object]) -> Rescored:
    """Mean in % of the documents' scores, clustered by `keys`."""
    clusters: dict[str, list[float]] = {}
    for key, value in zip(keys, each):
        row = clusters.setdefault(str(key), [0.0, 0.0])
        row[0] += value
        row[1] += 1
    return Rescored(100 * sum(each) / len(each), list(each), clusters)


def _documents(questions: Sequence[Question]) -> list[Mapping]:
    return [q["document"] for q in questions]


def _images(questions: Sequence[Question]) -> list[object]:
    return [q["image"] for q in questions]


# ---- exact match


def _gqa(questions, texts) -> Rescored:
    drop = str.maketrans("", "", string.punctuation)

    def plain(text: object) -> str:
        return str(text).lower().translate(drop)

    each = [float(plain(t) == plain(d["answer"])) for t, d in zip(texts, _documents(questions))]
    return _mean(each, _images(questions))


def _scienceqa(questions, texts) -> Rescored:
    each = []
    for text, document in zip(texts, _documents(questions)):
        right, said = string.ascii_uppercase[document["answer"]], text.strip()
        with_dot = len(said) >= 2 and said[0].isupper() and said[1] == "." and said[0] == right
        each.append(float(said.upper() == right or with_dot))
    return _mean(each, _images(questions))


# ---- VQA


def _textvqa(questions, texts) -> Rescored:
    plain = functools.cache(_released("_task_utils/vqa_eval_metric.py").EvalAIAnswerProcessor())
    each = []
    for text, document in zip(texts, _documents(questions)):
        own, human = plain(text), [plain(a) for a in document["answers"]]
        # the mean over the ways to leave one human out of min(1, how many others gave the answer / 3)
        each.append(sum(min(1, (human.count(own) - (h == own)) / 3) for h in human) / len(human))
    return _mean(each, _images(questions))


def _vqav2(questions, texts) -> Rescored:
    processor = _released("_task_utils/vqa_eval_metric.py").EvalAIAnswerProcessor()

    @functools.cache
    def plain(text: str) -> str:
        text = text.replace("\n", " ").replace("\t", " ").strip()
        return processor.process_digit_article(processor.process_punctuation(text))

    each = []
    for text, document in zip(texts, _documents(questions)):
        own = plain(text)
        human = [{**a, "answer": plain(a["answer"])} for a in document["answers"]]
        ways = [min(1, sum(h["answer"] == own for h in human if h != left) / 3) for left in human]
        each.append(sum(ways) / len(ways))
    return _mean(each, _images(questions))


# ---- yes or no


def _pope(questions, texts) -> Rescored:
    documents = _documents(questions)
    parts = sorted({str(d["category"]) for d in documents})
    each, clusters = [], {}
    for image, text, document in zip(_images(questions), texts, documents):
        said, truth = text.lower().strip(), document["answer"].lower().strip()
        each.append(float(said == truth))
        counts = clusters.setdefault(str(image), [0.0] * 3 * len(parts))
        place = 3 * parts.index(str(document["category"]))
        if said == "yes":
            counts[place + (truth != "yes")] += 1
        elif said == "no" and truth == "yes":
            counts[place + 2] += 1
    total = np.sum(list(clusters.values()), 0).reshape(-1, 3)
    f1 = [200 * tp / (2 * tp + fp + fn) if tp else 0.0 for tp, fp, fn in total.tolist()]
    return Rescored(sum(f1) / len(f1), each, clusters)


def _mme(questions, texts) -> Rescored:
    documents = _documents(questions)
    parts = sorted({d["category"] for d in documents})
    each, pairs = [], {}
    for text, document in zip(texts, documents):
        truth = document["answer"].lower().strip().replace(".", "")
        each.append(float(_yes_or_no(text) == truth))
        pairs.setdefault((document["category"], document["question_id"]), []).append(each[-1])
    clusters, points = {}, dict.fromkeys(parts, 0.0)
    for (category, image), right in pairs.items():
        own = 50 * sum(right) + 100 * (sum(right) == 2)
        row = clusters.setdefault(f"{category}\x1f{image}", [0.0] * 2 * len(parts))
        row[2 * parts.index(category)] += own
        row[2 * parts.index(category) + 1] += 1
        points[category] += own
    number = {part: sum(category == part for category, _ in pairs) for part in parts}
    return Rescored(sum(points[p] / number[p] for p in parts), each, clusters)


def _yes_or_no(text: str) -> str:
    """MME's reading: the word, its first letter alone, or the word within the first four letters."""
    said = text.lower().strip().replace(".", "")
    if len(said) == 1:
        return {"y": "yes", "n": "no"}.get(said, "other")
    return next((word for word in ("yes", "no") if word in said[:4]), "other")


# ---- MMBench


def _mmbench(questions, texts) -> Rescored:
    released = _released("mmbench/mmbench_evals.py").MMBench_Evaluator()
    extract = _released("_task_utils/mcq_extract.py").extract_mcq_answer
    hits: dict[object, float] = {}
    for question, text in zip(questions, texts):
        document, said = question["document"], text.strip()
        # an option that is not there is the text "nan" to the released code
        options = {c: document.get(c, "nan") for c in "ABCD" if document.get(c, "nan") is not None}
        read = released.can_infer(said, dict(options)) or extract(said, choices=sorted(options))
        group = question["group"]
        hits[group] = min(hits.get(group, 1.0), float(bool(read) and read == document["answer"]))
    clusters = {str(group): [hit, 1.0] for group, hit in hits.items()}
    each = [hits[q["group"]] for q in questions]
    return Rescored(100 * sum(hits.values()) / len(hits), each, clusters)


@functools.cache
def _released(name: str) -> ModuleType:
    """A file of lmms-eval's tasks as a module of its own: importing the package takes seconds."""
    root = importlib.util.find_spec("lmms_eval").submodule_search_locations[0]
    path = Path(root, "tasks", name)
    spec = importlib.util.spec_from_file_location(f"harness_check_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RULES: dict[str, Callable[[Sequence[Question], Sequence[str]], Rescored]] = {
    "gqa": _gqa,
    "scienceqa": _scienceqa,
    "textvqa": _textvqa,
    "textvqa_ocr": _textvqa,
    "vqav2": _vqav2,
    "pope": _pope,
    "mme": _mme,
    "mmbench_en": _mmbench,
    "mmbench_cn": _mmbench,
}
