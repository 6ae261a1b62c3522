"""The text of an answer as its tokens arrive, and the texts that end it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

REPLACEMENT = "\ufffd"  # a decoder's sign for bytes that are no character, or not yet
# An incomplete character ends with one of the next three tokens of a byte each. After so many tokens without a text
# that ends on a whole character, the bytes are not text, and their window is closed to bound the work on each token.
MAX_OPEN_TOKENS = 64


class TextDelta(NamedTuple):
    """More of an answer's text.

    Attributes:
        text: continues what was returned before; never a part of a character or of a stop text.
        stopped_by: the stop text that ended the answer, which is not part of the text; None: it continues.
    """

    text: str
    stopped_by: str | None = None


class StopChecker:
    """Decodes an answer token by token and ends it before the first stop text.

    The texts returned, joined, are the decoded answer up to the stop text: that of the first one to be complete, the
    longest if two end together, however the tokens divide it. Text that may be the beginning of a stop text is held
    back until it is decided. (Of bytes that are not UTF-8 only the number of replacement signs may differ.)

    Args:
        decode: token ids to text, with nothing cleaned up, so that more tokens only add to the text; for example
            `functools.partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)`.
        stop: `SamplingParams.stop`.
        min_tokens: `SamplingParams.min_new_tokens`; stop texts that are complete with these tokens are ordinary text.
        context: last tokens of the prompt (four are enough), if the answer continues its text: then the first word
            keeps its space with tokenizers that drop the one at the beginning, as SentencePiece's.

    Raises:
        ValueError: a stop text is empty.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        context: Sequence[int] = (),
    ) -> None:
        if not all(stop):
            raise ValueError("got an empty stop text; accepted: texts of one character or more")
        self._decode, self._left = decode, min_tokens
        self._matchers = [_Matcher(text) for text in stop]
        self._held = ""  # decoded, and possibly the beginning of a stop text
        self._stopped_by: str | None = None
        # The window of tokens that is decoded. Before `_closed` its text ended on a whole character, and these tokens
        # are only there for what a token's text takes from the one before it. `_sent` characters have been passed on.
        self._window = list(context)
        self._closed = len(self._window)
        self._sent = len(decode(self._window)) if context else 0

    def push(self, token: int) -> TextDelta:
        """The answer continues with `token`.

        Raises:
            ValueError: a stop text has ended it.
            Exception: whatever `decode` raises.
        """
        if self._stopped_by is not None:
            raise ValueError(f"got a token after the stop text {self._stopped_by!r}; accepted: none")
        self._window.append(token)
        text = self._decode(self._window)
        if text.endswith(REPLACEMENT) and len(self._window) - self._closed < MAX_OPEN_TOKENS:
            return self._release(self._take(text, len(text.rstrip(REPLACEMENT))))
        more = self._take(text, len(text))
        if more or len(self._window) - self._closed >= MAX_OPEN_TOKENS:
            self._close()
        return self._release(more)

    def finish(self) -> TextDelta:
        """The answer has ended without a stop text: returns the rest of its text."""
        if self._stopped_by is not None:
            return TextDelta("")
        text = self._decode(self._window)
        last = self._release(self._take(text, len(text)))
        rest, self._held = self._held, ""
        return last if last.stopped_by is not None else TextDelta(last.text + rest)

    def _take(self, text: str, end: int) -> str:
        """The window's text from what has been passed on to `end`."""
        begin, self._sent = self._sent, max(self._sent, end)
        return text[begin:end]

    def _close(self) -> None:
        """Keeps of the window the tokens since it was last closed."""
        del self._window[: self._closed]
        self._closed = len(self._window)
        self._sent = len(self._decode(self._window))

    def _release(self, text: str) -> TextDelta:
        """Passes on decoded text up to a stop text, or to what may be the beginning of one."""
        searched = self._left <= 0
        self._left -= 1
        if not self._matchers:
            return TextDelta(text)
        self._held += text
        for end, character in enumerate(text, len(self._held) - len(text) + 1):
            found = [one.text for one in self._matchers if one.read(character)]
            if found and searched:
                self._stopped_by = max(found, key=len)
                text, self._held = self._held[: end - len(self._stopped_by)], ""
                return TextDelta(text, self._stopped_by)
        cut = len(self._held) - max(one.matched for one in self._matchers)
        text, self._held = self._held[:cut], self._held[cut:]
        return TextDelta(text)


class _Matcher:
    """Searches a text in a stream of characters (Knuth, Morris and Pratt 1977).

    Attributes:
        matched: length of the longest beginning of `text`, short of all, that the stream ends with.
    """

    def __init__(self, text: str) -> None:
        self.text, self.matched = text, 0
        self._shorter = [0]  # for each beginning: the length of its longest shorter beginning that it ends with
        for end in range(1, len(text)):
            length = self._shorter[-1]
            while length and text[end] != text[length]:
                length = self._shorter[length - 1]
            self._shorter.append(length + (text[end] == text[length]))

    def read(self, character: str) -> bool:
        """Whether the stream, with another character, ends with `text`."""
        while self.matched and self.text[self.matched] != character:
            self.matched = self._shorter[self.matched - 1]
        self.matched += self.text[self.matched] == character
        if self.matched < len(self.text):
            return False
        self.matched = self._shorter[-1]
        return True
