"""The pocket backbones' tokenizers: byte-level BPE whose merges make one token of every word our prompts use.

Any text round-trips (256 bytes are the base alphabet). The benchmarks' constant instruction lines are single
added tokens, so a prompt is some 15 tokens long, which is what makes training on two CPU cores feasible.
pocket-qwen's is pocket-llava's, token for token, without its <s> in front, and behind it the tokens of Qwen's
prompt.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from harness.drawings import wording
from harness.drawings.v2.interview import Interview
from harness.drawings.v2.scenes import sample_scene
from harness.drawings.vocabulary import CHINESE
from harness.pocket.data import documents

BOS, EOS, PAD, IMAGE = "<s>", "</s>", "<pad>", "<image>"
INSTRUCTIONS = (
    wording.SHORT_ANSWER,
    wording.LETTER_ANSWER,
    wording.LETTER_ANSWER_CN,
    " " + wording.OPTIONS_HEADER,
)
LLAVA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: "
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% else %} ASSISTANT: {% for part in message['content'] %}{{ part['text'] }}{% endfor %}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
#: The roles' lines are single tokens too: they stand in every prompt.
QWEN_ROLES = ("user\n", "assistant\n")
_QWEN_NAMES = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "eos_token_id": "<|im_end|>",
    "pad_token_id": "<|endoftext|>",
}
#: Constant pieces of the Chinese questions; Chinese has no spaces, so the pieces are taught one by one.
CHINESE_PIECES = (
    "是什么颜色", "是什么形状", "的物体是什么形状", "的物体是什么颜色", "是什么图案", "物体", "在",
    "的", "写的是什么单词", "写的是什么数字", "上写的是什么单词", "上写的是什么数字",
    "上的单词指的是什么", "上的单词用中文怎么说", "上的数字加一是多少", "图中有", "吗", "有多少个",
    "中哪种颜色只出现一次", "有多少种颜色", "左半边还是右半边", "上半部还是下半部",
    "的左边还是右边", "的上面还是下面", "左边", "右边", "上面", "下面", "上半部", "下半部", "单词",
    "数字", "？",
)  # fmt: skip
# Digits one by one; words with the space before them; Chinese and punctuation in runs.
_SPLIT = Regex(r" ?\d| ?[A-Za-z]+| ?[^\sA-Za-z\d]+|\s+")


def _fragments(scenes: int = 240) -> list[str]:
    """Everything that should become one token, from sampled training prompts and the vocabulary."""
    english: set[str] = set()
    splitter = pre_tokenizers.Split(_SPLIT, "isolated")
    for index in range(scenes):
        interview = Interview(
            sample_scene("train", 2**31 - 1, index), np.random.default_rng(index), disjoint=False
        )
        for task in documents.tasks():
            for row in (row for _ in range(6) for row in documents.ask(interview, task)[:2]):
                text = f"{documents.prompt(task, row)} ASSISTANT: {documents.target(task, row)}"
                for instruction in INSTRUCTIONS:
                    text = text.replace(instruction, "\n")
                english.update(piece for piece, _ in splitter.pre_tokenize_str(text) if piece.isascii())
    spaced = {f" {word}" for word in CHINESE} | {f" {letter}" for letter in wording.LETTERS}
    return (
        sorted(english | spaced) + sorted(set(CHINESE.values())) + list(CHINESE_PIECES)
        + ["USER", " ASSISTANT"]
    )  # fmt: skip


@cache
def _trained() -> str:
    """The tokenizer of pocket-llava as JSON; training takes seconds and gives always the same."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_SPLIT, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[BOS, EOS, PAD, IMAGE],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_fragments(), trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in INSTRUCTIONS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer.to_str()


def llava_tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()),
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        extra_special_tokens={"image_token": IMAGE},
    )


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer.from_str(_trained())
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in QWEN_SPECIAL])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in QWEN_ROLES])
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


def llava_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    names = {"image": IMAGE, "bos": BOS, "eos": EOS, "pad": PAD}
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}


def qwen_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Ids that a Qwen2.5-VL configuration holds, by the names it has for them."""
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in _QWEN_NAMES.items()}
