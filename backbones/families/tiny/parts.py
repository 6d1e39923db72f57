"""What the tiny random checkpoints have in common: a vocabulary, and their JSON files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

VOCABULARY = 320
CORPUS = [
    "Is there a red box in the image? Answer the question using a single word or phrase.",
    "yes no A B C D",
]


def byte_level_bpe(special: Sequence[str]):
    """A trained `tokenizers.Tokenizer` of VOCABULARY entries: any text round-trips, Chinese too."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(CORPUS, trainer)
    return inner


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, body: dict) -> None:
    path.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
