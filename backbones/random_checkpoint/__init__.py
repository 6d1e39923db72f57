"""Complete checkpoint folders of tiny random models, laid out as on the hub: to try every command and test
every path without a download. Their answers mean nothing.

    python -m backbones.random_checkpoint llava-1.5 DIR
    python -m backbones.random_checkpoint qwen2.5-vl DIR

What such a model consists of says its family (`backbones.families.family.Family.tiny`).
"""

from __future__ import annotations

from pathlib import Path

from backbones import families
from backbones.families.family import Family

#: so that even a tiny model comes in several files and an index, as the real ones do
SHARD_SIZE = "200KB"


def available() -> dict[str, Family]:
    """Families that have a tiny random model, by name: the title in lower case."""
    return {f.title.lower(): f for f in families.known().values() if type(f).tiny is not Family.tiny}


def make(family: str, path: Path, hub_layout: bool = False) -> Path:
    """Write the folder; AutoProcessor and AutoModelForImageTextToText load it offline.

    Args:
        family: a key of `available()`.
        path: the folder.
        hub_layout: weights in shards with an index, names and settings as the published repositories have
            them; else as transformers 5 writes them. The weights are the same.
    """
    from transformers import GenerationConfig

    parts = available()[family].tiny()
    tokenizer = parts.tokenizer()
    model, processor = parts.model(tokenizer), parts.processor(tokenizer)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**{k: v for k, v in ids.items() if v is not None})
    path = Path(path)
    model.save_pretrained(path, **({"max_shard_size": SHARD_SIZE} if hub_layout else {}))
    processor.save_pretrained(path)
    if hub_layout and parts.to_hub_layout:
        parts.to_hub_layout(path, processor)
    return path
