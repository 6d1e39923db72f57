"""Generate the answers to one batch of questions with one pruner on. Knows nothing of lmms-eval or files."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.store.journal import Answer
from methods.views import Hint

if TYPE_CHECKING:
    from backbones.engine import shared_prefix

# Keys that tasks put among the generation settings and generate() does not take.
_NOT_FOR_GENERATE = ("until", "image_aspect_ratio", "image_sizes", "modalities")
# Settings of generate() under which the answer is the plain greedy one.
_GREEDY = {"do_sample", "temperature", "top_p", "top_k", "num_beams", "max_new_tokens"}
# TextVQA sets no limit of its own; this is what lmms-eval's HF adapters use then.
_DEFAULT_NEW_TOKENS = 1024


@dataclass(frozen=True)
class Question:
    """One document as the model is asked it: `row` in the file, `text` after the image, `image` an identity
    (equal for equal images), `generation` the task's settings with the run's cap applied, `hint` its answer
    key, where the data has one."""

    row: int
    text: str
    image: str
    generation: Mapping[str, object]
    hint: Hint | None = None

    @property
    def prompt(self) -> str:
        """Digest of everything in the question that the answer depends on, but the image."""
        body = json.dumps([self.text, self.generation], sort_keys=True, default=str)
        return hashlib.sha256(body.encode()).hexdigest()[:12]


def capped(generation: Mapping[str, object], max_new_tokens: int | None) -> dict[str, object]:
    """The task's generation settings (a copy: lmms-eval shares the dict) with the run's cap on new tokens."""
    settings = dict(generation)
    own = int(settings.get("max_new_tokens") or _DEFAULT_NEW_TOKENS)
    settings["max_new_tokens"] = own if max_new_tokens is None else min(own, max_new_tokens)
    return settings


def generate_arguments(generation: Mapping[str, object]) -> dict[str, object]:
    """Arguments for `generate()`. Greedy settings drop those of sampling, which silences its warnings."""
    arguments = {k: v for k, v in generation.items() if k not in _NOT_FOR_GENERATE}
    if not arguments.get("do_sample") and not (arguments.get("temperature") or 0) > 0:
        arguments.update(do_sample=False, temperature=None, top_p=None, top_k=None)
    else:
        arguments["do_sample"] = True
    return arguments


def batches(questions: Sequence[Question], size: int) -> list[list[int]]:
    """Positions in `questions`, in batches of at most `size`.

    Questions on one image stand together (its features are computed once and shared), images with long
    prompts come first, and prompts of about equal length meet in a batch (less padding; a batch that does not
    fit in memory fails at once).
    """
    longest: dict[str, int] = {}
    for q in questions:
        longest[q.image] = max(longest.get(q.image, 0), len(q.text))
    order = sorted(
        range(len(questions)),
        key=lambda i: (
            json.dumps(questions[i].generation, sort_keys=True, default=str),
            -longest[questions[i].image],
            questions[i].image,
            -len(questions[i].text),
            i,
        ),
    )
    result: list[list[int]] = []
    for i in order:
        if (
            result
            and len(result[-1]) < size
            and questions[result[-1][0]].generation == questions[i].generation
        ):
            result[-1].append(i)
        else:
            result.append([i])
    return result


def answer(
    backbone,
    pruner,
    questions: Sequence[Question],
    inputs: Mapping[str, object],
    explored: Container[int] = (),
    apart: Callable[[], shared_prefix.Apart] | None = None,
) -> list[Answer]:
    """Answers to one batch, in order.

    inputs: what `backbone.inputs` made of the same questions (left-padded, [B, n]). pruner: a
    methods.base.Pruner. explored: rows whose answers say which visual tokens were left; those with an answer
    key always do. apart: gives `taken_apart` of the batch, for a caller that asks several methods about it.

    Exceptions pass through: an answer that could not be computed must never count as an empty one. Raises
    ArithmeticError where the model's logits are no numbers.
    """
    import torch

    settings = questions[0].generation
    tokenizer = backbone.processor.tokenizer
    with torch.inference_mode(), _finite(backbone.model):
        new, visual, left = _generate(backbone.model, pruner, questions, inputs, apart)
    lengths = inputs["attention_mask"].sum(1).tolist()
    image_places = (inputs["input_ids"] == backbone.model.config.image_token_id).sum(1).tolist()
    until = settings.get("until") or []
    answers, text_before = [], pruner.text_before(backbone.family.has_cls) if pruner.selects else 0
    for i, question in enumerate(questions):
        text = tokenizer.decode(new[i], skip_special_tokens=True)
        for stop in [until] if isinstance(until, str) else until:
            text = text.split(stop)[0]
        answers.append(
            Answer(
                row=question.row,
                prompt=question.prompt,
                text=text.strip(),
                input_tokens=int(lengths[i]),
                image_tokens=int(image_places[i]),
                output_tokens=int((new[i] != tokenizer.pad_token_id).sum()),
                visual_tokens=tuple(visual[i]),
                **(_left(left[i], text_before) if question.row in explored or question.hint else {}),
            )
        )
    return answers


@contextlib.contextmanager
def _finite(model) -> Iterator[None]:
    """Watches the logits: generate() picks a token also where they are NaN, and that would be scored."""
    import torch

    seen: list[torch.Tensor] = []

    def look(head, given, logits) -> None:  # of the last place alone: those of padding may be anything
        seen.append((logits[:, -1] if logits.dim() == 3 else logits).isfinite().all())

    handle = model.get_output_embeddings().register_forward_hook(look)
    try:
        yield
    finally:
        handle.remove()
    if seen and not torch.stack(seen).all():
        raise ArithmeticError(
            "the model's logits are NaN or infinite; look at its config.json and weights, or try another "
            "--dtype"
        )


def taken_apart(model, questions: Sequence[Question], inputs: Mapping[str, object]) -> shared_prefix.Apart:
    """The prompts of one batch into what questions on one image share, and what is each one's own."""
    from backbones.engine import shared_prefix

    return shared_prefix.split(model, inputs, [question.image for question in questions])


def _generate(model, pruner, questions: Sequence[Question], inputs: Mapping[str, object], apart=None):
    """New token ids [B, n]; by sample the visual tokens entering each layer, and what was left of them.

    Questions on one image share what the language model holds of it where the method allows that.
    """
    from backbones.engine import shared_prefix

    arguments = generate_arguments(questions[0].generation)
    greedy = not arguments["do_sample"] and arguments.get("num_beams", 1) == 1
    several = len({question.image for question in questions}) < len(questions)
    if several and greedy and arguments.keys() <= _GREEDY and shared_prefix.can_share(model, pruner):
        own = apart() if apart else taken_apart(model, questions, inputs)
        prefix = shared_prefix.read(model, pruner, own.prefixes)
        found = shared_prefix.generate(model, prefix, own.rows, own.texts, arguments["max_new_tokens"])
        left = _all_left(pruner, found.kept, found.cuts)
        return found.tokens, found.visual_tokens.tolist(), left
    asked = {}
    if pruner.reads_question:
        asked["questions"] = [question.text for question in questions]
    if pruner.answer_key:
        pruner.hints = [question.hint for question in questions]
    with pruner(model, **asked) as trace:
        ids = model.generate(**inputs, **arguments)
        left = _all_left(pruner, trace.kept, trace.cuts)
        return ids[:, inputs["input_ids"].shape[1] :], trace.visual_tokens.tolist(), left


@dataclass(frozen=True)
class _Left:
    """Of one sample: kept, `Trace.kept` after its last cut, in the order of choice where the method has one;
    cuts, `Trace.cuts`."""

    kept: object
    cuts: Sequence


def _all_left(pruner, kept: Sequence[Sequence], cuts: Sequence[Sequence]) -> list[_Left | None]:
    """By sample of the batch; None where the method left everything."""
    orders = getattr(pruner, "orders", None)
    if orders is None or len(orders) != len(kept):
        orders = [own[-1] if own else None for own in kept]
    return [_Left(order, own) if own else None for order, own in zip(orders, cuts)]


def _left(left: _Left | None, text_before: int) -> dict[str, tuple[int, ...]]:
    """`Answer.kept` and `Answer.merged`. text_before: tokens of the text that the method was offered ahead of
    the image's; those are no places of the image."""
    from backbones.engine.trace import holders

    if left is None:
        return {}
    kept = [k - text_before if k >= text_before else min(k, -1) for k in left.kept.tolist()]
    found: dict[str, tuple[int, ...]] = {"kept": tuple(kept)}
    if any(cut.merged is not None for cut in left.cuts):
        own = {k for k in kept if k >= 0}
        where = enumerate(holders(left.cuts)[text_before:].tolist())
        found["merged"] = tuple(-1 if token in own else place for token, place in where)
    return found
