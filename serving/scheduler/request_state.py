"""The scheduler's state of a request, the batches it hands out, and the timers of its requests."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import count

import numpy as np

from ..kvcache.base import KVPayload
from ..kvcache.radix_tree import TOKEN_BYTES, Pages, encode
from ..kvcache.tiered_cache import CacheHandle
from ..request import FinishReason, Request, RequestOutput, RequestTimes, StorePolicy

TokenRange = tuple[int, int]  # [start, end) in the prompt followed by the answer


class RequestStatus(Enum):
    """The stage of a request; the value completes the message of a timeout."""

    WAITING = "it was waiting to be admitted"
    LOADING = "its KV was being loaded"
    LOADED = "its KV was loaded, and it was waiting for a place in the batch"
    PREFILL = "its prompt was being computed"
    DECODE = "its answer was being computed"
    ENDED = "it had ended"


@dataclass(eq=False)
class RequestState:
    """A request inside the scheduler. Only the scheduler changes it, under the cache's lock.

    It owns `handle` and the bytes it has reserved; `Admission.withdraw` gives both back.

    Attributes:
        key: the prompt's whole pages. lookup_key: its pages without the last token, which is always computed.
        tail_tokens: prompt tokens behind the last whole page.
        num_prompt_tokens: length of the prompt. num_fixed_tokens: of these, the agent's fixed prompt in whole pages.
        bytes_per_token: KV of a computed token.
        handle: holds the cached prefix; None while waiting.
        num_computed_tokens: prompt tokens whose KV is on the device, cached or computed.
        num_prefilled_tokens: prompt tokens computed for this request.
        reserved_bytes: bytes reserved in the device pool for what is still to be computed.
        charged_tokens: weighted tokens charged to its client and workflow in the fair queue.
        load_failures: failed loads. force_recompute: nothing is loaded any more; what is not on the device is computed.
        agent: the agent whose call it counts as; None if the request names another client's agent.
        arrival_order: its place among requests of equal age and priority; kept when it is queued again.
        looked_up: its prompt has been looked up before. in_workflow: the step graph counts it as a call.
        announced: the predictor knows it as waiting.
        deferred: it needs a load while the limit of concurrent loads is reached.
        refused_since: when it first found no memory. load_started, load_deadline: of its current loads, in seconds.
        in_batch: part of the batch in flight. pending_outcome: how it ends once that batch is complete.
        output_tokens: the answer as far as its tokens were reported; tokens_known: all of them were.
    """

    request: Request
    key: Pages
    lookup_key: Pages
    tail_tokens: list[int]
    num_prompt_tokens: int
    num_fixed_tokens: int
    bytes_per_token: int
    page_size: int
    times: RequestTimes
    status: RequestStatus = RequestStatus.WAITING
    handle: CacheHandle | None = None
    num_computed_tokens: int = 0
    num_prefilled_tokens: int = 0
    reserved_bytes: int = 0
    charged_tokens: float = 0.0
    load_failures: int = 0
    force_recompute: bool = False
    agent: str | None = None
    arrival_order: int = 0
    looked_up: bool = False
    in_workflow: bool = False
    announced: bool = False
    deferred: bool = False
    refused_since: float | None = None
    load_started: float = 0.0
    load_deadline: float = math.inf
    in_batch: bool = False
    pending_outcome: tuple[FinishReason, str | None] | None = None
    output_tokens: list[int] = field(default_factory=list)
    tokens_known: bool = True
    num_output_tokens: int = 0
    stalled_s: float = 0.0
    cached_tokens: int = 0
    loaded_tokens: int = 0
    recomputed_tokens: int = 0

    @classmethod
    def create(cls, request: Request, page_size: int, bytes_per_token: int, now: float) -> RequestState:
        """The state of a request that arrives at `now`.

        Raises:
            ValueError: its prompt is empty, or not one row of token ids.
        """
        size, key = len(request.prompt), Pages(encode(request.prompt, page_size))
        if size == 0:
            raise ValueError(f"the request {request.id!r} has an empty prompt; accepted: one token or more")
        whole, fixed = len(key) // TOKEN_BYTES, min(request.fixed_tokens, size)
        return cls(
            request, key=key, lookup_key=key if size > whole else Pages(key[: -page_size * TOKEN_BYTES]),
            tail_tokens=[int(token) for token in request.prompt[whole:]] if size > whole else [],
            num_prompt_tokens=size, num_fixed_tokens=fixed - fixed % page_size,
            bytes_per_token=request.bytes_per_token or bytes_per_token, page_size=page_size, times=RequestTimes(now),
        )  # fmt: skip

    @property
    def account(self) -> tuple[str, str]:
        """The client and the workflow (or session) that its tokens are charged to."""
        return self.request.client, self.request.workflow or self.request.session or ""

    @property
    def bytes_to_reserve(self) -> int:
        """Bytes of KV computed for it, outside the cache, beyond what its handle covers."""
        covered = 0 if self.handle is None else self.handle.length
        total = self.num_prompt_tokens + self.request.max_new_tokens
        total += -total % self.page_size
        return (total - covered) * self.bytes_per_token

    @property
    def ended(self) -> bool:
        return self.status is RequestStatus.ENDED

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and answer so far."""
        return self.num_prompt_tokens + self.num_output_tokens

    def token_ids(self, start: int, stop: int) -> np.ndarray:
        """The tokens `[start, stop)` of prompt and answer, int64."""
        whole = np.asarray(self.request.prompt[start : min(stop, self.num_prompt_tokens)], np.int64)
        after = self.output_tokens[max(0, start - self.num_prompt_tokens) : max(0, stop - self.num_prompt_tokens)]
        return np.concatenate([whole, np.asarray(after, np.int64)])

    def storable_end(self, num_output_tokens: int) -> int:
        """The end of the token range to store once the answer has that many tokens, in whole pages.

        The answer's last token is excluded: it has not been an input, so it has no KV.
        """
        if self.request.store_policy is StorePolicy.DISCARD:
            return self.num_fixed_tokens
        whole = self.num_prompt_tokens + max(0, num_output_tokens - 1)
        return whole - whole % self.page_size

    def output(self, finish_reason: FinishReason, error: str | None) -> RequestOutput:
        return RequestOutput(
            self.request, finish_reason, error, self.output_tokens, self.num_output_tokens, self.times, self.stalled_s,
            self.cached_tokens, self.loaded_tokens, self.recomputed_tokens,
        )  # fmt: skip


@dataclass(eq=False)
class ScheduledPrefill:
    """Compute the KV of the prompt's tokens [start, end).

    Attributes:
        handle: the cached prefix. Its payloads are the KV of the first `handle.length` tokens; read them when `first`.
        first: the request's first chunk. last: its last; the answer's first token is computed with it.
        store: token range whose KV the driver puts into `payload` for the cache; None: nothing is stored.
        payload: result; the cache owns it if it takes it.
        tokens: result of a last chunk: the answer's first token, or None if tokens are not reported.
        finished: result: that token ends the answer.
        error: result: ends this request, and only this one, as FAILED.
    """

    request: Request
    handle: CacheHandle
    start: int
    end: int
    first: bool
    last: bool
    store: TokenRange | None
    state: RequestState = field(repr=False)
    payload: KVPayload | None = None
    tokens: Sequence[int] | None = None
    finished: bool = False
    error: BaseException | None = None


@dataclass(eq=False)
class ScheduledDecode:
    """Compute the next tokens of an answer, up to the batch's `steps`.

    Attributes:
        tokens: result: 1 to `steps` tokens; None if tokens are not reported: exactly `steps`, or those that are left.
        payload: result: the KV that `store_span` asks for.
        finished, error: results as in `ScheduledPrefill`.
    """

    request: Request
    state: RequestState = field(repr=False)
    tokens: Sequence[int] | None = None
    payload: KVPayload | None = None
    finished: bool = False
    error: BaseException | None = None

    @property
    def remaining(self) -> int:
        """Tokens until `max_new_tokens`."""
        return self.request.max_new_tokens - self.state.num_output_tokens

    def store_span(self) -> TokenRange | None:
        """Token range whose KV is wanted in `payload` if the request ends now; None: nothing.

        To be called once `tokens` and `finished` are set. Answers whose tokens are not reported cannot be stored.
        """
        state, handle = self.state, self.state.handle
        assert handle is not None, "a decoding request has a handle"
        if self.tokens is None or not state.tokens_known:
            return None
        if not (self.finished or len(self.tokens) >= self.remaining):
            return None
        end = state.storable_end(state.num_output_tokens + len(self.tokens))
        return (handle.length, end) if end > handle.length else None


@dataclass(eq=False)
class ScheduledBatch:
    """One batch: the driver computes it, writes the results into its items, and completes it.

    Attributes:
        number: counts batches from 1.
        steps: tokens of each decode; the driver may lower it, to no less than 1, before completing the batch.
    """

    number: int
    prefills: list[ScheduledPrefill]
    decodes: list[ScheduledDecode]
    steps: int

    @property
    def num_tokens(self) -> int:
        """Tokens computed in it."""
        return sum(item.end - item.start for item in self.prefills) + self.steps * len(self.decodes)


class RequestTimers:
    """Timers of requests: timeouts, and deadlines of their loads. Used under the cache's lock.

    A request has several timers at a time, so they are a plain heap. When one is due, the caller checks whether it
    still applies.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, RequestState]] = []
        self._numbers = count()
        self._ended = 0

    def set(self, time: float, state: RequestState) -> None:
        heapq.heappush(self._heap, (time, next(self._numbers), state))

    def ended(self) -> None:
        """One more request has ended; once most of the heap belongs to ended requests, they are removed."""
        self._ended += 1
        if 2 * self._ended > len(self._heap) + 64:
            self._heap = [each for each in self._heap if each[2].status is not RequestStatus.ENDED]
            heapq.heapify(self._heap)
            self._ended = 0

    def due(self, now: float) -> Iterator[RequestState]:
        """Removes the timers up to `now`, and yields their requests except those that have ended."""
        while self._heap and self._heap[0][0] <= now:
            state = heapq.heappop(self._heap)[2]
            if state.status is not RequestStatus.ENDED:
                yield state

    def next_time(self) -> float | None:
        """The earliest timer of a request that has not ended."""
        while self._heap and self._heap[0][2].status is RequestStatus.ENDED:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None
