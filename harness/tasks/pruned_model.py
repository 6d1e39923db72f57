"""lmms-eval's view of a (backbone, pruner) pair: a chat model that answers in batches and keeps a journal.

It works alone, `simple_evaluate(model=PrunedModel(...), tasks=[...])`, and inside of a sweep, where
`harness.run.sweep` has filled the journals of many cells in an order that shares the vision tower, so that
`generate_until` finds every answer there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Container, Mapping, Sequence

from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from PIL import Image

from backbones.engine.shared_prefix import Apart
from harness.store.journal import Answer, Journal
from harness.tasks.answering import Question, answer, batches, capped
from methods.errors import UserError
from methods.views import Hint

GREY = (128, 128, 128)


class PrunedModel(lmms):
    """lmms-eval chat adapter.

    row_of, image_of: (task name, doc_id) -> row number in the benchmark's file / identity of the image. Left
    out, doc_id is the row, and every document counts as having an image of its own. blind: the model sees a
    grey image of the same size in place of each image.
    """

    is_simple = False  # requests carry doc_to_messages, which feeds the processor's chat template

    def __init__(
        self,
        backbone,
        pruner,
        journal: Journal,
        *,
        identity: Mapping[str, object],
        batch_size: int = 1,
        max_new_tokens: int | None = None,
        blind: bool = False,
        explored: Container[int] = (),
        row_of: Callable[[str, int], int] = lambda task, doc_id: doc_id,
        image_of: Callable[[str, int], str] = lambda task, doc_id: f"{task}/{doc_id}",
        hint_of: Callable[[str, int], Hint | None] = lambda task, doc_id: None,
    ):
        super().__init__()
        self.backbone, self.pruner, self.journal = backbone, pruner, journal
        self.identity, self.batch_size, self.max_new_tokens = dict(identity), batch_size, max_new_tokens
        self.blind, self.explored, self._row_of, self._image_of = blind, explored, row_of, image_of
        self._hint_of = hint_of

    @property
    def device(self):
        """Read by lmms-eval when it runs in several processes."""
        return self.backbone.model.device

    def __repr__(self) -> str:
        """Stable over processes: lmms-eval keys its caches on it."""
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True, default=str).encode()).hexdigest()
        return f"PrunedModel({digest[:16]})"

    def clean(self) -> None:
        """Upstream's would delete every module attribute after the first evaluation."""

    def question(self, request) -> Question:
        """The request without its pixels."""
        text, _, generation, doc_id, task, _ = request.args
        return Question(
            self._row_of(task, doc_id),
            text,
            self._image_of(task, doc_id),
            capped(generation, self.max_new_tokens),
            self._hint_of(task, doc_id),
        )

    def picture(self, request) -> tuple[Image.Image, str]:
        """The image that a request asks about, and its text. Raises UserError unless it has exactly one
        image."""
        _, doc_to_messages, _, doc_id, task, split = request.args
        (message,) = doc_to_messages(self.task_dict[task][split][doc_id])
        pictures = [c["url"] for c in message["content"] if c["type"] == "image"]
        if len(pictures) != 1:
            raise UserError(
                f"{task} document {doc_id} has {len(pictures)} images; this program takes exactly one"
            )
        return pictures[0], "".join(c["text"] for c in message["content"] if c["type"] == "text")

    def inputs(self, requests: Sequence) -> dict:
        """Left-padded model inputs of the requests, [B, n], on the backbone's device."""
        pictures = [self.picture(request) for request in requests]
        images = [Image.new("RGB", p.size, GREY) if self.blind else p for p, _ in pictures]
        return self.backbone.inputs(images, [text for _, text in pictures])

    def missing(self, questions: Sequence[Question]) -> list[int]:
        """Positions of the questions that the journal has no answer to."""
        return [i for i, q in enumerate(questions) if (q.row, q.prompt) not in self.journal.answers]

    def answer(
        self,
        questions: Sequence[Question],
        inputs: Mapping[str, object],
        apart: Callable[[], Apart] | None = None,
    ) -> list[Answer]:
        """Answer one batch and journal it; `apart` as in `answering.answer`."""
        answers = answer(self.backbone, self.pruner, questions, inputs, self.explored, apart)
        self.journal.append(answers)
        return answers

    def generate_until(self, requests) -> list[GenerationResult]:
        """Answers in request order; those in the journal are not computed again."""
        questions = [self.question(r) for r in requests]
        todo = self.missing(questions)
        for batch in batches([questions[i] for i in todo], self.batch_size):
            places = [todo[i] for i in batch]
            self.answer([questions[i] for i in places], self.inputs([requests[i] for i in places]))
        results = []
        for q in questions:
            found = self.journal.answers[q.row, q.prompt]
            results.append(GenerationResult(found.text, TokenCounts(found.input_tokens, found.output_tokens)))
        return results

    def loglikelihood(self, requests):
        raise NotImplementedError("the eight benchmarks generate")

    def generate_until_multi_round(self, requests):
        raise NotImplementedError("the eight benchmarks have one turn")
