"""A bounded record of KV that left the cache, or was never stored: why a prompt that was seen before is not found.

A record stands for the tokens of one span behind one beginning, like a node of the tree without data. It is found by
the number and the checksum of the tokens before it and by its first page, so recording costs the same whatever the
length of the prompt, and a look-up costs a checksum a page.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple
from zlib import crc32

from tenure.checked import Count, verify

from .radix_tree import TOKEN_BYTES, Node, common_pages


class MissReason(Enum):
    """Why tokens of a prompt were computed, although a cache might have had their KV."""

    NEVER_SEEN = "never_seen"  # by this process
    FORGOTTEN = "not_remembered"  # never seen, or evicted so long ago that the record of it has been dropped
    EVICTED = "evicted"  # other KV needed the memory
    RELEASED = "released"  # its session had ended, or a hint gave it up, so it was evicted before all else
    FLUSHED = "flushed"  # everything was discarded
    LOST = "lost"  # its file was missing or damaged
    NOT_STORED = "not_stored"  # the request that computed it asked for that
    NO_ROOM = "no_room"  # there was no room to store it
    BEHIND_GAP = "behind_gap"  # it is cached, but something before it is not
    NOT_DIVISIBLE = "not_divisible"  # it is cached as part of a longer prompt that was compressed as a whole
    BEING_COPIED = "being_copied"  # it is cached as part of a longer span that was moving between tiers
    OTHER_COMPRESSION = "other_compression"  # it is cached, but compressed otherwise, or up to another token
    OTHER_NAMESPACE = "other_namespace"  # it is cached in another namespace of the same client
    FASTER = "faster"  # it was cached below the device, and computing was expected to be faster than loading
    NO_MEMORY = "no_memory"  # it was cached, and given up, as the request itself needed that memory
    LOAD_FAILED = "load_failed"  # it was cached below the device, and loading failed or took too long
    PART_OF_PAGE = "part_of_page"  # only whole pages are cached, and the last token is always computed


@dataclass(frozen=True)
class ComputedSpan:
    """Tokens of a prompt that were computed, and why.

    Attributes:
        start, end: tokens of the prompt, [start, end).
        seconds_ago: since they were evicted, flushed, lost or not stored; None where that is not known, or was for
            another client.
        evicted_for: the agent whose call, or prefetch, needed the memory; None as there, or without an agent.
    """

    start: int
    end: int
    reason: MissReason
    seconds_ago: float | None = None
    evicted_for: str | None = None


@dataclass(frozen=True)
class EvictionHistoryConfig:
    """Bounds of an `EvictionHistory`; the oldest records are dropped.

    Attributes:
        max_records: spans recorded. 0: nothing is recorded.
        max_bytes: bytes of their token ids, 4 a token.
    """

    max_records: int = 16_384
    max_bytes: Count = 16 << 20

    def __post_init__(self) -> None:
        verify(self)
        if self.max_records < 0:
            raise ValueError(f"got max_records={self.max_records}; accepted: 0 or more")


Actor = tuple[str, str | None]  # client and agent


class Record(NamedTuple):
    """KV that is gone.

    Attributes:
        span: the token ids, see `radix_tree.encode`.
        covers: tokens up to the end of the span that went with it, as in `Node`.
        time_s: on the cache's clock.
        actor: for whom it was evicted, or whose request did not store it; None: nobody's.
    """

    span: bytes
    covers: int
    time_s: float
    reason: MissReason
    actor: Actor | None


# As a `Record`, with the value of the reason: Python's collector does not walk over tuples of plain values.
_Fields = tuple[bytes, int, float, str, Actor | None]
_Place = tuple[Hashable, int, int, bytes]  # namespace, number and checksum of the tokens before, first page


class EvictionHistory:
    """Called under the cache's lock.

    Attributes:
        num_dropped: records that have made way for others.
    """

    def __init__(self, page_bytes: int, config: EvictionHistoryConfig) -> None:
        self.page_bytes, self.config = page_bytes, config
        self.num_dropped = 0
        self._records: dict[_Place, _Fields] = {}  # the oldest first
        self._nbytes = 0
        self._actor: Actor | None = None

    def __len__(self) -> int:
        return len(self._records)

    @contextmanager
    def acting_for(self, client: str, agent: str | None) -> Iterator[None]:
        """Evictions within the block are for this agent of this client."""
        before, self._actor = self._actor, (client, agent)
        try:
            yield
        finally:
            self._actor = before

    def record_node(self, node: Node, covers: int, now: float, reason: MissReason | None = None) -> None:
        """The last copy of `node`, which covered `covers` tokens, is gone; None: it was evicted."""
        root, upper, span = node.root, node.parent, node.span
        assert upper is not None, "a root has no copies"
        if root.retired or not self.config.max_records:
            return
        if reason is None:
            reason = MissReason.RELEASED if node.last_used == -math.inf else MissReason.EVICTED
        place = root.namespace, upper.end, upper.checksum(), span[: self.page_bytes]
        self._add(place, (span, covers, now, reason.value, self._actor))

    def record_tokens(
        self, namespace: Hashable, key: bytes, start: int, now: float, reason: MissReason, actor: Actor
    ) -> None:
        """The tokens of the prompt `key` (see `encode`) from `start` on, a page's beginning, are not stored."""
        cut = start * TOKEN_BYTES
        if len(key) > cut:
            span = key[cut:]
            place = namespace, start, crc32(memoryview(key)[:cut]), span[: self.page_bytes]
            self._add(place, (span, len(span) // TOKEN_BYTES, now, reason.value, actor))

    def _add(self, place: _Place, record: _Fields) -> None:
        records = self._records
        if place in records:
            self._nbytes -= len(records.pop(place)[0])
        records[place] = record
        self._nbytes += len(record[0])
        while self._nbytes > self.config.max_bytes or len(records) > self.config.max_records:
            self._nbytes -= len(records.pop(next(iter(records)))[0])
            self.num_dropped += 1

    def find(self, namespace: Hashable, key: bytes) -> list[tuple[int, int, Record]]:
        """The records of parts of the prompt `key`, as tokens [start, end) of it, the latest first."""
        found, checksum = [], 0
        for at in range(0, len(key), self.page_bytes):
            page = key[at : at + self.page_bytes]
            fields = self._records.get((namespace, at // TOKEN_BYTES, checksum, page))
            if fields is not None:
                span, covers, time_s, reason, actor = fields
                start = (at + len(span)) // TOKEN_BYTES - covers
                end = at + common_pages(span, key, at, self.page_bytes) * self.page_bytes
                found.append((start, end // TOKEN_BYTES, Record(span, covers, time_s, MissReason(reason), actor)))
            checksum = crc32(page, checksum)
        return sorted(found, key=lambda each: each[2].time_s, reverse=True)
