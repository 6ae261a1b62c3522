"""The scheduler's state of a request, the batches it hands out, and the timers of its requests."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import count

import numpy as np

from ..cache_report import AdmittedPrompt, CacheReport
from ..kvcache.base import KVPayload
from ..kvcache.radix_tree import TOKEN, TOKEN_BYTES, Pages, read_token_ids
from ..kvcache.tiered_cache import CacheHandle
from ..request import FinishReason, Request, RequestOutput, RequestTimes, StorePolicy
from ..sampling.params import FinishedBy

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
        number: identifies the request; the client's `request.id` is only a label.
        encoded: the prompt, then the answer as far as its tokens are known: little-endian int32 ids, see `encode`.
        lookup_key: whole pages to look up: of all known tokens but the last, which is always computed.
        num_prompt_tokens: length of the prompt. num_fixed_tokens: of these, the agent's fixed prompt in whole pages.
        prefill_end: tokens to compute before the next token of the answer: the prompt's, or after a preemption the
            prompt's and those of the answer so far.
        bytes_per_token: KV of a computed token.
        handle: holds the cached prefix; None while waiting.
        num_computed_tokens: tokens of prompt and answer whose KV is on the device, cached or computed.
        num_prefilled_tokens: tokens computed in prefills for this request.
        reserved_bytes: bytes reserved in the device pool: for the KV computed beyond what `handle` covers, and for what
            is still to be computed.
        charged_tokens: weighted tokens charged to its client and workflow in the fair queue.
        load_failures: failed loads. force_recompute: nothing is loaded any more; what is not on the device is computed.
        agent: the agent whose call it counts as; None if the request names another client's agent.
        arrival_order: its place among requests of equal age and priority; kept when it is queued again.
        looked_up: its prompt has been looked up before. in_workflow: the step graph counts it as a call.
        announced: the predictor knows it as waiting.
        deferred: it needs a load while the limit of concurrent loads is reached.
        refused_since: when it first found no memory. load_started, load_deadline: of its current loads, in seconds.
        num_preemptions: how often its memory was given to others. preemptible: not since it got its last token.
        progressed_at: when it was admitted, or its last chunk was computed, in seconds.
        waits_for_pages: it may wait for pages that another request computes; False once it has done so in vain.
        computing: a chunk has been computed since it was admitted.
        in_batch: part of the batch in flight. pending_outcome: how it ends once that batch is complete.
        offered_end: end of the token range of the answer that was last to be stored.
        finished_by: how the answer ended by itself, as the driver found.
        output_tokens: the answer as far as its tokens were reported; tokens_known: all of them were.
        admitted_prompt: what was known of its prompt's KV at its first admission, if the request asks for it.
        followed_since: when it began to wait for pages of another request, in seconds. shared_s: of such waits so far.
    """

    request: Request
    number: int
    encoded: bytearray
    lookup_key: Pages
    num_prompt_tokens: int
    num_fixed_tokens: int
    prefill_end: int
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
    num_preemptions: int = 0
    preemptible: bool = True
    progressed_at: float = 0.0
    waits_for_pages: bool = True
    computing: bool = False
    in_batch: bool = False
    pending_outcome: tuple[FinishReason, str | None] | None = None
    offered_end: int = 0
    output_tokens: list[int] = field(default_factory=list)
    tokens_known: bool = True
    num_output_tokens: int = 0
    finished_by: FinishedBy | None = None
    stalled_s: float = 0.0
    cached_tokens: int = 0
    loaded_tokens: int = 0
    recomputed_tokens: int = 0
    admitted_prompt: AdmittedPrompt | None = None
    followed_since: float = 0.0
    shared_s: float = 0.0

    @classmethod
    def create(cls, request: Request, number: int, page_size: int, bytes_per_token: int, now: float) -> RequestState:
        """The state of a request that arrives at `now`."""
        size, fixed = len(request.prompt), min(request.fixed_tokens, len(request.prompt))
        state = cls(
            request, number, bytearray(np.asarray(request.prompt, TOKEN).tobytes()), Pages(), size,
            num_fixed_tokens=fixed - fixed % page_size, prefill_end=size,
            bytes_per_token=request.bytes_per_token or bytes_per_token, page_size=page_size, times=RequestTimes(now),
        )  # fmt: skip
        state.requeue()
        return state

    def requeue(self) -> None:
        """Everything that is known, prompt and answer so far, is to be looked up and computed anew."""
        self.prefill_end = self.num_prompt_tokens + self.num_output_tokens
        known = min(self.num_known_tokens, self.prefill_end - 1)
        self.lookup_key = self.pages(known - known % self.page_size)
        self.num_computed_tokens = self.offered_end = 0
        self.computing = False

    @property
    def account(self) -> tuple[str, str]:
        """The client and the workflow (or session) that its tokens are charged to."""
        return self.request.client, self.request.workflow or self.request.session or ""

    @property
    def num_known_tokens(self) -> int:
        """Tokens of the prompt, and of the answer up to the first one that was not reported."""
        return len(self.encoded) // TOKEN_BYTES

    @property
    def ended(self) -> bool:
        return self.status is RequestStatus.ENDED

    @property
    def page_bytes(self) -> int:
        """Bytes of a page of its KV."""
        return self.page_size * self.bytes_per_token

    @property
    def num_remaining_tokens(self) -> int:
        """Tokens of the answer until `max_new_tokens`."""
        return self.request.max_new_tokens - self.num_output_tokens

    @property
    def whole_pages(self) -> Pages:
        """The whole pages of the prompt."""
        return self.pages(self.num_prompt_tokens - self.num_prompt_tokens % self.page_size)

    def pages(self, end: int) -> Pages:
        """The first `end` tokens of prompt and answer, whole pages."""
        return Pages(memoryview(self.encoded)[: end * TOKEN_BYTES])

    def token_ids(self, start: int, end: int) -> np.ndarray:
        """The tokens [start, end) of prompt and answer: a copy, int32 `(end - start,)`."""
        return np.frombuffer(self.encoded[start * TOKEN_BYTES : end * TOKEN_BYTES], TOKEN)

    def append(self, tokens: Sequence[int] | None, steps: int) -> int:
        """Appends tokens to the answer, up to `max_new_tokens`; returns how many.

        Args:
            tokens: None: `steps` tokens that are not reported.
        """
        if tokens is None:
            self.tokens_known, self.preemptible = False, True
            self.num_output_tokens += (new := min(steps, self.num_remaining_tokens))
            return new
        self.preemptible = True
        given = [int(token) for token in list(tokens)[: self.num_remaining_tokens]]
        if self.tokens_known:
            self.encoded += read_token_ids(given).tobytes()
        self.output_tokens += given
        self.num_output_tokens += len(given)
        return len(given)

    def storable_end(self, end: int) -> int:
        """The end of the token range to store once the tokens up to `end` have KV, in whole pages.

        Tokens that were not reported are not stored; with `StorePolicy.DISCARD`, only the fixed prompt is.
        """
        if self.request.store_policy is StorePolicy.DISCARD:
            end = min(end, self.num_fixed_tokens)
        return end - end % self.page_size

    def output(self, finish_reason: FinishReason, error: str | None) -> RequestOutput:
        return RequestOutput(
            self.request, self.number, finish_reason, error, self.output_tokens, self.num_output_tokens, self.times,
            self.stalled_s, self.cached_tokens, self.loaded_tokens, self.recomputed_tokens, self.num_preemptions,
            self.finished_by, self._cache_report(),
        )  # fmt: skip

    def _cache_report(self) -> CacheReport | None:
        if self.admitted_prompt is None or self.times.admitted is None:
            return None
        queued_s = max(0.0, self.times.admitted - self.times.arrived - self.stalled_s - self.shared_s)
        return self.admitted_prompt.report(
            self.num_prompt_tokens, self.cached_tokens, queued_s, self.stalled_s, self.shared_s
        )


@dataclass(eq=False)
class ScheduledPrefill:
    """Compute the KV of the tokens [start, end) of the prompt; after a preemption, of the prompt and the answer so far.

    Attributes:
        handle: the cached prefix. Its payloads are the KV of the first `handle.length` tokens; read them when `first`.
        first: the request's first chunk since it was admitted: whatever the driver had of it before is gone.
        last: the last chunk; the answer's next token is computed with it.
        store: token range whose KV, whole pages, the driver puts into `payload` for the cache; None: nothing is stored.
        payload: result; the cache owns it if it takes it. None: not this time; a later chunk asks for more.
        reused: result: the driver had the KV of so many tokens from `start` on, and did not compute them. They may
            reach beyond `end`, except in a last chunk; the next one begins behind them.
        tokens: result of a last chunk: the answer's next token, or None if tokens are not reported.
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
    reused: int = 0
    tokens: Sequence[int] | None = None
    finished: bool = False
    error: BaseException | None = None

    @property
    def token_ids(self) -> np.ndarray:
        """The tokens to compute: a copy, int32 `(end - start,)`."""
        return self.state.token_ids(self.start, self.end)


@dataclass(eq=False)
class ScheduledDecode:
    """Compute the next tokens of an answer, up to the batch's `steps`; the input is the answer's last token.

    Attributes:
        tokens: result: 1 to `steps` tokens; None if tokens are not reported: exactly `steps`, or those that are left.
        payload: result: the KV that `store_span` asks for; None: not this time.
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
        return self.state.num_remaining_tokens

    def store_span(self) -> TokenRange | None:
        """Token range whose KV is wanted in `payload`: whenever a page has been filled; None: nothing.

        Nothing is wanted of a request that another thread has ended meanwhile, by closing the scheduler.

        To be called once `tokens` is set. Answers whose tokens are not reported are not stored. The answer's last token
        is excluded: it has not been an input, so it has no KV.
        """
        state, handle = self.state, self.state.handle
        if handle is None or self.tokens is None or not state.tokens_known:
            return None
        new = min(len(self.tokens), self.remaining)
        end = state.storable_end(state.num_prompt_tokens + state.num_output_tokens + new - 1)
        return (handle.length, end) if end > max(handle.length, state.offered_end) else None


@dataclass(eq=False)
class ScheduledBatch:
    """One batch: the driver computes it, writes the results into its items, and completes it.

    Attributes:
        number: counts batches from 1.
        steps: tokens of each decode; the driver may lower it, to no less than 1, before completing the batch.
        preempted: requests that have lost their memory to others since the last batch: before anything else, the driver
            drops all it holds of them. They wait again and continue later, with a prefill that is `first`. A batch may
            consist of these alone.
    """

    number: int
    prefills: list[ScheduledPrefill]
    decodes: list[ScheduledDecode]
    steps: int
    preempted: list[RequestState] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens computed in it; with one step, at most `max_num_batched_tokens`."""
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
