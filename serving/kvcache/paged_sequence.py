"""The pages of a request: those of the cached prefix, which it shares, and its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...eviction.storage.page_lists import PageLists, RaggedPages
from .base import KVPayload
from .page_pool import PagePayload, PagePool, Pages, plain_payload


class PagedSequence(PageLists):
    """Page lists with references on their pages.

    Args:
        pool: of the pages.
        payloads: a cached prefix, in order; the sequence begins with the same pages.
    Attributes:
        held: the references. They are its own: a payload that is split or joined gives up those it had.

    Raises:
        ValueError: a payload that is not in pages, or a compressed prompt that is not the first.
    """

    def __init__(self, pool: PagePool, payloads: Sequence[KVPayload] = ()) -> None:
        for place, payload in enumerate(payloads):
            if not isinstance(payload, PagePayload) or (payload.lengths is not None and place):
                raise ValueError("got payloads that do not follow each other; accepted: pages, the compressed first")
        paged: list[PagePayload] = list(payloads)  # type: ignore[arg-type]
        ragged = None
        if paged and paged[0].lengths is not None:
            ragged = RaggedPages(paged[0].table, paged[0].lengths, paged[0].tokens)
        geometry = pool.geometry
        super().__init__(len(geometry.layers), geometry.num_kv_heads, geometry.page_size, ragged)
        self.pool = pool
        self.held: list[Pages] = [pool.share(payload.table) for payload in paged]
        for payload in paged if ragged is None else paged[1:]:
            self.add(payload.table)
            self.tokens += payload.tokens

    def reserve(self, end: int) -> None:
        """Takes the pages for all tokens up to position `end`.

        Raises:
            MemoryError: there are too few free pages.
        """
        missing = -(-(end - self.start) // self.page_size) - self.table.shape[1]
        if missing > 0:
            segments = self.pool.geometry.segments
            pages = self.pool.allocate(missing * segments)
            self.pool.clear(pages.numbers)
            self.held.append(pages)
            self.add(pages.numbers.reshape(segments, missing))

    def span(self, start: int, stop: int) -> PagePayload:
        """The tokens at positions `[start, stop)`, whole pages, as a payload that shares them.

        Raises:
            ValueError: some of them have no pages here, such as those of a compressed prompt, or a part of a page.
        """
        (first, odd), (last, more) = (divmod(position - self.start, self.page_size) for position in (start, stop))
        if odd or more or not 0 <= first < last <= self.table.shape[1]:
            end = self.start + self.table.shape[1] * self.page_size
            raise ValueError(f"got the span [{start}, {stop}); accepted: whole pages within [{self.start}, {end})")
        return plain_payload(self.pool, self.table[:, first:last])

    def share_stored(self, payloads: Sequence[KVPayload]) -> None:
        """Uses the stored pages of its first tokens where another request has stored the same tokens before.

        Its own copies of them are free then: the pool counts what is stored once.

        Args:
            payloads: of a prefix of the sequence.
        """
        stored = PagedSequence(self.pool, payloads)
        count, tokens = stored.table.shape[1], self.tokens
        same = np.array_equal(stored.table[0], self.table[0, :count])
        if self.ragged is not None and stored.ragged is not None:
            same = same and np.array_equal(stored.ragged.pages, self.ragged.pages)
        if same:
            stored.release()
            return
        rest = self.table[:, count:]
        if rest.size:
            stored.held.append(self.pool.share(rest))
            stored.add(rest)
        self.release()
        self.__dict__ = stored.__dict__
        self.tokens = tokens

    def release(self) -> None:
        """Ends its references; it must not be read any more."""
        for pages in self.held:
            pages.release()
