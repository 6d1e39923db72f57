"""From the files that transformers 5 writes to those of the published repositories, written by
earlier releases: what loads these loads the real ones.
"""

from __future__ import annotations

import json
from pathlib import Path


def rewrite(path: Path, processor) -> None:
    """The image processor gets a file of its own, LLaVA's tower its former prefix, Qwen2.5-VL's settings
    their former places."""
    processor.image_processor.save_pretrained(path)  # preprocessor_config.json
    config = _read(path / "config.json")
    if config["model_type"] == "llava":
        body = _read(path / "processor_config.json")
        body.pop("image_processor", None)
        _write(path / "processor_config.json", body)
        _rename_tower(path)
        return
    (path / "processor_config.json").unlink()
    _write(path / "config.json", _flat(config))
    images = _read(path / "preprocessor_config.json")
    size = images.pop("size")
    limits = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    _write(path / "preprocessor_config.json", {**images, **limits, "processor_class": "Qwen2_5_VLProcessor"})


def _flat(config: dict) -> dict:
    """Settings of the language model beside those of the whole, rotary positions under their former names."""
    text = {k: v for k, v in config.pop("text_config").items() if k not in ("layer_types", "model_type")}
    rope = text.pop("rope_parameters")
    return {
        **text,
        **config,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "use_sliding_window": False,
        "sliding_window": 32768,
    }


def _rename_tower(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    def former(key: str) -> str:
        head, tail = "vision_tower.", "vision_model."
        return head + tail + key.removeprefix(head) if key.startswith(head) else key

    for shard in path.glob("*.safetensors"):
        save_file({former(k): v for k, v in load_file(shard).items()}, shard, {"format": "pt"})
    index = _read(path / "model.safetensors.index.json")
    index["weight_map"] = {former(k): v for k, v in index["weight_map"].items()}
    _write(path / "model.safetensors.index.json", index)


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, body: dict) -> None:
    path.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
