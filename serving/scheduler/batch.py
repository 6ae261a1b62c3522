"""The requests that are computed: which tokens of which of them are in the next piece of work."""

from __future__ import annotations

from collections.abc import Sequence

from ..kvcache.base import KVPayload
from ..kvcache.eviction_policy import AllocStatus
from ..kvcache.radix_tree import TOKEN_BYTES, Pages, encode
from ..kvcache.tiered_cache import CacheHandle, TieredCache
from ..metrics import SchedulerMetrics
from .config import SchedulerConfig
from .request_state import Decode, Entry, Prefill, Span, State, Work


class Batch:
    """Every decoding request gets its token first; prefills share what the budget leaves, in the order of admission."""

    def __init__(self, tiers: TieredCache, limits: SchedulerConfig, statistics: SchedulerMetrics) -> None:
        self.tiers, self.limits, self.statistics = tiers, limits, statistics
        self.prefilling: dict[Entry, None] = {}
        self.decoding: dict[Entry, Decode] = {}

    def __len__(self) -> int:
        return len(self.prefilling) + len(self.decoding)

    def add(self, entry: Entry, now: float) -> None:
        """Its memory is reserved, and what it has leased is on the device."""
        handle = entry.handle
        assert handle is not None, "what is computed has a lease"
        entry.state, entry.done, entry.times.admitted = State.PREFILL, handle.length, now
        self.prefilling[entry] = None
        if entry.agent is not None and 0 < entry.fixed <= handle.length and not self._is_tagged(entry, handle):
            leased = Pages(entry.key[: handle.length * TOKEN_BYTES])
            self.tiers.store(handle, leased, None, entry.agent, entry.fixed)

    def _is_tagged(self, entry: Entry, handle: CacheHandle) -> bool:
        """Whether the tree knows already where the agent's fixed prompt ends."""
        end = self.tiers.lookup_agent(entry.agent)
        return end is not None and end.end == entry.fixed and any(node is end for node in handle.node.path())

    def remove(self, entry: Entry) -> None:
        self.prefilling.pop(entry, None)
        self.decoding.pop(entry, None)

    def build(self, number: int, max_steps: int) -> Work | None:
        """The next piece of work; None if nobody is to be computed."""
        decodes = list(self.decoding.values())
        budget = self.limits.batch_tokens - len(decodes)
        prefills = []
        for entry in self.prefilling:
            if budget <= 0:
                break
            item = self._chunk(entry, budget)
            budget -= item.end - item.start
            prefills.append(item)
        if not prefills and not decodes:
            return None
        steps = 1
        if max_steps > 1 and not prefills:
            steps = min(max_steps, min(item.left for item in decodes))
        for entry in (*(item.entry for item in prefills), *self.decoding):
            entry.working = True
        return Work(number, prefills, decodes, steps)

    def _chunk(self, entry: Entry, budget: int) -> Prefill:
        """The next tokens of a prompt. A chunk ends with the fixed prompt, so that its KV can be stored by itself."""
        handle, start = entry.handle, entry.done
        assert handle is not None, "what is computed has a lease"
        boundary = entry.fixed if start < entry.fixed else entry.size
        end = min(boundary, start + min(budget, self.limits.chunk_tokens or budget))
        store = None
        if end == boundary:
            upto = entry.fixed if end == entry.fixed else entry.storable(0)
            store = (handle.length, upto) if upto > handle.length else None
        return Prefill(entry.request, handle, start, end, entry.computed == 0, end == entry.size, store, entry)

    def take_prefill(self, item: Prefill, now: float) -> bool:
        """Takes the results of a chunk; whether the request's answer ends with it."""
        entry = item.entry
        entry.done = item.end
        entry.computed += item.end - item.start
        self.statistics.prefilled += item.end - item.start
        self.statistics.events += 1
        if item.store is not None and item.payload is not None:
            self._store(entry, item.store, item.payload)
        if not item.last:
            return False
        del self.prefilling[entry]
        entry.state, entry.times.first_token = State.DECODE, now
        self._tell(entry, item.tokens, 1)
        if item.finished or entry.produced >= entry.request.max_new_tokens:
            return True
        self.decoding[entry] = Decode(entry.request, entry)
        return False

    def take_decode(self, item: Decode, steps: int) -> bool:
        """Takes the next tokens of an answer; whether it ends with them."""
        entry = item.entry
        if item.tokens is None and item.payload is None:  # not told: nothing to be kept
            left = entry.request.max_new_tokens - entry.produced
            new = min(steps, left)
            entry.produced += new
            entry.told = False
            self.statistics.decoded += new
            self.statistics.events += new
            return item.finished or new == left
        span = None if item.payload is None else item.store_span()
        before = entry.produced
        self._tell(entry, item.tokens, min(steps, item.left))
        self.statistics.decoded += entry.produced - before
        self.statistics.events += entry.produced - before
        if span is not None and item.payload is not None:
            self._store(entry, span, item.payload)
        item.tokens = item.payload = None
        return item.finished or entry.produced >= entry.request.max_new_tokens

    def _tell(self, entry: Entry, tokens: Sequence[int] | None, steps: int) -> None:
        if tokens is None:
            entry.produced += steps
            entry.told = False
            return
        told = list(tokens)[: entry.request.max_new_tokens - entry.produced]
        entry.produced += len(told)
        entry.tokens += told

    def _store(self, entry: Entry, span: Span, payload: KVPayload) -> None:
        """Gives KV to the tree, in the room that was reserved for it.

        Raises:
            ValueError: the payload is not of these tokens, or of a type that a pool cannot hold.
        """
        handle, (_, end) = entry.handle, span
        assert handle is not None, "what is computed has a lease"
        with self.tiers.lock:
            taken = min(entry.reserved, (end - handle.length) * entry.byte_rate)
            self.tiers.unreserve(taken)
            entry.reserved -= taken
            room = None
            try:
                agent = entry.agent
                room = self.tiers.store(handle, self._key(entry, end), payload, agent, min(entry.fixed, end))
            finally:
                if room is not AllocStatus.READY and self.tiers.try_reserve(taken):  # it stays with the request
                    entry.reserved += taken
        self.statistics.stores += room is AllocStatus.READY
        self.statistics.stores_refused += room is not AllocStatus.READY
        self.statistics.events += 1

    def _key(self, entry: Entry, end: int) -> Pages:
        """The first `end` tokens of prompt and answer, whole pages."""
        key, missing = entry.key, end - len(entry.key) // TOKEN_BYTES
        if not missing:
            return key
        if missing < 0:
            return Pages(key[: end * TOKEN_BYTES])
        return Pages(key + encode([*entry.tail, *entry.tokens][:missing], self.tiers.page_size))
