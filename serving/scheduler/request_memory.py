"""The device memory of requests: how much each reserves at admission, and needs as it continues.

A request's KV is what its handle covers, whose bytes belong to the cache, and what it has computed beyond that, whose
bytes it has reserved. When pages are stored, they pass from the one to the other.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..kvcache.base import Tier
from ..kvcache.eviction_policy import AllocStatus
from ..kvcache.tiered_cache import TieredCache
from .request_state import RequestState
from .scheduler_config import SchedulerConfig


class RequestMemory:
    """Sizes and growth of the requests' reservations. Used under the cache's lock."""

    def __init__(self, tiers: TieredCache, config: SchedulerConfig) -> None:
        self.tiers, self.config = tiers, config

    def required(self, state: RequestState, end: int) -> int:
        """Bytes to reserve for the KV of the tokens up to `end`, beyond what the request's handle covers."""
        covered = 0 if state.handle is None else state.handle.length
        return self.nbytes(state, max(0, end - covered))

    def nbytes(self, state: RequestState, tokens: int) -> int:
        """Bytes of the device that the KV of `tokens` computed tokens takes, from the beginning of a page."""
        unit = state.page_size if self.tiers.pools[Tier.DEVICE].whole_pages else 1
        return -(-tokens // unit) * unit * state.bytes_per_token

    def least_end(self, state: RequestState) -> int:
        """The token up to which a request must have memory to be admitted: one of the answer, for some progress.

        With `reserve_answers`, all of the answer.
        """
        longest = state.num_prompt_tokens + state.request.max_new_tokens
        return longest if self.config.reserve_answers else min(state.prefill_end + 1, longest)

    def wanted_end(self, state: RequestState) -> int:
        """The token up to which an admitted request should have memory: `answer_headroom_tokens` from where it is."""
        longest = state.num_prompt_tokens + state.request.max_new_tokens
        if self.config.reserve_answers:
            return longest
        return min(max(state.prefill_end, state.num_computed_tokens) + self.config.answer_headroom_tokens, longest)

    def headroom(self, admitted: Iterable[RequestState]) -> int:
        """Bytes that the admitted requests lack up to their `wanted_end`: another one is admitted only beside these."""
        if self.config.reserve_answers:
            return 0
        return sum(max(0, self.required(state, self.wanted_end(state)) - state.reserved_bytes) for state in admitted)

    def exceeds_device(self, state: RequestState) -> bool:
        """Whether a decoding request does not fit on the device with one more page, even if there is nothing else."""
        assert state.handle is not None, "a decoding request has a handle"
        stored = sum(node.allocated[Tier.DEVICE] for node in state.handle.node.path())
        return stored + self._required_to_grow(state) > self.tiers.capacity()

    def _required_to_grow(self, state: RequestState) -> int:
        """Bytes to reserve up to the end of the page that the next token belongs to."""
        return self.required(state, (state.num_computed_tokens // state.page_size + 1) * state.page_size)

    def available_steps(self, state: RequestState) -> int:
        """Tokens that a decoding request can compute in the memory that it has reserved."""
        assert state.handle is not None, "a decoding request has a handle"
        return state.handle.length + state.reserved_bytes // state.bytes_per_token - state.num_computed_tokens

    def grow(self, state: RequestState) -> AllocStatus:
        """Reserves the page that the next token of a decoding request needs, evicting for it."""
        more = self._required_to_grow(state) - state.reserved_bytes
        with self.tiers.history.acting_for(state.request.client, state.request.agent):
            status = self.tiers.reserve(more)
        if status is AllocStatus.READY:
            state.reserved_bytes += more
        elif status is AllocStatus.REFUSED and self.tiers.cancel_prefetches(more):
            return AllocStatus.PENDING
        return status
