"""A small but real tokenizer, and prose to train it on."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = (
    "the", "a", "of", "to", "and", "in", "is", "that", "it", "was", "for", "on", "are", "as", "with", "his", "they",
    "at", "be", "this", "from", "have", "or", "by", "one", "had", "not", "but", "what", "people", "startup",
    "founder", "idea", "money", "work", "time", "company", "good", "make", "think", "know", "want", "program",
    "language", "write", "essay",
)  # fmt: skip


def prose(seed: int, sentences: int = 200) -> str:
    """Hard-wrapped paragraphs of nonsense; no two sentences begin alike."""
    rng = random.Random(seed)
    parts = []
    for number in range(sentences):
        words = rng.choices(WORDS, k=rng.randint(5, 20))
        parts.append(f"{words[0].capitalize()} {number} {' '.join(words[1:])}{rng.choice('.?!')}")
        parts.append(rng.choice((" ", "  ", "\n", "\n\n")))
    return "".join(parts)


def build_tokenizer(chat_template: str | None) -> PreTrainedTokenizerFast:
    from tenure.training import templates

    corpus = [prose(0), *(part for family in templates.FAMILIES for pair in family.templates for part in pair)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"vocab_size": 1500, "special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(**options))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|im_end|>")
    wrapped.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    wrapped.chat_template = chat_template
    return wrapped


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def plain_tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(None)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return [prose(seed) for seed in range(3)]
