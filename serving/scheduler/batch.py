"""The running requests, and the formation of batches from them.

Every decoding request gets its token first; prefills share the rest of the budget in the order of admission. The KV
that a driver hands back is stored in the cache, in memory that was reserved for it.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..kvcache.base import KVPayload
from ..kvcache.eviction_policy import AllocStatus
from ..kvcache.radix_tree import TOKEN_BYTES, Pages, encode
from ..kvcache.tiered_cache import CacheHandle, TieredCache
from ..metrics import SchedulerMetrics
from .request_state import RequestState, RequestStatus, ScheduledBatch, ScheduledDecode, ScheduledPrefill, TokenRange
from .scheduler_config import SchedulerConfig


class RunningRequests:
    """Requests that are being prefilled or decoded, at most `max_num_seqs`. Used under the cache's lock.

    Attributes:
        prefilling: in the order of admission. decoding: with the item that is scheduled for each in every batch.
    """

    def __init__(self, tiers: TieredCache, config: SchedulerConfig, metrics: SchedulerMetrics) -> None:
        self.tiers, self.config, self.metrics = tiers, config, metrics
        self.prefilling: dict[RequestState, None] = {}
        self.decoding: dict[RequestState, ScheduledDecode] = {}

    def __len__(self) -> int:
        return len(self.prefilling) + len(self.decoding)

    def add(self, state: RequestState, now: float) -> None:
        """Starts a request whose memory is reserved and whose cached prefix is on the device."""
        handle = state.handle
        assert handle is not None, "a running request has a handle"
        state.status, state.num_computed_tokens, state.times.admitted = RequestStatus.PREFILL, handle.length, now
        self.prefilling[state] = None
        fixed = state.num_fixed_tokens
        if state.agent is not None and 0 < fixed <= handle.length and not self._is_tagged(state, handle):
            covered = Pages(state.key[: handle.length * TOKEN_BYTES])
            self.tiers.store(handle, covered, None, state.agent, fixed)

    def _is_tagged(self, state: RequestState, handle: CacheHandle) -> bool:
        """Whether the tree already knows where the agent's fixed prompt ends."""
        end = self.tiers.lookup_agent(state.agent)
        return end is not None and end.end == state.num_fixed_tokens and any(node is end for node in handle.node.path())

    def remove(self, state: RequestState) -> None:
        self.prefilling.pop(state, None)
        self.decoding.pop(state, None)

    def schedule(self, number: int, max_steps: int) -> ScheduledBatch | None:
        """Forms batch `number`; None if no request is running. Decodes get `max_steps` tokens if nothing prefills."""
        decodes = list(self.decoding.values())
        budget = self.config.max_num_batched_tokens - len(decodes)
        prefills = []
        for state in self.prefilling:
            if budget <= 0:
                break
            item = self._chunk(state, budget)
            budget -= item.end - item.start
            prefills.append(item)
        if not prefills and not decodes:
            return None
        steps = 1
        if max_steps > 1 and not prefills:
            steps = min(max_steps, min(item.remaining for item in decodes))
        for state in (*(item.state for item in prefills), *self.decoding):
            state.in_batch = True
        return ScheduledBatch(number, prefills, decodes, steps)

    def _chunk(self, state: RequestState, budget: int) -> ScheduledPrefill:
        """The next chunk of a prompt. It ends at the fixed prompt's end, so that this part is stored by itself."""
        handle, start, fixed = state.handle, state.num_computed_tokens, state.num_fixed_tokens
        assert handle is not None, "a running request has a handle"
        boundary = fixed if start < fixed else state.num_prompt_tokens
        end = min(boundary, start + min(budget, self.config.prefill_chunk_size or budget))
        store = None
        if end == boundary:
            upto = fixed if end == fixed else state.storable_end(0)
            store = (handle.length, upto) if upto > handle.length else None
        first, last = state.num_prefilled_tokens == 0, end == state.num_prompt_tokens
        return ScheduledPrefill(state.request, handle, start, end, first, last, store, state)

    def complete_prefill(self, item: ScheduledPrefill, now: float) -> bool:
        """Takes the results of a chunk; True if the request's answer ends with it. Raises as `TieredCache.store`."""
        state, new = item.state, item.end - item.start
        state.num_computed_tokens = item.end
        state.num_prefilled_tokens += new
        self.metrics.prefill_tokens += new
        self.metrics.events += 1
        if item.store is not None and item.payload is not None:
            self._store(state, item.store, item.payload)
        if not item.last:
            return False
        del self.prefilling[state]
        state.status, state.times.first_token = RequestStatus.DECODE, now
        self._append(state, item.tokens, 1)
        if item.finished or state.num_output_tokens >= state.request.max_new_tokens:
            return True
        self.decoding[state] = ScheduledDecode(state.request, state)
        return False

    def complete_decode(self, item: ScheduledDecode, steps: int) -> bool:
        """Takes the next tokens of an answer; True if it ends with them. Raises as `TieredCache.store`."""
        state, before = item.state, item.state.num_output_tokens
        span = None if item.payload is None else item.store_span()
        self._append(state, item.tokens, min(steps, item.remaining))
        self.metrics.decode_tokens += state.num_output_tokens - before
        self.metrics.events += state.num_output_tokens - before
        if span is not None and item.payload is not None:
            self._store(state, span, item.payload)
        item.tokens = item.payload = None
        return item.finished or state.num_output_tokens >= state.request.max_new_tokens

    def _append(self, state: RequestState, tokens: Sequence[int] | None, steps: int) -> None:
        if tokens is None:
            state.num_output_tokens += steps
            state.tokens_known = False
            return
        new = list(tokens)[: state.request.max_new_tokens - state.num_output_tokens]
        state.num_output_tokens += len(new)
        state.output_tokens += new

    def _store(self, state: RequestState, span: TokenRange, payload: KVPayload) -> None:
        """Offers KV to the cache, in reserved memory: the bytes of `span` pass to it, or stay reserved on refusal."""
        handle, (_, end) = state.handle, span
        assert handle is not None, "a running request has a handle"
        with self.tiers.lock:
            taken = min(state.reserved_bytes, (end - handle.length) * state.bytes_per_token)
            self.tiers.unreserve(taken)
            state.reserved_bytes -= taken
            room = None
            try:
                agent = state.agent
                room = self.tiers.store(handle, self._key(state, end), payload, agent, min(state.num_fixed_tokens, end))
            finally:
                if room is not AllocStatus.READY and self.tiers.try_reserve(taken):
                    state.reserved_bytes += taken
        self.metrics.stores += room is AllocStatus.READY
        self.metrics.stores_refused += room is not AllocStatus.READY
        self.metrics.events += 1

    def _key(self, state: RequestState, end: int) -> Pages:
        """The first `end` tokens of prompt and answer, whole pages."""
        key, missing = state.key, end - len(state.key) // TOKEN_BYTES
        if not missing:
            return key
        if missing < 0:
            return Pages(key[: end * TOKEN_BYTES])
        return Pages(key + encode([*state.tail_tokens, *state.output_tokens][:missing], self.tiers.page_size))
