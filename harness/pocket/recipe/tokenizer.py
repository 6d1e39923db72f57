"""pocket-llava's tokenizer: byte-level BPE whose merges make one token of every word our prompts use.

Any text round-trips (256 bytes are the base alphabet). The benchmarks' constant instruction lines are single
added tokens, so a prompt is some 15 tokens long, which is what makes training on two CPU cores feasible.
"""

from __future__ import annotations

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from harness.pocket.data import documents
from harness.pocket.data.scenes import sample_scene
from harness.pocket.data.vocabulary import CHINESE

BOS, EOS, PAD, IMAGE = "<s>", "</s>", "<pad>", "<image>"
INSTRUCTIONS = (
    documents.SHORT_ANSWER,
    documents.LETTER_ANSWER,
    documents.LETTER_ANSWER_CN,
    " " + documents.OPTIONS_HEADER,
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: "
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% else %} ASSISTANT: {% for part in message['content'] %}{{ part['text'] }}{% endfor %}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
PROMPT_HEAD = "USER: "
PROMPT_TAIL = " ASSISTANT:"
#: Constant pieces of the Chinese questions; Chinese has no spaces, so the pieces are taught one by one.
CHINESE_PIECES = (
    "是什么颜色", "的物体是什么形状", "是什么图案", "是什么大小", "在", "的左边还是右边",
    "的上面还是下面", "有多少个", "物体",
    "？", "单词", "数字", "的单词", "的数字", "是什么", "图中写的是什么", "这个词",
    "指的是什么", "左边", "右边", "上面", "下面",
)  # fmt: skip
# Digits one by one; words with the space before them; Chinese and punctuation in runs.
_SPLIT = Regex(r" ?\d| ?[A-Za-z]+| ?[^\sA-Za-z\d]+|\s+")


def _fragments(scenes: int = 1500) -> list[str]:
    """Everything that should become one token, from sampled training prompts and the vocabulary."""
    english: set[str] = set()
    splitter = pre_tokenizers.Split(_SPLIT, "isolated")
    for index in range(scenes):
        scene, rng = sample_scene("train", -1 % 2**31, index), np.random.default_rng(index)
        for task, make in documents.MAKERS.items():
            for row in make(scene, rng):
                text = documents.prompt(task, row) + PROMPT_TAIL + " " + documents.target(task, row)
                for instruction in INSTRUCTIONS:
                    text = text.replace(instruction, "\n")
                english.update(piece for piece, _ in splitter.pre_tokenize_str(text) if piece.isascii())
    return sorted(english) + sorted(set(CHINESE.values())) + list(CHINESE_PIECES) + ["USER", " ASSISTANT"]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer (seconds, deterministic)."""
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
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        extra_special_tokens={"image_token": IMAGE},
    )
