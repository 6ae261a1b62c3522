"""What is to be computed next, and where whoever computes it writes the results.

What the scheduler keeps of a request until it is over.

What has to be looked at when its time comes.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import count
from typing import TYPE_CHECKING

from ..kvcache.radix_tree import TOKEN_BYTES, Pages, encode
from ..request import Ended, Request, RequestOutput, StorePolicy, Times

if TYPE_CHECKING:
    from ..kvcache.base import KVPayload
    from ..kvcache.tiered_cache import CacheHandle


Span = tuple[int, int]  # tokens [start, end) of the prompt and the answer behind it


@dataclass(eq=False)
class Prefill:
    """The KV of the prompt's tokens [start, end) is to be computed.

    Attributes:
        lease: of what is cached; its payloads are the KV of the first `handle.length` tokens, to be read at `first`.
        first: nothing of the request has been computed before. last: the first token of the answer comes with it.
        store: tokens whose KV is to become the tree's, in `payload`; None: none.
        payload, tokens, finished, error: the results; `tokens` of a last chunk is the first token of the answer, or
            None where tokens are not told; `finished`: it ends the answer. An error ends the request, and only it.
    """

    request: Request
    handle: CacheHandle
    start: int
    end: int
    first: bool
    last: bool
    store: Span | None
    entry: Entry = field(repr=False)
    payload: KVPayload | None = None
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
    payload: KVPayload | None = None
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
        entry, handle = self.entry, self.entry.handle
        assert handle is not None, "what decodes has a lease"
        if self.tokens is None or not entry.told or not (self.finished or len(self.tokens) >= self.left):
            return None
        end = entry.storable(entry.produced + len(self.tokens))
        return (handle.length, end) if end > handle.length else None


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


class State(Enum):
    WAITING = "it was waiting to be admitted"
    LOADING = "its KV was on its way"
    LOADED = "its KV had come, and it was waiting for a place in the batch"
    PREFILL = "its prompt was being computed"
    DECODE = "its answer was being computed"
    ENDED = "it was over"


@dataclass(eq=False)
class Entry:
    """A request inside the scheduler, which alone changes it.

    Attributes:
        key: the whole pages of the prompt; `lookup`: of all its tokens but the last, which must be computed.
        tail: tokens behind the last whole page. size: tokens of the prompt. fixed: of these, whole pages of the agent's
            fixed prompt.
        byte_rate: bytes of KV a token.
        done: tokens of the prompt whose KV is there.
        reserved: bytes it has reserved in the device pool.
        computed: tokens of the prompt that were computed; `charged`: what its workflow has been charged for it.
        agent: whose call it is; None where the request names another client's. order: of arrival.
        opened: its prompt has been looked up. started: a workflow counts it. waits: the outlook does.
        failures: of its loads. compute: its prompt is computed as far as it is not on the device.
        aside: it waits for a load to end, as it needs one and as many as may be are under way.
        refused_at: when it first found no room. load_began, give_up_at: of the load under way.
        working: it is in the work that is out. doomed: how it is to end once that is back.
    """

    request: Request
    key: Pages
    lookup: Pages
    tail: list[int]
    size: int
    fixed: int
    byte_rate: int
    page_size: int
    times: Times
    state: State = State.WAITING
    handle: CacheHandle | None = None
    done: int = 0
    reserved: int = 0
    computed: int = 0
    charged: float = 0.0
    failures: int = 0
    compute: bool = False
    agent: str | None = None
    order: int = 0
    opened: bool = False
    started: bool = False
    waits: bool = False
    aside: bool = False
    refused_at: float | None = None
    load_began: float = 0.0
    give_up_at: float = math.inf
    working: bool = False
    doomed: tuple[RequestOutput, str | None] | None = None
    decode: Decode | None = None
    tokens: list[int] = field(default_factory=list)
    told: bool = True
    produced: int = 0
    stalled_s: float = 0.0
    cached: int = 0
    loaded: int = 0
    recomputed: int = 0

    @property
    def path(self) -> tuple[str, str]:
        """Whom it is charged to."""
        return self.request.client, self.request.workflow or self.request.session or ""

    def storable(self, produced: int) -> int:
        """Up to which token of prompt and answer the KV is to be kept, with so many tokens of the answer."""
        if self.request.keep is StorePolicy.DISCARD:
            return self.fixed
        whole = self.size + max(0, produced - 1)
        return whole - whole % self.page_size

    @property
    def needed(self) -> int:
        """Bytes of KV that are computed outside the tree until the request ends, beside its lease."""
        covered = 0 if self.handle is None else self.handle.length
        return (self.size + self.request.max_new_tokens - covered) * self.byte_rate

    def ended(self, outcome: RequestOutput, error: str | None) -> Ended:
        """What is told of it once it is over."""
        return Ended(
            self.request,
            outcome,
            error,
            self.tokens,
            self.produced,
            self.times,
            self.stalled_s,
            self.cached,
            self.loaded,
            self.recomputed,
        )


def new_entry(request: Request, page_size: int, bytes_per_token: int, now: float) -> Entry:
    """The entry of a request that has just come.

    Raises:
        ValueError: its prompt is empty, or no row of token ids.
    """
    size, key = len(request.prompt), Pages(encode(request.prompt, page_size))
    if size == 0:
        raise ValueError(f"the request {request.id!r} has an empty prompt; accepted: one token or more")
    whole, fixed = len(key) // TOKEN_BYTES, min(request.fixed_tokens, size)
    return Entry(
        request,
        key=key,
        lookup=key if size > whole else Pages(key[: -page_size * TOKEN_BYTES]),
        tail=[int(token) for token in request.prompt[whole:]] if size > whole else [],
        size=size,
        fixed=fixed - fixed % page_size,
        byte_rate=request.bytes_per_token or bytes_per_token,
        page_size=page_size,
        times=Times(now),
    )


class Timers:
    """Entries by time; whoever sets one decides, when it is due, whether it still means anything."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Entry]] = []
        self._numbers = count()
        self._ended = 0

    def set(self, time: float, entry: Entry) -> None:
        heapq.heappush(self._heap, (time, next(self._numbers), entry))

    def ended(self) -> None:
        """One more entry is over; when most of the heap is of such, they are dropped."""
        self._ended += 1
        if 2 * self._ended > len(self._heap) + 64:
            self._heap = [each for each in self._heap if each[2].state is not State.ENDED]
            heapq.heapify(self._heap)
            self._ended = 0

    def due(self, now: float) -> Iterator[Entry]:
        """The entries whose time has come, out of the heap; not those that are over."""
        while self._heap and self._heap[0][0] <= now:
            entry = heapq.heappop(self._heap)[2]
            if entry.state is not State.ENDED:
                yield entry

    def next_time(self) -> float | None:
        while self._heap and self._heap[0][2].state is State.ENDED:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None
