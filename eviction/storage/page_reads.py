"""How the attention reads the pages of several sequences: in place where they follow each other, or by page tables.

On a GPU the kernels read page tables; on a CPU a kernel in C reads the page lists, for one token of each sequence.
Otherwise pages that follow each other are read through views, and only scattered pages are copied together, those of
all sequences at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from ...retention.ops.kernel_choice import chosen_kernels
from ..ops.c_kernels import Kernel
from ..ops.paged_attention import ragged_decode_part
from ..ops.segment_attention import PageAddresses, find_paged_kernel, paged_attention
from .page_lists import PageLists, RaggedPages
from .partial_attention import HIDDEN, Part, attend_part


@dataclass(frozen=True)
class ReadsConfig:
    """How the attention on a CPU reads pages.

    Attributes:
        view_entries: pages that follow each other are read in place if they have at least so many entries; shorter runs
            are copied together. About where a copy costs as much as a call of the attention.
        padding: sequences whose scattered pages are copied together have at most this many times the pages of the
            shortest of them, as they are padded to the longest.
    """

    view_entries: int = 256
    padding: float = 2.0


class PageReads(Protocol):
    """The entries of some sequences, in parts (see `partial_attention`).

    Attributes:
        num_parts: parts of the sequence that has the most.
    """

    num_parts: int

    def attend(self, layer: int, query: torch.Tensor, scaling: float, more: int = 0) -> Part:
        """Attention over each part.

        Args:
            layer: counted from 0, in the order of the segments.
            query: `(rows, heads, n, head_dim)`: n queries of each key/value head, which see all entries.
            more: further parts to leave room for, at the end.

        Returns:
            `(parts, rows, heads, n, value_dim)` and fp32 `(parts, rows, heads, n)`.
        """
        ...


def read_pages(
    buffers: Mapping[str, torch.Tensor], sequences: Sequence[PageLists], new: int, config: ReadsConfig | None = None,
    query: torch.Tensor | None = None,
) -> PageReads:  # fmt: skip
    """The entries of `sequences`, with `new` more of each, which will have been written when they are read.

    Args:
        buffers: `key` and `value` `(slots, dim)`; slot = page * page_size + place.
        query: like those of every layer, `(rows, heads, n, head_dim)`, if there is one query per head and sequence.
    """
    if chosen_kernels(buffers["key"].device) == "triton":
        return TableReads(buffers, sequences, new)
    kernel = None if query is None else find_paged_kernel(query, buffers["key"], buffers["value"])
    if kernel is not None and query is not None and query.dtype == buffers["key"].dtype:
        return ListReads(kernel, buffers, sequences, new)
    return ViewReadsBuilder(buffers, sequences[0], config or ReadsConfig()).build(sequences, new)


class ListReads:
    """The page lists themselves, as the CPU's kernel reads them: one part. No list may change until they are read."""

    num_parts = 1

    def __init__(
        self, kernel: Kernel, buffers: Mapping[str, torch.Tensor], sequences: Sequence[PageLists], new: int
    ) -> None:
        self._kernel, self._key, self._value = kernel, buffers["key"], buffers["value"]
        rows, arrays = np.zeros((len(sequences), 6), np.int64), []
        for row, sequence in zip(rows, sequences, strict=True):
            ragged, table = sequence.ragged, sequence.table
            lists = [] if ragged is None else [ragged.pages, ragged.bounds(sequence.page_size), ragged.lengths]
            lists = [np.ascontiguousarray(each, kind) for each, kind in zip(lists, _LIST_KINDS, strict=False)]
            row[: len(lists)] = [each.ctypes.data for each in lists]
            row[3:] = table.ctypes.data, table.strides[0] // table.itemsize, sequence.tokens + new
            arrays += [*lists, table]
        self._pages = PageAddresses(rows, arrays, sequences[0].heads, sequences[0].page_size)

    def attend(self, layer: int, query: torch.Tensor, scaling: float, more: int = 0) -> Part:
        """See `PageReads.attend`."""
        outputs = query.new_empty(1 + more, *query.shape[:3], self._value.shape[-1])
        log_sums = query.new_empty(1 + more, *query.shape[:3], dtype=torch.float32)
        paged_attention(
            self._kernel, query, self._key, self._value, self._pages, layer, scaling, outputs[0], log_sums[0]
        )
        return outputs, log_sums

    def write_and_attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Attention after the keys and values `(rows, heads, dim)` of the only new tokens have been written.

        Args:
            query: `(rows, heads, n, head_dim)`.

        Returns:
            `(rows, heads, n, value_dim)`.
        """
        out = query.new_empty(*query.shape[:3], self._value.shape[-1])
        log_sums = query.new_empty(query.shape[:3], dtype=torch.float32)
        paged_attention(
            self._kernel, query, self._key, self._value, self._pages, layer, scaling, out, log_sums, (key, value)
        )
        return out


_LIST_KINDS = np.int32, np.int64, np.int32  # pages, bounds and lengths of a compressed prompt


class TableReads:
    """Page tables for the kernels: one of the compressed prompts, and one of the whole tokens."""

    def __init__(self, buffers: Mapping[str, torch.Tensor], sequences: Sequence[PageLists], new: int) -> None:
        lists, self._rows = sequences[0], len(sequences)
        size, self._device = lists.page_size, buffers["key"].device
        self._keys, self._values = (buffers[name].unflatten(0, (-1, size)) for name in ("key", "value"))
        self._layers = lists.layers
        self._tables: list[tuple[torch.Tensor, torch.Tensor]] = []
        if any(each.ragged is not None for each in sequences):
            self._tables.append(self._table([_ragged_table(each) for each in sequences], lists.heads))
        if any(each.tokens + new for each in sequences):
            counts = [each.tokens + new for each in sequences]
            tails = [
                (each.table[:, : -(-count // size)], np.full(len(each.table), count, np.int32))
                for each, count in zip(sequences, counts, strict=True)
            ]
            self._tables.append(self._table(tails, lists.heads))
        self.num_parts = len(self._tables)

    def _table(self, rows: Sequence[tuple[np.ndarray, np.ndarray]], heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Page table `(layers, rows * heads, width)` and lengths `(layers, rows * heads)`, int32, on the device."""
        width = max(1, *(table.shape[1] for table, _ in rows))
        whole = np.zeros((len(rows), self._layers * heads, width), np.int32)
        for row, (table, _) in enumerate(rows):
            whole[row, :, : table.shape[1]] = table
        lengths = np.stack([count for _, count in rows]).reshape(len(rows), self._layers, heads)
        whole = whole.reshape(len(rows), self._layers, heads, width)
        both = (np.ascontiguousarray(each.swapaxes(0, 1)) for each in (whole, lengths))
        table, counts = (torch.from_numpy(each).to(self._device).flatten(1, 2) for each in both)
        return table, counts

    def attend(self, layer: int, query: torch.Tensor, scaling: float, more: int = 0) -> Part:
        """See `PageReads.attend`."""
        shape = (self.num_parts + more, *query.shape[:3])
        outputs = query.new_zeros(*shape, self._values.shape[-1])
        log_sums = query.new_full(shape, HIDDEN, dtype=torch.float32)
        # Every query sees all entries: none of the newest is hidden from it.
        hidden = torch.zeros(query.shape[0], query.shape[2], dtype=torch.int32, device=self._device)
        for part, (table, lengths) in enumerate(self._tables):
            result, log_sum = ragged_decode_part(
                query, self._keys, self._values, table[layer], lengths[layer], scaling, hidden
            )
            outputs[part], log_sums[part] = result.transpose(1, 2), log_sum.transpose(1, 2)
        return outputs, log_sums


def _ragged_table(sequence: PageLists) -> tuple[np.ndarray, np.ndarray]:
    """Pages of a compressed prompt, `(segments, width)`, and the entries of each segment; none without one."""
    ragged, segments = sequence.ragged, sequence.layers * sequence.heads
    if ragged is None:
        return np.zeros((segments, 0), np.int32), np.zeros(segments, np.int32)
    bounds = ragged.bounds(sequence.page_size)
    table = np.zeros((segments, int(np.diff(bounds).max())), np.int32)
    table[np.arange(table.shape[1]) < np.diff(bounds)[:, None]] = ragged.pages
    return table, ragged.lengths


@dataclass(eq=False)
class View:
    """Entries that a call of the attention reads where they are.

    Attributes:
        row: index of the sequence among those that are read together. part: place of its result.
        heads: the heads that are read: all, or one.
        offset: first slot of the first of them. stride: slots from a head to the next.
        entries: of each head.
    """

    row: int
    part: int
    heads: slice
    offset: int
    stride: int
    entries: int


@dataclass(eq=False)
class Gathered:
    """Scattered pages of several sequences, which are copied together.

    Attributes:
        rows: int64, indices of the sequences. parts: int64, places of their results.
        pages: int64 `(layers, rows * heads * width)`.
        mask: `(1 or layers, rows, 1 or heads, 1, entries)`, the model's dtype: 0, or -inf for free slots and padding.
    """

    rows: torch.Tensor
    parts: torch.Tensor
    pages: torch.Tensor
    mask: torch.Tensor


@dataclass(eq=False)
class ViewReads:
    """Views and copies of pages, for the attention on a CPU.

    Attributes:
        buffers: of all pages.
        num_parts: parts of the sequence that has the most.
        gathered: read first. views: by layer; they replace what was gathered in the place of heads that are long.
        empty: row, part, and bool `(layers, heads)`: heads of compressed prompts without entries.
    """

    buffers: Mapping[str, torch.Tensor]
    page_size: int
    num_parts: int
    gathered: list[Gathered]
    views: list[list[View]]
    empty: list[tuple[int, int, torch.Tensor]]

    def attend(self, layer: int, query: torch.Tensor, scaling: float, more: int = 0) -> Part:
        """See `PageReads.attend`."""
        keys, values = self.buffers["key"], self.buffers["value"]
        shape = (self.num_parts + more, *query.shape[:3])
        outputs = query.new_zeros(*shape, values.shape[-1])
        log_sums = query.new_full(shape, HIDDEN, dtype=torch.float32)
        size = self.page_size
        for group in self.gathered:
            rows, heads = len(group.rows), query.shape[1]
            key, value = (
                buffer.view(-1, size * buffer.shape[-1]).index_select(0, group.pages[layer])
                .view(rows, heads, -1, buffer.shape[-1])
                for buffer in (keys, values)
            )  # fmt: skip
            mask = group.mask[layer if len(group.mask) > 1 else 0]
            result, log_sum = attend_part(query[group.rows], key, value, scaling, mask)
            outputs[group.parts, group.rows], log_sums[group.parts, group.rows] = result, log_sum
        for view in self.views[layer]:
            heads = view.heads.stop - view.heads.start
            key, value = (
                buffer.as_strided(
                    (1, heads, view.entries, buffer.shape[-1]),
                    (0, view.stride * buffer.shape[-1], buffer.shape[-1], 1),
                    view.offset * buffer.shape[-1],
                )
                for buffer in (keys, values)
            )
            result, log_sum = attend_part(query[view.row : view.row + 1, view.heads], key, value, scaling)
            outputs[view.part, view.row, view.heads], log_sums[view.part, view.row, view.heads] = result[0], log_sum[0]
        for row, part, empty in self.empty:
            log_sums[part, row].masked_fill_(empty[layer].unsqueeze(-1), HIDDEN)
        return outputs, log_sums


class ViewReadsBuilder:
    """Makes `ViewReads` from the sequences' page lists."""

    def __init__(self, buffers: Mapping[str, torch.Tensor], lists: PageLists, config: ReadsConfig) -> None:
        self.buffers, self.dtype, self.config = buffers, buffers["key"].dtype, config
        self.layers, self.heads, self.page_size = lists.layers, lists.heads, lists.page_size
        self._min_pages = max(1, -(-config.view_entries // lists.page_size))

    def build(self, sequences: Sequence[PageLists], new: int) -> ViewReads:
        """The reads of all entries of the sequences, of which the last `new` are written in this forward."""
        parts = [0] * len(sequences)
        views: list[list[View]] = [[] for _ in range(self.layers)]
        empty: list[tuple[int, int, torch.Tensor]] = []
        ragged: list[tuple[int, int, np.ndarray, np.ndarray]] = []
        tails: list[tuple[int, int, np.ndarray, np.ndarray]] = []
        for row, sequence in enumerate(sequences):
            if sequence.ragged is not None:
                ragged.append(self._ragged(row, parts[row], sequence.ragged, views, empty))
                parts[row] += 1
            count = sequence.tokens + new
            if count:
                long, table, entries = self._tail(sequence, count)
                for run, size in long:
                    for layer in range(self.layers):
                        views[layer].append(self._view(row, parts[row], run.offset[layer], run.stride[layer], size))
                    parts[row] += 1
                if table.shape[2]:
                    tails.append((row, parts[row], table, entries))
                    parts[row] += 1
        gathered = [*self._groups(ragged), *self._groups(tails)]
        return ViewReads(self.buffers, self.page_size, max(parts, default=0), gathered, views, empty)

    def _view(self, row: int, part: int, page: int, stride: int, entries: int) -> View:
        size = self.page_size
        return View(row, part, slice(0, self.heads), page * size, stride * size, entries)

    def _tail(self, sequence: PageLists, count: int) -> tuple[list[tuple[Any, int]], np.ndarray, np.ndarray]:
        """Runs that are read in place, with their entries; the other pages `(layers, heads, n)` and their entries
        `(1, 1, n)`."""
        size = self.page_size
        used = -(-count // size)
        columns = np.ones(used, bool)
        long = []
        for run in sequence.runs:
            stop = min(run.stop, used)
            if stop - run.first >= self._min_pages:
                long.append((run, min(stop * size, count) - run.first * size))
                columns[run.first : stop] = False
        entries = np.minimum(count - np.arange(used) * size, size)[columns]
        table = sequence.table[:, :used][:, columns]
        return long, table.reshape(self.layers, self.heads, -1), entries[None, None]

    def _ragged(
        self, row: int, part: int, ragged: RaggedPages, views: list[list[View]], empty: list[Any]
    ) -> tuple[int, int, np.ndarray, np.ndarray]:
        """Adds views of the long heads; returns the pages of the others, padded, `(layers, heads, n)`, and the entries
        in each page."""
        size, bounds = self.page_size, ragged.bounds(self.page_size)
        lengths = ragged.lengths.reshape(self.layers, self.heads)
        starts = bounds[:-1].reshape(self.layers, self.heads)
        broken = np.concatenate([[0], np.cumsum(np.diff(ragged.pages) != 1)])
        last = np.maximum(bounds[1:] - 1, bounds[:-1])
        in_a_row = broken[np.minimum(last, len(broken) - 1)] == broken[np.minimum(bounds[:-1], len(broken) - 1)]
        long = (lengths >= self.config.view_entries) & in_a_row.reshape(lengths.shape)
        for layer, head in zip(*np.nonzero(long), strict=True):
            offset = int(ragged.pages[starts[layer, head]]) * size
            views[layer].append(View(row, part, slice(head, head + 1), offset, 0, int(lengths[layer, head])))
        if not lengths.all():
            empty.append((row, part, torch.from_numpy(lengths == 0)))
        short = np.where(long, 0, lengths)
        width = max(1, -(-int(short.max()) // size))
        column = np.arange(width)
        entries = np.clip(short[..., None] - column * size, 0, size)
        # A head without entries here reads one that is not its own, so that no row is hidden as a whole; its result is
        # replaced, or has no weight.
        entries[..., 0] = np.maximum(entries[..., 0], 1)
        place = np.minimum(starts[..., None] + column, max(len(ragged.pages) - 1, 0))
        pages = ragged.pages[place] if len(ragged.pages) else np.zeros(place.shape, np.int32)
        return row, part, pages, entries

    def _groups(self, items: list[tuple[int, int, np.ndarray, np.ndarray]]) -> Iterator[Gathered]:
        """Items of similar width are padded to the widest and copied together."""
        items = sorted(items, key=lambda item: item[2].shape[2])
        while items:
            most = max(1, items[0][2].shape[2]) * self.config.padding
            count = sum(item[2].shape[2] <= most for item in items)
            yield self._group(items[:count])
            items = items[count:]

    def _group(self, items: list[tuple[int, int, np.ndarray, np.ndarray]]) -> Gathered:
        width = items[-1][2].shape[2]
        pages = np.zeros((self.layers, len(items), self.heads, width), np.int64)
        apart = np.broadcast_shapes(*(entries.shape[:2] for *_, entries in items))
        counts = np.zeros((apart[0], len(items), apart[1], width), np.int64)
        for i, (_, _, table, entries) in enumerate(items):
            n = table.shape[2]
            pages[:, i, :, :n] = table
            pages[:, i, :, n:] = table[:, :, :1]
            counts[:, i, :, :n] = entries
        hidden = np.arange(self.page_size) >= counts[..., None]
        mask = torch.zeros(*counts.shape[:3], 1, width * self.page_size, dtype=self.dtype)
        mask.masked_fill_(torch.from_numpy(hidden).view(mask.shape), HIDDEN)
        rows, parts = (torch.tensor([item[i] for item in items]) for i in (0, 1))
        return Gathered(rows, parts, torch.from_numpy(pages).view(self.layers, -1), mask)
