"""A tiny random LLaVA-1.5: 112 px, patch 14, so 64 visual tokens; about 100k parameters."""

from __future__ import annotations

from pathlib import Path

from backbones.families.tiny.parts import byte_level_bpe, read_json, write_json

IMAGE_SIZE, LAYERS, VISUAL_TOKENS = 112, 6, 64

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: "
    "{% for c in m['content'] if c['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }} {% endfor %}"
    "{% else %}ASSISTANT: {{ m['content'][0]['text'] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]


def make_tokenizer():
    """Byte-level BPE that puts <s> ahead of every text."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    inner = byte_level_bpe(SPECIAL)
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", inner.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        padding_side="left", extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip


def make_model(tokenizer, kv_heads: int = 2, seed: int = 0):
    """A random LlavaForConditionalGeneration with grouped heads (4 query heads on `kv_heads`)."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        image_size=IMAGE_SIZE, patch_size=14, projection_dim=32,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=80, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=kv_heads, max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=VISUAL_TOKENS, vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    return LlavaForConditionalGeneration(config).eval()


def make_processor(tokenizer):
    """Resizes and crops as the Hugging Face conversions do."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    return LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        ),
        tokenizer=tokenizer, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )  # fmt: skip


def to_hub_layout(path: Path, processor) -> None:
    """From the files that transformers 5 writes to those of the published repositories, written by earlier
    releases: the image processor has a file of its own, the tower's weights their former prefix."""
    from safetensors.torch import load_file, save_file

    def former(key: str) -> str:
        head, tail = "vision_tower.", "vision_model."
        return head + tail + key.removeprefix(head) if key.startswith(head) else key

    processor.image_processor.save_pretrained(path)  # preprocessor_config.json
    body = read_json(path / "processor_config.json")
    body.pop("image_processor", None)
    write_json(path / "processor_config.json", body)
    for shard in path.glob("*.safetensors"):
        save_file({former(k): v for k, v in load_file(shard).items()}, shard, {"format": "pt"})
    index = read_json(path / "model.safetensors.index.json")
    index["weight_map"] = {former(k): v for k, v in index["weight_map"].items()}
    write_json(path / "model.safetensors.index.json", index)


#: the files of a recorded model's weights
RECORDED_FILES = ("clip_vision", "llama", "projector")


def recorded(told: dict, weights: dict):
    """The LLaVA model that released code was recorded on (`harness.parity`), float32.

    told: configurations of `clip` and `llama`. weights: tensors by file and by transformers 4's names.

    The recordings reserve no token id for the image, so the vocabulary gets one more entry, the last one,
    which is `config.image_token_id` and is never generated. Raises what `load_state_dict` raises.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    image_token = told["llama"]["vocab_size"]
    vision = CLIPVisionConfig(**told["clip"])
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**{**told["llama"], "vocab_size": image_token + 1}),
        image_token_index=image_token,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        vision_feature_layer=told.get("vision_feature_layer", -2),
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
    )
    model = LlavaForConditionalGeneration(config)
    model.load_state_dict(_state(weights), strict=True)
    model.generation_config.update(eos_token_id=None, suppress_tokens=[image_token])
    return model.eval()


def _state(weights: dict) -> dict:
    """Names of transformers 5 (no `vision_model.` level, one projector), embeddings with the image's row."""
    from torch import nn

    state = {}
    for name, value in weights["clip_vision"].items():
        if not name.endswith("position_ids"):
            state["model.vision_tower." + name.removeprefix("vision_model.")] = value
    for name, value in weights["llama"].items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            value = nn.functional.pad(value, (0, 0, 0, 1))
        if "rotary_emb" not in name:
            inner = name.removeprefix("model.")
            state[name if name == "lm_head.weight" else f"model.language_model.{inner}"] = value
    for name, value in weights["projector"].items():
        layer, kind = name.split(".")
        state[f"model.multi_modal_projector.linear_{1 if layer == '0' else 2}.{kind}"] = value
    return state
