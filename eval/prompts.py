"""A conversation cut where question-agnostic compression happens: after the document, before the question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_MARK = "\u2063DOCUMENT\u2063"  # invisible separators: no template and no document contains this


@dataclass(frozen=True)
class DocumentFrame:
    """The text around a document in a model's own chat format.

    Attributes:
        before: token ids up to the document: system prompt, start of the user's turn, `intro`.
        after: text from the end of the user's turn to the start of the assistant's.
    """

    before: tuple[int, ...]
    after: str


def chat_frame(tokenizer: Any, intro: str) -> DocumentFrame:
    """The frame of one user turn that begins with `intro`, if any, and a document and stays open for a question.

    A tokenizer without a chat template gets its beginning-of-sequence token, if any, and plain paragraphs.
    """
    opening = f"{intro}\n\n" if intro else ""
    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": f"{opening}{_MARK}"}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        before, _, after = text.partition(_MARK)
        return DocumentFrame(tuple(encode(tokenizer, before)), after)
    start = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
    return DocumentFrame(start + tuple(encode(tokenizer, opening) if opening else ()), "\n\nAnswer:")


def ask(
    tokenizer: Any, frame: DocumentFrame, question: str, reply: str, answer: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids of the question with the start of the assistant's reply, and of the gold answer after it."""
    asked = encode(tokenizer, f"\n\n{question}", plain=True) + encode(tokenizer, frame.after)
    # The reply's start and the answer are encoded together, so that they split as the model would write them.
    space = "" if frame.after.endswith(("\n", " ")) else " "
    start = encode(tokenizer, space + reply, plain=True)
    whole = encode(tokenizer, f"{space}{reply} {answer}.", plain=True)
    common = shared_start(start, whole)
    return tuple(asked + whole[:common]), tuple(whole[common:])


def shared_start(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of first ids that are the same in both."""
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    return count


def token_spans(tokenizer: Any, text: str, pieces: Sequence[str]) -> list[tuple[int, int]]:
    """Token ranges `(start, end)` of verbatim pieces of `text`, each at its first place, counted in the whole text.

    A token that a piece shares with the text around it belongs to the piece.
    """
    whole = encode(tokenizer, text, plain=True)
    spans = []
    for piece in pieces:
        start = text.index(piece)
        first = shared_start(encode(tokenizer, text[:start], plain=True), whole)
        last = shared_start(encode(tokenizer, text[: start + len(piece)], plain=True), whole)
        if last < len(whole) and len(encode(tokenizer, text[: start + len(piece)], plain=True)) > last:
            last += 1
        spans.append((first, last))
    return spans


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
        pieces.append(now[len(before) :])
        # One token of context is enough for tokenizers that drop a leading space at the start of a text.
        start, shown = max(0, end - 1), end
    return pieces
