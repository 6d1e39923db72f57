"""Answered questions about images: a file in LLaVA's instruction format, or what `Supplies` gives.

Both are functions of (seed, index): the same index gives the same sample, in any process, so that a resumed
or a distributed run sees exactly what an uninterrupted one on one device would.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL.Image import Image

from methods.errors import UserError
from methods.stepprune.batch import padded
from methods.stepprune.training.objective import IGNORE, Batch, FrozenModel, Grid
from methods.views import Box, cells

#: images of the held-out set that calibrates a checkpoint, each with as many questions as there are tasks
HELD_OUT_IMAGES = 48
#: what a caption answers
CAPTION_PROMPT = "Describe the image."


@dataclass(frozen=True)
class Example:
    """One image with some questions.

    Attributes:
        image: PIL.
        asked: (the user's text, the answer) of each.
        things: how many are in the scene; -1: unknown.
        evidence: for each question the boxes that hold its answer, as shares of the image; None: unknown.
    """

    image: object
    asked: tuple[tuple[str, str], ...]
    things: int = -1
    evidence: tuple[tuple[Box, ...], ...] | None = None


class Source(Protocol):
    """Endless samples by number."""

    def __getitem__(self, index: int) -> Example: ...


class Supplies(Protocol):
    """What training is given from above `methods/`: models and data.

    A backbone has `model` (Hugging Face's), `adapter` (what is known of its family), `processor`,
    `num_visual_tokens` of an image at most, and `describe()` with a digest of its weights
    (`backbones.backbone.Backbone`).
    """

    def backbone(self, name: str, device: str, dtype: str = "float32"):
        """The backbone of that name, on the device, its weights of that type. Raises UserError if there is
        none."""

    def image(self, file: Path) -> Image:
        """The file as models see it: upright 8-bit RGB. Raises UserError, with the reason, if it is none."""

    def drawn(self, backbone) -> str:
        """The version of the data, "v1" or "v2", that the backbone is asked."""

    def training(self, backbone, questions: int, seed: int, drawn: str | None = None) -> Source:
        """The default training data for a backbone; so many questions of each image. drawn: version of the
        data (None: `drawn`); v2's examples have evidence."""

    def held_out(self, backbone, drawn: str | None = None) -> Source:
        """Questions that no training sees, eight of each image."""


class LlavaInstructions:
    """The json of `llava_v1_5_mix665k`: a list of {"image", "conversations": [{"from", "value"}, ...]}; or of
    captions, {"image", "caption"}, which answer `CAPTION_PROMPT`.

    Every pair of a human's and the model's turn is a question of its own, without the turns before (ours);
    `questions` of an image are taken, in random order, repeated if there are fewer. Entries without an image
    are left out. Raises UserError for a file of another shape, or an image that is not there or is none.
    read: `Supplies.image`.
    """

    def __init__(
        self,
        path: Path,
        images: Path,
        read: Callable[[Path], Image],
        questions: int = 1,
        seed: int = 0,
        held_out: bool = False,
    ):
        try:
            entries = json.loads(path.read_text())
            self._entries = [e for e in entries if e.get("image") and _turns(e)]
        except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: not in LLaVA's instruction format, a JSON list of objects with image and "
                f"conversations ({error})"
            ) from error
        if not self._entries:
            raise UserError(f"{path}: no entry has an image and a question with an answer")
        back = min(HELD_OUT_IMAGES, len(self._entries) // 10)
        if back:  # with fewer than ten images there is nothing to spare
            order = np.random.default_rng(0).permutation(len(self._entries))
            chosen = order[:back] if held_out else order[back:]
            self._entries = [self._entries[int(i)] for i in sorted(chosen)]
        self._images, self._read, self.questions, self.seed = images, read, questions, seed

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Example:
        epoch, place = divmod(index, len(self._entries))
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self._entries))
        entry = self._entries[int(order[place])]
        file = self._images / entry["image"]
        if not file.is_file():
            raise UserError(f"image {entry['image']} is not in {self._images}; give the folder with --images")
        try:
            image = self._read(file)
        except UserError as error:
            raise UserError(f"image {entry['image']} in {self._images}: {error}") from error
        turns = _turns(entry)
        picked = np.random.default_rng([self.seed, index]).permutation(len(turns))
        asked = tuple(turns[int(picked[i % len(turns)])] for i in range(self.questions))
        return Example(image, asked)


def _turns(entry: dict) -> list[tuple[str, str]]:
    if "caption" in entry:
        return [(CAPTION_PROMPT, entry["caption"].strip())] if entry["caption"].strip() else []
    turns = entry["conversations"]
    return [
        (human["value"].replace("<image>", "").strip(), model["value"].strip())
        for human, model in zip(turns[::2], turns[1::2])
        if human["from"] == "human" and model["from"] == "gpt" and model["value"].strip()
    ]


class Collator:
    """Examples -> Batch: the chat template, tokens, and the vision tower (once per image).

    max_text: ids behind the image beyond which a sample's answer is cut off.
    """

    def __init__(self, backbone, frozen: FrozenModel, max_text: int = 1024):
        self.backbone, self.frozen, self.max_text = backbone, frozen, max_text

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """Samples in order of the examples, the questions of an image side by side."""
        processor, device = self.backbone.processor, self.backbone.model.device
        images = processor.image_processor([e.image.convert("RGB") for e in examples], return_tensors="pt")
        seen, grids = self.frozen.features(images)
        features, valid = padded(seen)
        pairs = [pair for e in examples for pair in e.asked]
        sequences = [self._tokens(*pair) for pair in pairs]
        before = sequences[0][0]
        if any(s[0] != before for s in sequences):
            raise ValueError("the chat template puts different texts ahead of the image")
        length = max(len(ids) for _, ids, _ in sequences)
        pad = processor.tokenizer.pad_token_id or 0
        after = torch.full((len(pairs), length), pad)
        targets = torch.full((len(pairs), length), IGNORE)
        for row, (_, ids, question) in enumerate(sequences):
            after[row, : len(ids)] = torch.tensor(ids)
            targets[row, question : len(ids)] = torch.tensor(ids[question:])
        counts = torch.tensor([len(e.asked) for e in examples], device=device)
        things = torch.tensor([e.things for e in examples], device=device)
        positions = self._positions(grids, len(before), features.shape[1], length).to(device)
        return Batch(
            features.repeat_interleave(counts, 0),
            torch.tensor(before, device=device),
            after.to(device),
            targets.to(device),
            torch.tensor([q for _, _, q in sequences], device=device),
            things.repeat_interleave(counts),
            positions.repeat_interleave(counts, 1),
            None if valid is None else valid.repeat_interleave(counts, 0),
            _evidence(examples, grids, features),
        )

    def _positions(self, grids: Sequence[Grid], before: int, most: int, after: int) -> torch.Tensor:
        """Of each image's sequence, int64 [1 or 3, images, before + most + after]; anything at the padding
        behind smaller images."""
        rows = []
        for grid in grids:
            own, end = self.frozen.positions(before, grid, after), before + grid[0] * grid[1]
            gap = own[:, :1].expand(-1, before + most - end)
            rows.append(torch.cat([own[:, :end], gap, own[:, end:]], 1))
        return torch.stack(rows, 1)

    def _tokens(self, prompt: str, answer: str) -> tuple[list[int], list[int], int]:
        """Ids ahead of the image and behind it, and how many of the latter are the prompt's."""
        processor, image = self.backbone.processor, self.frozen.adapter.image_token_id
        tokenizer = processor.tokenizer
        text = processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}],
            add_generation_prompt=True,
        )
        asked = tokenizer(text)["input_ids"]
        # tokenised together: what a space before the answer becomes depends on the tokenizer
        answered = tokenizer(f"{text} {answer}{tokenizer.eos_token}")["input_ids"]
        if answered[: len(asked)] != asked:
            raise ValueError(f"the answer {answer!r} changes the tokens of its prompt")
        at = asked.index(image)
        return asked[:at], answered[at + 1 :][: self.max_text], len(asked) - at - 1


def _evidence(
    examples: Sequence[Example], grids: Sequence[Grid], features: torch.Tensor
) -> torch.Tensor | None:
    """Which visual tokens lie under each question's evidence, bool [B, N]; None unless all say."""
    if any(e.evidence is None for e in examples):
        return None
    rows = [
        torch.from_numpy(cells(boxes, *grid).ravel())
        for e, grid in zip(examples, grids)
        for boxes in e.evidence
    ]
    found = torch.zeros(len(rows), features.shape[1], dtype=torch.bool)
    for own, row in zip(found, rows):
        own[: len(row)] = row
    return found.to(features.device)


def held_out(source: Source, backbone, frozen: FrozenModel, images: int = HELD_OUT_IMAGES) -> Iterator[Batch]:
    """Held-out questions (`Supplies.held_out`), four images per batch."""
    collate = Collator(backbone, frozen)
    for first in range(0, images, 4):
        yield collate([source[i] for i in range(first, min(first + 4, images))])
