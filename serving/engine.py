"""Serves requests with a transformers model: computes the scheduler's batches on KV that lies in the tiered cache.

A step is one forward over the new tokens of all requests, chunks of prompts and the last tokens of answers, as one row
(`eviction/packed.py`). All KV lies in the device pool's pages: a request that joins, leaves or is stored moves page
numbers, never entries.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..eviction import get_policy, policy_text
from ..eviction.packed import PackedCache, PackedTokens, forward
from ..retention.seams import end_tokens
from .errors import BadRequest, Draining, TooLarge
from .events import TokenEvent
from .fingerprint import kv_fingerprint, version_of, weights_of
from .hints.hint import Hint
from .kvcache.base import KVPayload, Tier
from .kvcache.disk_pool import DiskPool
from .kvcache.eviction_policy import AllocStatus
from .kvcache.memory_pool import MemoryPool
from .kvcache.page_pool import PagePool
from .kvcache.paged_sequence import PagedSequence
from .kvcache.radix_tree import read_token_ids
from .kvcache.tiered_cache import CacheHandle
from .packable import check_packable, max_tokens
from .prompt_beginnings import PromptBeginnings
from .prompt_cache import Compression, PromptKV, in_pages
from .request import Request, RequestOutput
from .sampling.params import FinishedBy
from .sampling.row import SamplerRow
from .sampling.sampler import Sampler, TokenLogprobs
from .sampling.stop import StopChecker
from .scheduler.request_state import RequestState, ScheduledBatch, ScheduledDecode, ScheduledPrefill, TokenRange
from .snapshot import SnapshotConfig, SystemSnapshot, take_snapshot
from .system import System

if TYPE_CHECKING:
    from ..eviction import Session

logger = logging.getLogger(__name__)
Scheduled = ScheduledPrefill | ScheduledDecode


@dataclass(eq=False)
class Answering:
    """The engine's part of a request, from its first step to its end.

    Attributes:
        sequence: its pages; None while it waits after a preemption.
        shared: the cached payloads whose pages the sequence is known to use.
        row: its sampling, from its first token on.
        stop: finds its stop texts; None without a tokenizer.
    """

    sequence: PagedSequence | None = None
    shared: list[KVPayload] | None = None
    row: SamplerRow | None = None
    stop: StopChecker | None = None


@dataclass(eq=False)
class StepItem:
    """A request's part of a step.

    Attributes:
        scheduled: what the scheduler asks for, and where its results go.
        sequence: the request's pages.
        ids: its new tokens, int64.
        row: its sampling; None if the token that follows is not needed.
    """

    scheduled: Scheduled
    sequence: PagedSequence
    ids: np.ndarray
    row: SamplerRow | None

    @property
    def request(self) -> Request:
        return self.scheduled.request


class Engine:
    """A transformers model behind the scheduler.

    An answer's tokens are those of the model without any cache, up to the rounding of a prompt computed in chunks and
    of attention computed in parts: reused KV is bit for bit the KV that was computed, wherever it was stored meanwhile.

    With a `compression`, the fixed prompt of every request that names an agent is compressed and stored so; what
    follows it is stored as it is. Plain and compressed prompts, and prompts compressed at different lengths, are never
    mixed: they are kept in different namespaces. What a request had computed of a fixed prompt before it was cancelled
    is kept for the next one, see `PromptBeginnings`.

    One thread calls it; `wake` may be called from any. `EngineClient` is for many threads and for asyncio.

    KV is bound to what made it. Prompts on disk are read back by an engine with the same weights, gates and dtype only;
    a change of weights in place is noticed before the next step, and flushes the cache; after any other (another
    adapter), call `flush`.

    Args:
        session: inside an `evict(model, "full", observe=[...])` block that records what the compression's policy needs.
        system: from `build_system`; its device pool, an empty `MemoryPool`, becomes pages on the model's device. The
            caller closes it.
        compression: of fixed prompts; None: they are stored as they are.
        tokenizer: of transformers; needed for stop texts, and for events with text.
    Attributes:
        pages: of the device pool. snapshot_config: bounds of what `snapshot` lists.
        busy_s: seconds spent on batches so far.
    Raises:
        ValueError: the session evicts by itself, the model or the policy cannot be used (see `check_packable` and
            `PromptKV`), or the system was built for KV of another size.
    """

    def __init__(
        self, session: Session, system: System, compression: Compression | None = None, tokenizer: Any = None
    ) -> None:
        if session.plan.evicts:
            raise ValueError(
                f"got a session under policy {session.plan.policy.name!r}; accepted: evict(model, 'full', observe=…), "
                "as the engine itself decides what is compressed"
            )
        check_packable(session.model)
        self.session, self.system, self.compression = session, system, compression
        self.kv = PromptKV(session, system.tiers.page_size)
        self.busy_s, self.snapshot_config = 0.0, SnapshotConfig()
        if compression is not None:
            session.require_recorded(get_policy(compression.policy))
        self.pages = self._bind()
        system.scheduler.namespaces.own = _client_namespace
        inputs, outputs = session.model.get_input_embeddings(), session.model.get_output_embeddings()
        if not (isinstance(inputs, torch.nn.Embedding) and isinstance(outputs, torch.nn.Linear)):
            raise ValueError(f"got a {type(session.model).__name__}; accepted: models with token embeddings and logits")
        vocab_size, system.scheduler.vocab_size = outputs.out_features, inputs.num_embeddings
        self._max_tokens, self._max_tokens_of = max_tokens(session.model)
        self._sampler = Sampler(vocab_size, sorted(end_tokens(session.model)))
        self._decode = None if tokenizer is None else partial(
            tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )  # fmt: skip
        self._beginnings = PromptBeginnings(system.tiers)
        self._answering: dict[RequestState, Answering] = {}
        self._events: list[TokenEvent] = []
        self._woken = False
        self._weights = weights_of(session)
        self._version = version_of(self._weights)
        self._bind_disk()

    def _bind(self) -> PagePool:
        system, needed = self.system, self.kv.bytes_per_token()
        if system.scheduler.bytes_per_token != needed:
            raise ValueError(
                f"got a system of {system.scheduler.bytes_per_token} bytes per token; accepted: "
                f"PromptKV(session).bytes_per_token(), {needed} for this model"
            )
        pool = system.tiers.pools[Tier.DEVICE]
        if not isinstance(pool, MemoryPool):
            raise ValueError(f"got a {type(pool).__name__} for the device; accepted: a MemoryPool")
        pages = PagePool(self.kv.geometry, pool.capacity, self.session.model.device)
        pool.bind(pages)
        return pages

    def _bind_disk(self) -> None:
        """Prompts that an engine of the same kind has left on disk are found again."""
        disk = self.system.tiers.pools.get(Tier.DISK)
        if isinstance(disk, DiskPool):
            disk.bind(kv_fingerprint(self.session))
            self.system.tiers.restore_disk()

    # Requests -----------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> int:
        """Submits a request; returns its number, see `Scheduler.submit`.

        Raises:
            ValueError: see `Scheduler.submit`. TooLarge: prompt and answer exceed the model's context. BadRequest: its
                sampling asks for what this engine cannot do.
        """
        self._require_length(len(request.prompt) + request.max_new_tokens, "prompt and answer")
        sampling = request.sampling
        if sampling.n != 1:
            raise BadRequest(f"got n={sampling.n} for one request; accepted: a request for each sampling.for_choice(i)")
        if sampling.stop and self._decode is None:
            raise BadRequest("got stop texts for an engine without a tokenizer; accepted: Engine(…, tokenizer=…)")
        try:
            sampling.check_vocab(self._sampler.vocab_size)
        except ValueError as error:
            raise BadRequest(str(error)) from None
        boundary = self._boundary(request)
        namespace = self._namespace(request.namespace, boundary)
        fixed_tokens = boundary or request.fixed_tokens
        return self.system.scheduler.submit(replace(request, namespace=namespace, fixed_tokens=fixed_tokens))

    @property
    def vocab_size(self) -> int:
        """Width of the logits, and so of token masks."""
        return self._sampler.vocab_size

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """The model's end tokens."""
        return self._sampler.eos_token_ids

    def _require_length(self, wanted: int, what: str) -> None:
        if self._max_tokens is not None and wanted > self._max_tokens:
            raise TooLarge(f"got {wanted} tokens of {what}; accepted: {self._max_tokens_of} {self._max_tokens}")

    def cancel(self, number: int) -> None:
        """Ends a request; numbers that are unknown or have ended are ignored."""
        self.system.scheduler.cancel(number)
        self._drop([])

    def hint(self, hint: Hint) -> None:
        """Takes a client's hint; it influences what is cached, never an answer."""
        self.system.scheduler.hint(hint)

    def flush(self) -> None:
        """Discards all cached KV, and ends the requests that have computed some: the weights have changed."""
        self.system.scheduler.drop_admitted("the cache was flushed, as what made its KV has changed")
        self._drop([])
        disk = isinstance(self.system.tiers.pools.get(Tier.DISK), DiskPool)
        self.system.tiers.flush(kv_fingerprint(self.session) if disk else None)
        self._version = version_of(self._weights)

    def snapshot(self) -> SystemSnapshot:
        """The state of the system, see `take_snapshot`."""
        return take_snapshot(self.system, self.snapshot_config)

    def wake(self) -> None:
        """Makes the step that waits, or else the next one, return without waiting; from any thread, at once."""
        self._woken = True
        self.system.tiers.interrupt()

    def take_events(self) -> list[TokenEvent]:
        """The tokens that the last step has added to answers, and the outputs of the requests that ended with it."""
        events, self._events = self._events, []
        return events

    # Fixed prompts before their first request ---------------------------------------------------------------------

    def prepare(self, prompt: Sequence[int]) -> KVPayload:
        """Computes the KV of a fixed prompt's whole pages, compressed as for its requests, outside the pool.

        Raises:
            ValueError: the prompt is shorter than a page, longer than the model's context, or has other tokens than the
                model.
        """
        ids = read_token_ids(prompt)
        tokens = self.system.tiers.whole_pages(len(ids))
        if not tokens:
            page = self.system.tiers.page_size
            raise ValueError(f"got a fixed prompt of {len(ids)} tokens; accepted: a page of {page} at the least")
        self._require_length(tokens, "a fixed prompt")
        self.system.scheduler.require_vocabulary(ids)
        return self.kv.compute(ids[:tokens].tolist(), self.compression)

    def store(self, agent: str, prompt: Sequence[int], payload: KVPayload, namespace: Hashable = None) -> AllocStatus:
        """Stores an agent's fixed prompt before its first request.

        Args:
            payload: `prepare(prompt)`; it is copied.

        Returns:
            READY if the whole prompt is cached now; otherwise why not, see `TieredCache.store`.

        Raises:
            ValueError: the payload is another model's, or not of this prompt's whole pages.
        """
        tiers = self.system.tiers
        if payload.tokens > len(prompt) or payload.tokens % tiers.page_size:
            raise ValueError(
                f"got a payload of {payload.tokens} tokens for a prompt of {len(prompt)}; accepted: `prepare(prompt)`"
            )
        namespace = self._namespace(namespace, payload.tokens if self.compression is not None else 0)
        fixed = list(prompt[: payload.tokens])
        if self.system.prefetcher is not None:
            self.system.prefetcher.register(agent, fixed, namespace)
        try:
            with tiers.open(fixed, namespace) as handle:
                return self._store_rest(handle, agent, fixed, payload)
        finally:
            self._share_stored()

    def _store_rest(self, handle: CacheHandle, agent: str, fixed: Sequence[int], payload: KVPayload) -> AllocStatus:
        """Stores what `handle` does not cover of a fixed prompt, all of which `payload` is."""
        tiers = self.system.tiers
        if handle.length == len(fixed):
            return AllocStatus.READY
        if handle.length and not payload.divisible:
            return AllocStatus.REFUSED
        rest = payload.split(handle.length)[1] if handle.length else payload
        nbytes = tiers.pools[Tier.DEVICE].charge(rest)
        with tiers.lock:
            status = tiers.reserve(nbytes)
            self._share_stored()
            if status is not AllocStatus.READY:
                return status
            try:
                paged = in_pages(self.pages, rest)
            finally:
                tiers.unreserve(nbytes)
            return tiers.store(handle, fixed, paged, agent, len(fixed))

    # Steps --------------------------------------------------------------------------------------------------------

    def step(self, patience_s: float = 0.1) -> list[RequestOutput]:
        """Computes the next batch and returns the requests that have ended.

        Args:
            patience_s: seconds to wait for something to change if there is nothing to compute.
        """
        scheduler, self._events = self.system.scheduler, []
        if self._version != version_of(self._weights):
            logger.warning("the weights have changed: the cache is flushed")
            self.flush()
        self._drop([])
        batch = scheduler.next_batch()
        self._share_stored()
        if batch is None:
            finished = self._take_finished()
            if not finished and not self._woken:
                scheduler.wait(patience_s)
            self._woken = False
            return finished
        self._woken = False
        begun = time.perf_counter()
        try:
            self._drop(batch.preempted)
            self._compute(batch)
        except BaseException as error:
            scheduler.complete(batch, error=error)
            raise
        finally:
            self.busy_s += time.perf_counter() - begun
        try:
            scheduler.complete(batch)
        except Draining:  # another thread has closed the scheduler, which ended the requests of the batch
            return self._take_finished()
        self._share_stored()
        return self._take_finished()

    def run(self) -> Iterator[RequestOutput]:
        """Steps until all requests have ended, yielding each output; requests may be submitted meanwhile."""
        while len(self.system.scheduler):
            yield from self.step()
        yield from self._take_finished()

    def _take_finished(self) -> list[RequestOutput]:
        self._drop([])
        finished = self.system.scheduler.take_finished()
        self._events += [TokenEvent(each.number, [], finished=each) for each in finished]
        return finished

    def _drop(self, preempted: Sequence[RequestState]) -> None:
        """Gives up the pages of requests that have ended or were preempted: the scheduler has freed their bytes."""
        for state in preempted:
            self._set_sequence(state, None)
        for state in [state for state in self._answering if state.ended]:
            sequence, boundary = self._answering[state].sequence, self._boundary(state.request)
            if sequence is not None and sequence.ragged is None and 0 < sequence.tokens < boundary:
                self._beginnings.keep(state.request.prompt[:boundary], _own_namespace(state.request), sequence)
            self._set_sequence(state, None)
            del self._answering[state]

    def _set_sequence(self, state: RequestState, sequence: PagedSequence | None) -> None:
        answering = self._answering.get(state)
        if answering is not None:
            if answering.sequence is not None:
                answering.sequence.release()
            answering.sequence, answering.shared = sequence, None

    def _share_stored(self) -> None:
        """Makes the requests' sequences use the pages that the cache has for what their handles cover.

        They are others where another request has stored the same tokens, also while a copy of these was in transfer
        and could not be split: the cache keeps one of the two, and the pages of the other are counted nowhere. Called
        whenever the cache may have seen a transfer end, before pages are allocated.
        """
        with self.system.tiers.lock:  # another thread may end them
            for state, answering in self._answering.items():
                sequence, handle = answering.sequence, state.handle
                if sequence is None or handle is None or not sequence.start <= handle.length <= sequence.end:
                    continue
                payloads = handle.payloads()
                if payloads != answering.shared:
                    sequence.share_stored(payloads)
                    answering.shared = payloads

    @torch.no_grad()
    def _compute(self, batch: ScheduledBatch) -> None:
        items = [item for one in (*batch.decodes, *batch.prefills) if (item := self._begin(one)) is not None]
        sampled = self._forward(items)
        for item in items:
            if isinstance(item.scheduled, ScheduledPrefill) and item.scheduled.error is None:
                self._guard(item.scheduled, partial(self._offer_prompt, item))
        for group, logits in sampled:
            self._sample(group, logits)

    def _guard(self, scheduled: Scheduled, call: Callable[[], object]) -> None:
        """Runs `call`; an exception ends this item's request only."""
        try:
            call()
        except Exception as error:
            self._fail(scheduled, error)

    @staticmethod
    def _fail(scheduled: Scheduled, error: Exception) -> None:
        logger.warning("request %r failed: %r", scheduled.request.id, error, exc_info=error)
        # Its traceback would keep this step's tensors and pages alive for as long as the error is.
        scheduled.error, scheduled.payload = error.with_traceback(None), None

    def _begin(self, scheduled: Scheduled) -> StepItem | None:
        """The item of a request, with pages for its new tokens; None if it has failed."""
        made: list[StepItem] = []
        self._guard(scheduled, lambda: made.append(self._new_item(scheduled)))
        return made[0] if made else None

    def _new_item(self, scheduled: Scheduled) -> StepItem:
        state = scheduled.state
        answering = self._answering.setdefault(state, Answering())
        if isinstance(scheduled, ScheduledDecode):
            start, end, wanted = state.num_computed_tokens, state.num_computed_tokens + 1, True
        else:
            start, end, wanted = scheduled.start, scheduled.end, scheduled.last
            if scheduled.first:
                self._set_sequence(state, self._cached(scheduled))
        sequence = answering.sequence
        assert sequence is not None and sequence.end >= start, "what has been computed is on the device"
        if isinstance(scheduled, ScheduledPrefill):
            scheduled.reused = sequence.end - start
        start = min(sequence.end, end)
        sequence.reserve(end)
        if wanted and answering.row is None:
            self._begin_answer(scheduled.request, answering)
        ids = state.token_ids(start, end).astype(np.int64)
        return StepItem(scheduled, sequence, ids, answering.row if wanted else None)

    def _cached(self, scheduled: ScheduledPrefill) -> PagedSequence:
        """A sequence with what is cached of the request's prompt."""
        boundary, request = self._boundary(scheduled.request), scheduled.request
        if scheduled.start < boundary:
            # Its last page is computed in any case: the prompt is compressed with the chunk that completes it.
            known = request.prompt[: boundary - self.system.tiers.page_size]
            return self._beginnings.begin(self.pages, known, _own_namespace(request))
        return PagedSequence(self.pages, scheduled.handle.payloads())

    def _begin_answer(self, request: Request, answering: Answering) -> None:
        sampling = request.sampling
        answering.row = self._sampler.new_row(sampling, request.prompt)
        if self._decode is not None:
            context = [int(token) for token in request.prompt[-4:]]
            answering.stop = StopChecker(self._decode, sampling.stop, sampling.min_new_tokens, context)

    def _forward(self, items: list[StepItem]) -> list[tuple[list[StepItem], torch.Tensor]]:
        """The items whose next token is wanted, and logits `(items, vocab)`; if that fails, each is tried alone.

        Items without tokens are left out: all of theirs were computed before.
        """
        items = [item for item in items if len(item.ids)]
        if not items:
            return []
        gated = [i for i, item in enumerate(items) if self._to_compress(item)]
        wanted = [i for i, item in enumerate(items) if item.row is not None]
        try:
            tokens = [PackedTokens(item.sequence, item.ids) for item in items]
            cache = PackedCache(self.pages.buffers, self.kv.geometry.layers, tokens, gated)
            logits = forward(self.session.model, cache, wanted)
        except Exception as error:
            if len(items) == 1:
                self._fail(items[0].scheduled, error)
                return []
            logger.warning("a forward of %d requests failed, each is tried alone: %r", len(items), error)
            return [group for item in items for group in self._forward([item])]
        return [([items[i] for i in wanted], logits)] if wanted else []

    def _to_compress(self, item: StepItem) -> bool:
        """Whether the item's tokens are part of a fixed prompt that will be compressed."""
        return isinstance(item.scheduled, ScheduledPrefill) and item.scheduled.start < self._boundary(item.request)

    def _offer_prompt(self, item: StepItem) -> None:
        """Compresses a fixed prompt that is complete, and offers the whole pages of a chunk to the cache.

        A failure to store ends nothing: a cache may forget.
        """
        scheduled = item.scheduled
        assert isinstance(scheduled, ScheduledPrefill)
        boundary = self._boundary(item.request)
        if scheduled.start < boundary:
            if scheduled.end == boundary:
                assert self.compression is not None
                payload = self.kv.compress_pages(item.sequence, self.compression)
                self._set_sequence(scheduled.state, PagedSequence(self.pages, [payload]))
                scheduled.payload = payload if scheduled.store is not None else None
        elif scheduled.store is not None:
            scheduled.payload = self._span(item, scheduled.store)

    @staticmethod
    def _span(item: StepItem, span: TokenRange) -> KVPayload | None:
        """The KV of a token range; None if it begins with a compressed prompt, which the cache did not take."""
        return item.sequence.span(*span) if span[0] >= item.sequence.start else None

    def _sample(self, items: list[StepItem], logits: torch.Tensor) -> None:
        live = [i for i, item in enumerate(items) if item.scheduled.error is None]
        if len(live) < len(items):
            items, logits = [items[i] for i in live], logits[live]
        if not items:
            return
        try:
            sampled = self._sampler.sample(logits, [item.row for item in items if item.row is not None])
        except Exception as error:  # rows that have got a token cannot be told from those that have not
            for item in items:
                self._fail(item.scheduled, error)
            return
        for i, item in enumerate(items):
            error = sampled.errors[i]
            if error is not None:
                self._fail(item.scheduled, error)
            else:
                found = sampled.tokens[i], sampled.finished[i], sampled.logprobs[i]
                self._guard(item.scheduled, partial(self._append, item, *found))

    def _append(self, item: StepItem, token: int, finished: FinishedBy | None, logprobs: TokenLogprobs | None) -> None:
        """The answer continues with `token`; its KV is offered to the cache where a page has filled, or at its end."""
        scheduled, state, text = item.scheduled, item.scheduled.state, None
        stop = self._answering[state].stop
        scheduled.tokens = [token]
        if stop is not None:
            ends = finished is not None or len(state.output_tokens) + 1 >= item.request.max_new_tokens
            delta = stop.push(token)
            text = delta.text
            if delta.stopped_by is not None:
                finished = finished or FinishedBy.STOP_TEXT
            elif ends:
                text += stop.finish().text
        scheduled.finished = finished is not None
        state.finished_by = finished
        if isinstance(scheduled, ScheduledDecode):
            span = scheduled.store_span()
            if span is not None:
                scheduled.payload = self._span(item, span)
        self._events.append(TokenEvent(state.number, [token], None if logprobs is None else [logprobs], None, text))

    def _namespace(self, namespace: Hashable, boundary: int) -> tuple[Hashable, ...]:
        """Separates plain prompts, and fixed ones by how, and up to which token, they were compressed.

        All of them are marked, so that no client can name the namespace of another kind; [1] is the request's.
        """
        how = self.compression
        if how is None or not boundary:
            return "plain", namespace
        policy, size = policy_text(get_policy(how.policy)), self.pages.geometry.page_size
        return "compressed", namespace, policy, str(how.budget), how.scope, how.sinks, how.recent, size, boundary

    def _boundary(self, request: Request) -> int:
        """Length of the compressed part of the prompt in tokens; 0 if nothing is compressed."""
        if self.compression is None or request.agent is None:
            return 0
        return self.system.tiers.whole_pages(min(request.fixed_tokens, len(request.prompt) - 1))


def _own_namespace(request: Request) -> Hashable:
    """The namespace of a request as its client gave it; the engine has put it into one of its own."""
    return _client_namespace(request.namespace)


def _client_namespace(namespace: Hashable) -> Hashable:
    """The client's part of a namespace that `Engine._namespace` has made."""
    assert isinstance(namespace, tuple), "submit has done so"
    return namespace[1]
