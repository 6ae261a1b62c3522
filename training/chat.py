"""Conversations as token ids with the assistant's tokens marked, for any tokenizer's chat template."""

from collections.abc import Sequence
from typing import Any

_SLOT = "slot<{}>slot"


def starts_with_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts its beginning-of-sequence token before plain text."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def is_special(tokenizer: Any, token: int) -> bool:
    added = tokenizer.added_tokens_decoder.get(token)
    return token in tokenizer.all_special_ids or (added is not None and added.special)


class ChatFrame:
    """The text that a chat template puts around alternating user and assistant turns, tokenised once.

    Turns are then put in between as separately tokenised pieces, which keeps every token boundary where a turn begins
    or ends. A tokenizer without a chat template gets plain `Question: … Answer: …` lines.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        self.first_question_prefix = "" if self.has_template else "Question: "
        self.answer_prefix = "" if self.has_template else " "
        self._pieces: dict[int, list[list[int]]] = {}

    def pieces(self, turns: int) -> list[list[int]]:
        """`2 * turns + 1` lists of token ids: before the first user turn, between turns, and after the last answer.

        Raises:
            ValueError: the chat template drops or reorders turns.
        """
        if turns not in self._pieces:
            literals = self._literals(turns) if self.has_template else _plain_literals(turns)
            pieces = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in literals]
            if not self.has_template and starts_with_bos(self.tokenizer):
                pieces[0] = [self.tokenizer.bos_token_id, *pieces[0]]
            self._pieces[turns] = pieces
        return self._pieces[turns]

    def turn_tokens(self) -> int:
        """Tokens of one question and answer in addition to their own text."""
        pieces = self.pieces(2)
        return len(pieces[1]) + max(len(pieces[2]), len(pieces[4]))

    def end_tokens(self, closing: list[int]) -> int:
        """Number of tokens of `closing` (the text after an answer) that the model itself would generate: 1 or 0.

        With a chat template that is the special token that ends the turn, without one the line break.
        """
        return int(bool(closing) and (not self.has_template or is_special(self.tokenizer, closing[0])))

    def _literals(self, turns: int) -> list[str]:
        slots = [_SLOT.format(number) for number in range(2 * turns)]
        messages = [
            {"role": "assistant" if number % 2 else "user", "content": slot} for number, slot in enumerate(slots)
        ]
        rest = self.tokenizer.apply_chat_template(messages, tokenize=False)
        literals = []
        for slot in slots:
            literal, found, rest = rest.partition(slot)
            if not found:
                raise ValueError(
                    f"the tokenizer's chat template drops or reorders turns of {turns} questions and answers"
                )
            literals.append(literal)
        return [*literals, rest]


def _plain_literals(turns: int) -> list[str]:
    # The document precedes the first question, whose label is therefore first_question_prefix.
    between = ["\nAnswer:", "\n\nQuestion: "] * turns
    return ["", *between[:-1], "\n"]


def encode_messages(messages: Sequence[dict[str, Any]], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation in the tokenizer's chat template, and a mask of those that the assistant says.

    The assistant's are the tokens of its messages' contents and the special token after each.

    Raises:
        ValueError: a tokenizer without offsets, or a template that does not repeat an assistant's message.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} gives no offsets; a fast tokenizer is needed to find the completions"
        )
    text = tokenizer.apply_chat_template(list(messages), tokenize=False)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    input_ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    loss_mask = [False] * len(input_ids)
    for start, stop in _assistant_spans(messages, text):
        inside = [place for place, (begin, end) in enumerate(offsets) if begin < stop and end > start]
        after = inside[-1] + 1 if inside else len(input_ids)
        if after < len(input_ids) and is_special(tokenizer, input_ids[after]):
            inside.append(after)
        for place in inside:
            loss_mask[place] = True
    return input_ids, loss_mask


def _assistant_spans(messages: Sequence[dict[str, Any]], text: str) -> list[tuple[int, int]]:
    """Character ranges of the assistant's contents in the rendered conversation."""
    spans, cursor = [], 0
    for message in messages:
        content = _plain_content(message).strip()
        start = text.find(content, cursor)
        if start < 0:  # reasoning models' templates drop the thoughts of earlier turns
            content = content.rpartition("</think>")[2].strip()
            start = text.find(content, cursor)
        if start < 0:
            if message["role"] == "assistant":
                raise ValueError(
                    "the chat template does not repeat an assistant's message, so its tokens cannot be found"
                )
            continue
        if message["role"] == "assistant" and content:
            spans.append((start, start + len(content)))
        cursor = start + len(content)
    return spans


def _plain_content(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)
