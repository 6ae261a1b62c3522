"""The text that chat templates put around questions and answers, as tokens."""

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
