"""The pages of one sequence: which page holds which entries of each head, and which of them lie in a row."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np


@dataclass(frozen=True)
class RaggedPages:
    """A compressed prompt, of which the heads keep different numbers of entries.

    Attributes:
        pages: int32 `(pages,)`: those of all segments, one segment after the other.
        lengths: int32 `(segments,)`: entries of each segment.
        tokens: tokens of the prompt that they stand for.
    """

    pages: np.ndarray
    lengths: np.ndarray
    tokens: int

    def bounds(self, page_size: int) -> np.ndarray:
        """Indices in `pages` at which the segments begin, and the end, int64 `(segments + 1,)`."""
        return np.concatenate([[0], np.cumsum(-(-self.lengths.astype(np.int64) // page_size))])


@dataclass(frozen=True)
class Run:
    """Pages `[first, stop)` of every segment that follow each other, the same distance apart for all heads of a layer.

    Attributes:
        offset: int64 `(layers,)`: page of the first head. stride: `(layers,)`: pages from a head to the next.
    """

    first: int
    stop: int
    offset: list[int]
    stride: list[int]


class PageLists:
    """The pages of a sequence: those of a compressed prompt, if there is one, then those of whole tokens.

    Whole tokens have an entry in every segment, so their pages are a table. Segments are the heads of the first layer,
    then those of the second, and so on.

    Args:
        layers, heads, page_size: of the model's pages.
        ragged: the compressed prompt; the whole tokens follow it, on pages of their own.
    Attributes:
        tokens: whole tokens whose entries are written.
    """

    def __init__(self, layers: int, heads: int, page_size: int, ragged: RaggedPages | None = None) -> None:
        self.layers, self.heads, self.page_size, self.ragged = layers, heads, page_size, ragged
        self.tokens = 0
        self._pages = np.zeros((layers * heads, 0), np.int32)
        self._count = 0

    @property
    def start(self) -> int:
        """Position of the first whole token."""
        return 0 if self.ragged is None else self.ragged.tokens

    @property
    def end(self) -> int:
        """Position of the next token."""
        return self.start + self.tokens

    @property
    def table(self) -> np.ndarray:
        """int32 `(segments, pages)`: pages of the whole tokens, a view."""
        return self._pages[:, : self._count]

    def add(self, pages: np.ndarray) -> None:
        """Appends pages, int32 `(segments, n)`."""
        count = self._count + pages.shape[1]
        if count > self._pages.shape[1]:
            grown = np.zeros((len(self._pages), max(count, 2 * self._count)), np.int32)
            grown[:, : self._count] = self.table
            self._pages = grown
        self._pages[:, self._count : count] = pages
        self._count = count
        self.__dict__.pop("runs", None)

    def slots(self, first: int, stop: int) -> np.ndarray:
        """Slots of the whole tokens `[first, stop)`, int64 `(segments, stop - first)`; slot = page * page_size + i."""
        token = np.arange(first, stop)
        return self.table[:, token // self.page_size].astype(np.int64) * self.page_size + token % self.page_size

    @cached_property
    def runs(self) -> list[Run]:
        """Runs of the table, in order, without the columns whose pages are not the same distance apart."""
        table = self.table.reshape(self.layers, self.heads, -1)
        if not table.shape[2]:
            return []
        stride = table[:, min(1, self.heads - 1)] - table[:, 0]
        even = table - table[:, :1] == np.arange(self.heads)[None, :, None] * stride[:, None]
        aligned = even.all((0, 1)) & ((stride > 0).all(0) | (self.heads == 1))
        joined = (np.diff(table, axis=2) == 1).all((0, 1)) & aligned[1:] & aligned[:-1]
        ends = [0, *(np.flatnonzero(~joined) + 1).tolist(), table.shape[2]]
        return [Run(a, b, table[:, 0, a].tolist(), stride[:, a].tolist()) for a, b in pairwise(ends) if aligned[a]]
