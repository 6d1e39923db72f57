"""pocket-qwen's tokenizer: pocket-llava's, token for token, and behind it those of Qwen's prompt.

The roles' lines are single tokens too: they stand in every prompt.
"""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from harness.pocket.recipe.export import CHECKPOINT

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
ROLES = ("user\n", "assistant\n")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: A conversation of one turn: this, the image's tokens, its end, the question, the tail.
PROMPT_HEAD = "<|im_start|>user\n<|vision_start|>"
IMAGE_END = "<|vision_end|>"
PROMPT_TAIL = "<|im_end|>\n<|im_start|>assistant\n"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """pocket-llava's shipped tokenizer, without its <s> in front, and the tokens of Qwen's prompt."""
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ROLES])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        extra_special_tokens={
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_bos_token": "<|vision_start|>",
            "vision_eos_token": "<|vision_end|>",
        },
    )


def special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Ids that a Qwen2.5-VL configuration holds, by the names it has for them."""
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
        "eos_token_id": "<|im_end|>",
        "pad_token_id": "<|endoftext|>",
    }
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
