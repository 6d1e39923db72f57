"""The loaded model: does the processor leave the right places for an image, does keeping all tokens give the
unpruned model's answer?
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from harness.doctor.findings import MISSING, NOTE, OK, Diagnosis, from_error
from methods.errors import UserError

#: of the answers that are compared
NEW_TOKENS = 8
#: one that selects before the language model, one that cuts inside of it
KEEP_ALL = ("uniform", "fastv")


def check(config, seconds: list[float]) -> Iterator[Diagnosis]:
    """Load the run's session (the model too), look at one prompt of each benchmark, and ask one question with
    and without methods that keep all tokens. What an unpruned answer took goes into `seconds`. config:
    RunConfig.
    """
    from dataclasses import replace

    from harness.run.session import Session

    try:
        session = Session(replace(config, max_new_tokens=NEW_TOKENS))
        described = session.described
    except UserError as error:
        yield from_error("model", error)
        return
    except (RuntimeError, MemoryError) as error:  # torch: out of memory, a kernel that is not there
        first = str(error).splitlines()[0]
        yield Diagnosis(MISSING, "model", f"{type(error).__name__}: {first}", "a smaller model or --quantize")
        return
    revision = f", revision {described['revision']}" if described.get("revision") else ""
    yield Diagnosis(OK, "model", f"{config.backbone} loaded, {described['dtype']}{revision}")
    for line in (*session.left_out, *session.unavailable):
        yield Diagnosis(NOTE, "methods", f"left out: {line}")
    for documents in session.documents:
        yield from _one(session, documents, seconds)


def _one(session, documents, seconds: list[float]) -> Iterator[Diagnosis]:
    name = documents.benchmark.name
    try:
        task, model = session.task(documents), session.model(documents)
        request = task.instances[0]
        question, inputs = model.question(request), model.inputs([request])
    except Exception as error:  # whatever a task's code raises on data that it does not expect
        yield Diagnosis(MISSING, f"prompt {name}", f"{type(error).__name__}: {error}", "other data files")
        return
    places = int((inputs["input_ids"] == session.backbone.model.config.image_token_id).sum())
    rows, columns = session.backbone.family.raster(session.backbone.model.config, inputs)
    expected, how = rows * columns, f"{rows} x {columns}"
    words = inputs["input_ids"].numel() - places
    text = f"{places} places for the first image ({how}), {words} text tokens"
    if places != expected:
        fix = "a processor that fits the model (its patch_size, or min and max pixels)"
        yield Diagnosis(MISSING, f"processor {name}", f"{text}; expected {expected}", fix)
        return
    yield Diagnosis(OK, f"processor {name}", text)
    if not seconds:  # once: further benchmarks would tell no more, and cost a second each
        yield _keeps_all(session, name, question, inputs, places, seconds)


def _keeps_all(session, name: str, question, inputs, places: int, seconds: list[float]) -> Diagnosis:
    from harness.tasks.answering import answer
    from methods import registry

    what = f"keep-all {name}"
    begin = time.perf_counter()
    (vanilla,) = answer(session.backbone, registry.build("vanilla", None), [question], dict(inputs))
    seconds.append(time.perf_counter() - begin)
    for spec in KEEP_ALL:
        pruner = registry.build(spec, places)
        (kept,) = answer(session.backbone, pruner, [question], dict(inputs))
        if set(kept.visual_tokens) != {places}:
            text = f"{spec} at {places} tokens kept {sorted(set(kept.visual_tokens))}"
            return Diagnosis(MISSING, what, text, "please report this")
        if kept.text != vanilla.text:
            text = f"{spec} with all tokens answers {kept.text!r}, the unpruned model {vanilla.text!r}"
            fix = (
                "float32 (near-ties flip in 16 bits)" if session.config.dtype != "float32" else "report this"
            )
            return Diagnosis(MISSING if session.config.dtype == "float32" else NOTE, what, text, fix)
    both = " and ".join(KEEP_ALL)
    return Diagnosis(OK, what, f"{both} at {places} tokens answer as the unpruned model does")
