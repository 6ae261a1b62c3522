"""The running requests, and the formation of batches from them.

Every decoding request gets its token first; prefills share the rest of the budget in the order of admission. The KV
that a driver hands back is stored in the cache, in memory that was reserved for it.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator

from ..kvcache.base import KVPayload
from ..kvcache.eviction_history import MissReason
from ..kvcache.eviction_policy import AllocStatus
from ..kvcache.tiered_cache import CacheHandle, TieredCache
from ..metrics import SchedulerMetrics
from ..request import StorePolicy
from .request_memory import RequestMemory
from .request_state import RequestState, RequestStatus, ScheduledBatch, ScheduledDecode, ScheduledPrefill, TokenRange
from .scheduler_config import SchedulerConfig

logger = logging.getLogger(__name__)


class RunningRequests:
    """Requests that are being prefilled or decoded, at most `max_num_seqs`. Used under the cache's lock.

    Attributes:
        prefilling: in the order of admission. decoding: with the item that is scheduled for each in every batch.
    """

    def __init__(
        self, tiers: TieredCache, config: SchedulerConfig, metrics: SchedulerMetrics, memory: RequestMemory
    ) -> None:
        self.tiers, self.config, self.metrics, self.memory = tiers, config, metrics, memory
        self.prefilling: dict[RequestState, None] = {}
        self.decoding: dict[RequestState, ScheduledDecode] = {}

    def __len__(self) -> int:
        return len(self.prefilling) + len(self.decoding)

    def __iter__(self) -> Iterator[RequestState]:
        yield from self.prefilling
        yield from self.decoding

    def add(self, state: RequestState, now: float) -> None:
        """Starts a request whose memory is reserved and whose cached prefix is on the device."""
        handle = state.handle
        assert handle is not None, "a running request has a handle"
        state.status, state.num_computed_tokens = RequestStatus.PREFILL, handle.length
        state.times.admitted = now if state.times.admitted is None else state.times.admitted
        self.prefilling[state] = None
        fixed = state.num_fixed_tokens
        if state.agent is not None and 0 < fixed <= handle.length and not self._is_tagged(state, handle):
            self.tiers.store(handle, state.pages(handle.length), None, state.agent, fixed)

    def _is_tagged(self, state: RequestState, handle: CacheHandle) -> bool:
        """Whether the tree already knows where the agent's fixed prompt ends."""
        end = self.tiers.lookup_agent(state.agent)
        return end is not None and end.end == state.num_fixed_tokens and any(node is end for node in handle.node.path())

    def remove(self, state: RequestState) -> None:
        self.prefilling.pop(state, None)
        self.decoding.pop(state, None)

    def schedule(
        self, number: int, max_steps: int, stalled: Collection[RequestState], preempted: list[RequestState]
    ) -> ScheduledBatch | None:
        """Forms batch `number`; None if there is nothing to do. Without prefills, decodes get up to `max_steps` tokens.

        Args:
            stalled: decoding requests that skip this batch. preempted: requests whose memory the driver drops.
        """
        decodes = [item for state, item in self.decoding.items() if state not in stalled]
        budget, config = self.config.max_num_batched_tokens - len(decodes), self.config
        if decodes and config.max_prefill_tokens_per_step is not None:
            budget = min(budget, config.max_prefill_tokens_per_step)
        prefills = []
        for state in self.prefilling:
            if budget <= 0:
                break
            item = self._chunk(state, budget)
            budget -= item.end - item.start
            prefills.append(item)
        if not (prefills or decodes or preempted):
            return None
        steps = 1
        if max_steps > 1 and decodes and not prefills:
            each = (min(item.remaining, self.memory.available_steps(item.state)) for item in decodes)
            steps = min(max_steps, min(each))
        for item in (*prefills, *decodes):
            item.state.in_batch = True
        return ScheduledBatch(number, prefills, decodes, steps, preempted)

    def _chunk(self, state: RequestState, budget: int) -> ScheduledPrefill:
        """The next chunk of a prompt. It ends at the fixed prompt's end, so that this part is stored by itself."""
        handle, start, fixed = state.handle, state.num_computed_tokens, state.num_fixed_tokens
        assert handle is not None, "a running request has a handle"
        boundary = fixed if start < fixed else state.prefill_end
        end = min(boundary, start + min(budget, self.config.prefill_chunk_size or budget))
        upto = state.storable_end(min(end, state.num_known_tokens))
        store = (handle.length, upto) if upto > handle.length else None
        last = end == state.prefill_end
        return ScheduledPrefill(state.request, handle, start, end, not state.computing, last, store, state)

    def complete_prefill(self, item: ScheduledPrefill, now: float) -> bool:
        """Takes the results of a chunk; True if the request's answer ends with it."""
        state, end = item.state, max(item.end, item.start + item.reused)
        new = end - item.start - item.reused
        state.num_computed_tokens, state.computing, state.progressed_at = end, True, now
        state.num_prefilled_tokens += new
        state.cached_tokens += 0 if state.num_preemptions else item.reused
        self.metrics.prefill_tokens += new
        self.metrics.events += 1
        if item.store is not None and item.payload is not None:
            self._store(state, item.store, item.payload)
        if not item.last:
            return False
        del self.prefilling[state]
        state.status = RequestStatus.DECODE
        state.times.first_token = now if state.times.first_token is None else state.times.first_token
        state.append(item.tokens, 1)
        if item.finished or not state.num_remaining_tokens:
            return True
        self.decoding[state] = ScheduledDecode(state.request, state)
        return False

    def complete_decode(self, item: ScheduledDecode, steps: int) -> bool:
        """Takes the next tokens of an answer; True if it ends with them."""
        state, span, payload = item.state, item.store_span(), item.payload
        new = state.append(item.tokens, min(steps, item.remaining))
        state.num_computed_tokens += new
        self.metrics.decode_tokens += new
        self.metrics.events += new
        if span is not None:
            state.offered_end = span[1]
            if payload is not None:
                self._store(state, span, payload)
        item.tokens = item.payload = None
        return item.finished or not state.num_remaining_tokens

    def _store(self, state: RequestState, span: TokenRange, payload: KVPayload) -> None:
        """Offers KV to the cache, which takes over the reserved bytes of `span`. If it fails, the request continues."""
        handle, (_, end) = state.handle, span
        assert handle is not None, "a running request has a handle"
        agent = state.agent if end >= state.num_fixed_tokens else None
        with self.tiers.lock:
            reserved = self.tiers.reserved_bytes
            paid = min(state.reserved_bytes, (end - handle.length) * state.bytes_per_token)
            request, history = state.request, self.tiers.history
            try:
                with history.acting_for(request.client, request.agent):
                    status = self.tiers.store(handle, state.pages(end), payload, agent, state.num_fixed_tokens, paid)
            except Exception as error:  # a cache may forget
                # Whoever keeps the record would keep the pages alive, through the traceback.
                error = error.with_traceback(None)
                logger.warning("the KV of the request %r is not stored: %r", state.request.id, error)
                status = None
            finally:
                passed = reserved - self.tiers.reserved_bytes
                state.reserved_bytes -= passed
            if status is AllocStatus.READY:
                # What was cached already: the driver goes on with the stored pages instead of its own copy.
                self.tiers.unreserve(paid - passed)
                state.reserved_bytes -= paid - passed
            else:
                self._record(state, handle.length, end, MissReason.NO_ROOM)
        self.metrics.stores += status is AllocStatus.READY
        self.metrics.stores_refused += status is not AllocStatus.READY and status is not None
        self.metrics.stores_failed += status is None
        self.metrics.events += 1

    def record_not_stored(self, state: RequestState) -> None:
        """Remembers what a request that has ended asked not to store, if it has computed that."""
        if state.request.store_policy is StorePolicy.DISCARD:
            end = min(state.num_computed_tokens, state.num_known_tokens)
            self._record(state, state.storable_end(end), end - end % state.page_size, MissReason.NOT_STORED)

    def _record(self, state: RequestState, start: int, end: int, reason: MissReason) -> None:
        request = state.request
        actor = request.client, request.agent
        self.tiers.history.record_tokens(request.namespace, state.pages(end), start, self.tiers.clock(), reason, actor)
