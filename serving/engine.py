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
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..eviction import get_policy, policy_text
from ..eviction.packed import PackedCache, PackedTokens, forward
from ..retention.seams import end_tokens
from .kvcache.base import KVPayload, Tier
from .kvcache.eviction_policy import AllocStatus
from .kvcache.memory_pool import MemoryPool
from .kvcache.page_pool import PagePool
from .kvcache.paged_sequence import PagedSequence
from .prompt_cache import Compression, PromptKV, in_pages
from .request import Request, RequestOutput
from .scheduler.request_state import RequestState, ScheduledBatch, ScheduledDecode, ScheduledPrefill
from .system import System

if TYPE_CHECKING:
    from ..eviction import Session

logger = logging.getLogger(__name__)
Sampler = Callable[[Request, torch.Tensor], int]
Scheduled = ScheduledPrefill | ScheduledDecode


def greedy(request: Request, logits: torch.Tensor) -> int:
    """The most likely token of `logits`, `(vocab,)`."""
    return int(logits.argmax())


@dataclass(eq=False)
class StepItem:
    """A request's part of a step.

    Attributes:
        scheduled: what the scheduler asks for, and where its results go.
        sequence: the request's pages.
        ids: its new tokens, int64.
        wanted: the token that follows them is needed.
    """

    scheduled: Scheduled
    sequence: PagedSequence
    ids: np.ndarray
    wanted: bool

    @property
    def request(self) -> Request:
        return self.scheduled.request


class Engine:
    """A transformers model behind the scheduler.

    An answer's tokens are those of the model without any cache, up to the rounding of a prompt computed in chunks and of
    attention computed in parts: reused KV is bit for bit the KV that was computed, wherever it has been stored meanwhile.

    With a `compression`, the fixed prompt of every request that names an agent is compressed and stored so; what follows
    it is stored as it is. Plain and compressed prompts, and prompts compressed at different lengths, are never mixed:
    they are kept in different namespaces.

    `submit` may be called from any thread; `step` and `run` from one thread only. `prepare` and `store` run the model
    or copy into the cache, and belong to the same thread.

    Args:
        session: inside an `evict(model, "full", observe=[...])` block that records what the compression's policy needs.
        system: from `build_system`; its device pool, an empty `MemoryPool`, becomes pages on the model's device. The
            caller closes it.
        compression: of fixed prompts; None: they are stored as they are.
        sampler: picks the next token of a request from its logits `(vocab,)`.
    Attributes:
        pages: of the device pool.
        busy_s: seconds spent on batches so far.
    Raises:
        ValueError: the session evicts by itself, the model or the policy cannot be used (see `PromptKV`), or the system
            was built for KV of another size.
    """

    def __init__(
        self, session: Session, system: System, compression: Compression | None = None, sampler: Sampler = greedy
    ) -> None:
        if session.plan.evicts:
            raise ValueError(
                f"got a session under policy {session.plan.policy.name!r}; accepted: evict(model, 'full', observe=…), "
                "as the engine itself decides what is compressed"
            )
        self.session, self.system, self.compression, self.sampler = session, system, compression, sampler
        self.kv = PromptKV(session, system.tiers.page_size)
        self.busy_s = 0.0
        if compression is not None:
            session.require_recorded(get_policy(compression.policy))
        self.pages = self._bind()
        system.scheduler.vocab_size = session.model.get_input_embeddings().num_embeddings
        self._ends = end_tokens(session.model)
        self._sequences: dict[RequestState, PagedSequence] = {}

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

    def submit(self, request: Request) -> int:
        """Submits a request; returns its number, see `Scheduler.submit`.

        Raises:
            ValueError: see `Scheduler.submit`; prompt and answer exceed the model's context.
        """
        limit = getattr(self.session.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        wanted = len(request.prompt) + request.max_new_tokens
        if limit is not None and wanted > limit:
            raise ValueError(f"got {wanted} tokens of prompt and answer; accepted: the model's {limit}")
        boundary = self._boundary(request)
        if boundary:
            namespace = self._namespace(request.namespace, boundary)
            request = replace(request, namespace=namespace, fixed_tokens=boundary)
        return self.system.scheduler.submit(request)

    # Fixed prompts before their first request ---------------------------------------------------------------------

    def prepare(self, prompt: Sequence[int]) -> KVPayload:
        """Computes the KV of a fixed prompt's whole pages, compressed as for its requests, outside the pool.

        Raises:
            ValueError: the prompt is shorter than a page.
        """
        tokens = self.system.tiers.whole_pages(len(prompt))
        if not tokens:
            page = self.system.tiers.page_size
            raise ValueError(f"got a fixed prompt of {len(prompt)} tokens; accepted: a page of {page} at the least")
        return self.kv.compute(prompt[:tokens], self.compression)

    def store(self, agent: str, prompt: Sequence[int], payload: KVPayload, namespace: Hashable = None) -> AllocStatus:
        """Stores an agent's fixed prompt before its first request.

        Args:
            payload: `prepare(prompt)`; it is copied.

        Returns:
            READY if the whole prompt is cached now; otherwise why not, see `TieredCache.store`.
        """
        tiers = self.system.tiers
        if self.compression is not None:
            namespace = self._namespace(namespace, payload.tokens)
        fixed = list(prompt[: payload.tokens])
        if self.system.prefetcher is not None:
            self.system.prefetcher.register(agent, fixed, namespace)
        with tiers.open(fixed, namespace) as handle:
            if handle.length == len(fixed):
                return AllocStatus.READY
            if handle.length and not payload.divisible:
                return AllocStatus.REFUSED
            rest = payload.split(handle.length)[1] if handle.length else payload
            nbytes = tiers.pools[Tier.DEVICE].charge(rest)
            with tiers.lock:
                status = tiers.reserve(nbytes)
                if status is not AllocStatus.READY:
                    return status
                paged = in_pages(self.pages, rest)
                tiers.unreserve(nbytes)
                return tiers.store(handle, fixed, paged, agent, len(fixed))

    # Steps --------------------------------------------------------------------------------------------------------

    def step(self, patience_s: float = 0.1) -> list[RequestOutput]:
        """Computes the next batch and returns the requests that have ended.

        Args:
            patience_s: seconds to wait for something to change if there is nothing to compute.
        """
        scheduler = self.system.scheduler
        batch = scheduler.next_batch()
        if batch is None:
            finished = self._take_finished()
            if not finished:
                scheduler.wait(patience_s)
            return finished
        begun = time.perf_counter()
        try:
            self._drop(batch.preempted)
            self._compute(batch)
        except BaseException as error:
            scheduler.complete(batch, error=error)
            raise
        finally:
            self.busy_s += time.perf_counter() - begun
        offered = [each.state for each in (*batch.prefills, *batch.decodes) if each.payload is not None]
        scheduler.complete(batch)
        for state in offered:
            if state.handle is not None:
                self._sequences[state].share_stored(state.handle.payloads())
        return self._take_finished()

    def run(self) -> Iterator[RequestOutput]:
        """Steps until all requests have ended, yielding each output; requests may be submitted meanwhile."""
        while len(self.system.scheduler):
            yield from self.step()
        yield from self._take_finished()

    def _take_finished(self) -> list[RequestOutput]:
        self._drop([])
        return self.system.scheduler.take_finished()

    def _drop(self, preempted: Sequence[RequestState]) -> None:
        """Gives up the pages of requests that have ended or were preempted: the scheduler has freed their bytes."""
        for state in [state for state in self._sequences if state.ended or state in preempted]:
            self._sequences.pop(state).release()

    @torch.no_grad()
    def _compute(self, batch: ScheduledBatch) -> None:
        items = [item for one in (*batch.decodes, *batch.prefills) if (item := self._begin(one)) is not None]
        logits = self._forward(items)
        for item in items:
            if item.scheduled.error is None:
                self._guard(item.scheduled, lambda item=item: self._finish(item, logits.get(item)))

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
        if isinstance(scheduled, ScheduledDecode):
            sequence, wanted = self._sequences[state], True
            ids = state.token_ids(state.num_computed_tokens, state.num_computed_tokens + 1)
        else:
            if scheduled.first:
                self._sequences[state] = PagedSequence(self.pages, scheduled.handle.payloads())
            sequence, wanted = self._sequences[state], scheduled.last
            ids = state.token_ids(scheduled.start, scheduled.end)
        sequence.reserve(sequence.end + len(ids))
        return StepItem(scheduled, sequence, ids.astype(np.int64), wanted)

    def _forward(self, items: list[StepItem]) -> dict[StepItem, torch.Tensor]:
        """Logits `(vocab,)` of the items whose next token is wanted; if the forward fails, each is tried alone."""
        if not items:
            return {}
        gated = [i for i, item in enumerate(items) if self._to_compress(item)]
        wanted = [i for i, item in enumerate(items) if item.wanted]
        tokens = [PackedTokens(item.sequence, item.ids) for item in items]
        cache = PackedCache(self.pages.buffers, self.kv.geometry.layers, tokens, gated)
        try:
            logits = forward(self.session, cache, wanted)
        except Exception as error:
            if len(items) == 1:
                self._fail(items[0].scheduled, error)
                return {}
            logger.warning("a forward of %d requests failed, each is tried alone: %r", len(items), error)
            return {item: row for one in items for item, row in self._forward([one]).items()}
        return {items[i]: row for i, row in zip(wanted, logits, strict=True)}

    def _to_compress(self, item: StepItem) -> bool:
        """Whether the item's tokens are part of a fixed prompt that will be compressed."""
        return isinstance(item.scheduled, ScheduledPrefill) and item.scheduled.start < self._boundary(item.request)

    def _finish(self, item: StepItem, logits: torch.Tensor | None) -> None:
        scheduled, state = item.scheduled, item.scheduled.state
        if isinstance(scheduled, ScheduledPrefill):
            span, boundary = scheduled.store, self._boundary(item.request)
            if scheduled.start < boundary:
                if scheduled.end == boundary:
                    assert self.compression is not None
                    payload = self.kv.compress_pages(item.sequence, self.compression)
                    self._sequences[state] = PagedSequence(self.pages, [payload])
                    scheduled.payload = payload if span is not None else None
                span = None
            if span is not None:
                scheduled.payload = item.sequence.span(*span)
        if logits is None:
            return
        token = self.sampler(item.request, logits)
        scheduled.tokens, scheduled.finished = [token], token in self._ends
        if isinstance(scheduled, ScheduledDecode):
            span = scheduled.store_span()
            if span is not None:
                scheduled.payload = item.sequence.span(*span)

    def _namespace(self, namespace: Hashable, boundary: int) -> Hashable:
        """Separates fixed prompts by how, and up to which token, they were compressed."""
        how = self.compression
        assert how is not None
        policy = policy_text(get_policy(how.policy))
        return namespace, policy, str(how.budget), how.scope, how.sinks, how.recent, boundary

    def _boundary(self, request: Request) -> int:
        """Length of the compressed part of the prompt in tokens; 0 if nothing is compressed."""
        if self.compression is None or request.agent is None:
            return 0
        return self.system.tiers.whole_pages(min(request.fixed_tokens, len(request.prompt) - 1))
