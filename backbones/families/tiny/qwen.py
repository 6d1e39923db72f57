"""A tiny random Qwen2.5-VL: images of 4 to 48 visual tokens, windows of 2 x 2 of
them, 6 decoder layers with grouped heads; about 300k parameters, and attention that is not flat.
"""

from __future__ import annotations

from pathlib import Path

from backbones.families.tiny.parts import byte_level_bpe, read_json, write_json

LAYERS, MIN_TOKENS, MAX_TOKENS = 6, 4, 48
UNIT = 28  # pixels of a visual token's side

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
]  # fmt: skip


def make_tokenizer():
    """Byte-level BPE with Qwen's special tokens and no beginning-of-sequence token."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(SPECIAL), eos_token="<|im_end|>", pad_token="<|endoftext|>",
        padding_side="left",
        extra_special_tokens={
            "image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
            "vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>",
        },
    )  # fmt: skip


def make_model(tokenizer, seed: int = 0):
    """A random Qwen2_5_VLForConditionalGeneration; 2 of its tower's 4 blocks see the whole image."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        vision_config=dict(
            depth=4, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64,
            window_size=2 * UNIT, fullatt_block_indexes=[1, 3],
        ),
        **language(tokenizer),
    )  # fmt: skip
    return with_random_weights(Qwen2_5_VLForConditionalGeneration(config), seed)


def language(tokenizer) -> dict:
    """Keyword arguments of a configuration: the language model and the tokens with a meaning."""
    ids = tokenizer.convert_tokens_to_ids
    return dict(
        text_config=dict(
            hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=len(tokenizer), max_position_embeddings=2048,
            use_sliding_window=False, pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
            rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3]),
        ),
        image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"),
    )  # fmt: skip


def with_random_weights(model, seed: int):
    """`model` with weights that make attention anything but flat."""
    import torch

    model = model.eval()
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.ndim >= 2:
            p.data.normal_(0, 1.0 / p[0].numel() ** 0.5, generator=generator)
        elif name.endswith("bias"):
            p.data.normal_(0, 0.1, generator=generator)
        else:
            p.data.uniform_(0.8, 1.2, generator=generator)
        if any(part in name for part in ("q_proj.weight", "k_proj.weight", "qkv.weight")):
            p.data.mul_(1.6)
        if "embed_tokens" in name:
            p.data.normal_(0, 1.0, generator=generator)
    return model


def make_processor(tokenizer, processor: str = "Qwen2_5_VLProcessor"):
    """Scales images to MIN_TOKENS to MAX_TOKENS visual tokens. processor: its class."""
    import transformers
    from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    return getattr(transformers, processor)(
        image_processor=Qwen2VLImageProcessor(
            size={"shortest_edge": MIN_TOKENS * UNIT**2, "longest_edge": MAX_TOKENS * UNIT**2}
        ),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=TEMPLATE,
    )


def to_hub_layout(path: Path, processor) -> None:
    """From the files that transformers 5 writes to those of the published repositories, written by earlier
    releases: settings of the language model beside those of the whole, rotary positions and limits of pixels
    under their former names."""
    processor.image_processor.save_pretrained(path)  # preprocessor_config.json
    kind = read_json(path / "processor_config.json")["processor_class"]
    (path / "processor_config.json").unlink()
    config = read_json(path / "config.json")
    text = {k: v for k, v in config.pop("text_config").items() if k not in ("layer_types", "model_type")}
    rope = text.pop("rope_parameters")
    former = {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "use_sliding_window": False,
        "sliding_window": 32768,
    }
    write_json(path / "config.json", {**text, **config, **former})
    images = read_json(path / "preprocessor_config.json")
    size = images.pop("size")
    limits = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    write_json(path / "preprocessor_config.json", {**images, **limits, "processor_class": kind})


#: the files of a recorded model's weights
RECORDED_FILES = ("model",)


def recorded(told: dict, weights: dict):
    """The Qwen2.5-VL model that released code was recorded on (`harness.parity`), float32.

    told: its config.json. weights: tensors by file and by transformers 4's names. Raises ValueError for
    tensors that are missing, unexpected or of another shape.
    """
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    model, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        None,
        config=Qwen2_5_VLConfig.from_dict(told),
        state_dict=weights["model"],
        dtype=torch.float32,
        output_loading_info=True,
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        for name in report[kind]:
            raise ValueError(f"{kind.partition('_')[0]} {name}")
    model.generation_config.update(eos_token_id=None)
    return model.eval()
