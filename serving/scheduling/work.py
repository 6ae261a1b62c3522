"""What is to be computed next, and where whoever computes it writes the results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..lease import Lease
    from ..payload import Payload
    from .entry import Entry
    from .request import Request

Span = tuple[int, int]  # tokens [start, end) of the prompt and the answer behind it


@dataclass(eq=False)
class Prefill:
    """The KV of the prompt's tokens [start, end) is to be computed.

    Attributes:
        lease: of what is cached; its payloads are the KV of the first `lease.length` tokens, to be read at `first`.
        first: nothing of the request has been computed before. last: the first token of the answer comes with it.
        store: tokens whose KV is to become the tree's, in `payload`; None: none.
        payload, tokens, finished, error: the results; `tokens` of a last chunk is the first token of the answer, or
            None where tokens are not told; `finished`: it ends the answer. An error ends the request, and only it.
    """

    request: Request
    lease: Lease
    start: int
    end: int
    first: bool
    last: bool
    store: Span | None
    entry: Entry = field(repr=False)
    payload: Payload | None = None
    tokens: Sequence[int] | None = None
    finished: bool = False
    error: BaseException | None = None


@dataclass(eq=False)
class Decode:
    """The next tokens of the answer are to be computed, one after the other.

    Attributes:
        steps: how many at most: those of the work.
        tokens: the result, 1 to `steps` of them; None where they are not told: exactly `steps`, or fewer if they
            reach the end.
        payload, finished, error: as in `Prefill`; the payload is asked for by `store_span`.
    """

    request: Request
    entry: Entry = field(repr=False)
    tokens: Sequence[int] | None = None
    payload: Payload | None = None
    finished: bool = False
    error: BaseException | None = None

    @property
    def left(self) -> int:
        """Tokens until `max_new_tokens`."""
        return self.request.max_new_tokens - self.entry.produced

    def store_span(self) -> Span | None:
        """Once `tokens` and `finished` are written: the tokens whose KV is wanted in `payload`, if the request ends.

        The KV of the last token is not there: it has not been an input. Answers of tokens that are not told cannot be
        stored.
        """
        entry, lease = self.entry, self.entry.lease
        assert lease is not None, "what decodes has a lease"
        if self.tokens is None or not entry.told or not (self.finished or len(self.tokens) >= self.left):
            return None
        end = entry.storable(entry.produced + len(self.tokens))
        return (lease.length, end) if end > lease.length else None


@dataclass(eq=False)
class Work:
    """One batch.

    Attributes:
        number: counts them.
        steps: tokens of each decode; may be lowered, to 1 at the least, before the work is handed back.
        tokens: that are computed in it with so many steps.
    """

    number: int
    prefills: list[Prefill]
    decodes: list[Decode]
    steps: int

    @property
    def tokens(self) -> int:
        return sum(item.end - item.start for item in self.prefills) + self.steps * len(self.decodes)
