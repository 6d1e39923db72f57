"""Complete checkpoint folders of tiny random models, laid out as on the hub: to try every command and test
every path without a download. Their answers mean nothing.

    python -m backbones.random_checkpoint llava-1.5 DIR
    python -m backbones.random_checkpoint qwen2.5-vl DIR
"""

from __future__ import annotations

import importlib
from pathlib import Path

#: the name of a family, and the module that makes its parts
MODULES = {"llava-1.5": "llava", "qwen2.5-vl": "qwen2_5_vl"}
#: so that even a tiny model comes in several files and an index, as the real ones do
SHARD_SIZE = "200KB"


def make(family: str, path: Path, hub_layout: bool = False) -> Path:
    """Write the folder; AutoProcessor and AutoModelForImageTextToText load it offline.

    family: a key of MODULES. hub_layout: weights in shards with an index, names and settings as the published
    repositories have them (see `published`); else as transformers 5 writes them. The weights are the same.
    """
    from transformers import GenerationConfig

    parts = importlib.import_module(f"{__name__}.{MODULES[family]}")
    tokenizer = parts.make_tokenizer()
    model, processor = parts.make_model(tokenizer), parts.make_processor(tokenizer)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**{k: v for k, v in ids.items() if v is not None})
    path = Path(path)
    model.save_pretrained(path, **({"max_shard_size": SHARD_SIZE} if hub_layout else {}))
    processor.save_pretrained(path)
    if hub_layout:
        from backbones.random_checkpoint import published

        published.rewrite(path, processor)
    return path
