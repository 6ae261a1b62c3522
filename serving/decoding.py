"""Requests that are answered together: rows of one cache, a token each at every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ..eviction import RaggedCache, Session


class DecodeBatch:
    """The caches of the requests that are decoded.

    One request goes on in the cache that its prompt made. Several become the rows of a stack; whoever joins or leaves
    it costs a copy of the others' entries, about what a step reads.

    Attributes:
        rows: ids of the requests in the order of the cache's rows.
        cache: None if there are no rows.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.rows: list[str] = []
        self.cache: RaggedCache | None = None

    def arrange(self, ids: Sequence[str], prompts: Mapping[str, RaggedCache]) -> list[str]:
        """Makes `ids` the rows, in an order that is returned; those that are no rows yet bring their prompts' caches.

        The caches of `prompts` belong to the batch from now on.
        """
        wanted = set(ids)
        stay = [place for place, row in enumerate(self.rows) if row in wanted]
        new = [one for one in ids if one not in self.rows]
        if not stay:
            self.cache = None
        elif len(stay) < len(self.rows):
            assert self.cache is not None, "there are rows"
            self.cache.select_rows(torch.tensor(stay))
        self.rows = [self.rows[place] for place in stay] + new
        if new:
            caches = [] if self.cache is None else [self.cache]
            caches += [prompts[one] for one in new]
            self.cache = caches[0] if len(caches) == 1 else self.session.stack(caches)
        return self.rows

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Extends every row by a token; logits `(rows, vocab)`."""
        assert self.cache is not None and len(tokens) == len(self.rows), "a token for each row"
        return self.session.extend(self.cache, torch.tensor(tokens).unsqueeze(1))[:, -1]

    def clear(self) -> None:
        """Drops all rows, as after a step that has failed."""
        self.rows, self.cache = [], None
