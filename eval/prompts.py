"""A conversation cut where question-agnostic compression happens: after the document, before the question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_MARK = "\u2063DOCUMENT\u2063"  # invisible separators: no template and no document contains this


@dataclass(frozen=True)
class Frame:
    """What stands around a document in a model's own chat format.

    Attributes:
        before: token ids up to the document: system prompt, start of the user's turn, `intro`.
        after: text from the end of the user's turn to the start of the assistant's.
    """

    before: tuple[int, ...]
    after: str


def chat_frame(tokenizer: Any, intro: str) -> Frame:
    """The frame of one user turn that begins with `intro` and a document and stays open for a question.

    A tokenizer without a chat template gets its beginning-of-sequence token, if any, and plain paragraphs.
    """
    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": f"{intro}\n\n{_MARK}"}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        before, _, after = text.partition(_MARK)
        return Frame(tuple(encode(tokenizer, before)), after)
    start = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
    return Frame(start + tuple(encode(tokenizer, f"{intro}\n\n")), "\n\nAnswer:")


def encode(tokenizer: Any, text: str, plain: bool = False) -> list[int]:
    """Token ids of `text` with nothing added; `plain` text has no special tokens, whatever it spells."""
    extra = {"split_special_tokens": True} if plain else {}
    return list(tokenizer(text, add_special_tokens=False, **extra)["input_ids"])


def token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text each token adds, so that joining them gives the document.

    A character spelled by several tokens is given to the last of them; the others get the empty string.
    """
    pieces, start, shown = [], 0, 0
    for end in range(1, len(ids) + 1):
        before = tokenizer.decode(ids[start:shown], clean_up_tokenization_spaces=False)
        now = tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False)
        if now.endswith("\ufffd") and end < len(ids):
            pieces.append("")
            continue
        pieces.append(now[len(before):])
        # One token of context is enough for tokenizers that drop a leading space at the start of a text.
        start, shown = max(0, end - 1), end
    return pieces
