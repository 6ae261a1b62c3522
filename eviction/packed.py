"""A forward of several sequences as one row of tokens, on keys and values in pages that the sequences share.

The tokens of all sequences, a chunk of a prompt or the last token of an answer each, are one batch row `(1, tokens)`:
the model's linear layers see one matrix, without padding, and the attention keeps the sequences apart. A sequence's
context is a compressed prompt, whose heads keep different numbers of entries, then whole tokens, of which every head
keeps each (`PageLists`).

On a CPU, pages that follow each other are read where they are, through views; only scattered pages are copied together,
those of all sequences at once. Elsewhere the paged kernels read the page tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from ..retention.seams import AttentionCall
from .storage.attention import refuse_unsupported
from .storage.page_lists import PackedConfig, PageLists, RaggedPages
from .storage.partial_attention import attend_part, merged

HIDDEN = float("-inf")


@dataclass(eq=False)
class View:
    """Entries that a call of the attention reads where they are.

    Attributes:
        row: index of the sequence among those that are read together. part: where its result goes.
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
        rows: int64, indices of the sequences. parts: int64, where their results go.
        pages: int64 `(layers, rows * heads * width)`.
        mask: `(1 or layers, rows, 1 or heads, 1, entries)`, the model's dtype: 0, or -inf for free slots and padding.
    """

    rows: torch.Tensor
    parts: torch.Tensor
    pages: torch.Tensor
    mask: torch.Tensor


@dataclass(eq=False)
class Reads:
    """Everything that the attention reads for sequences that have the same number of queries.

    Attributes:
        num_parts: parts of the sequence that has the most.
        gathered: read first. views: by layer; they replace what was gathered in the place of heads that are long.
        empty: None, or bool `(layers, rows, heads)` for each part: heads of compressed prompts without entries.
    """

    num_parts: int
    gathered: list[Gathered]
    views: list[list[View]]
    empty: list[tuple[int, int, torch.Tensor]]


class ReadsBuilder:
    """Makes the `Reads` of a forward from the sequences' page lists."""

    def __init__(self, layers: int, heads: int, page_size: int, dtype: torch.dtype, config: PackedConfig) -> None:
        self.layers, self.heads, self.page_size, self.dtype, self.config = layers, heads, page_size, dtype, config
        self._min_pages = max(1, -(-config.view_entries // page_size))

    def build(self, sequences: Sequence[PageLists], new: int) -> Reads:
        """What is read of each sequence's entries, of which the last `new` are written in this forward."""
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
        return Reads(max(parts, default=0), gathered, views, empty)

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
        mask = torch.zeros(counts.shape[:3] + (1, width * self.page_size), dtype=self.dtype)
        mask.masked_fill_(torch.from_numpy(hidden).view(mask.shape), HIDDEN)
        rows, parts = (torch.tensor([item[i] for item in items]) for i in (0, 1))
        return Gathered(rows, parts, torch.from_numpy(pages).view(self.layers, -1), mask)


@dataclass(frozen=True)
class PackedTokens:
    """New tokens of a sequence in a forward.

    Attributes:
        sequence: its pages, with room for the new tokens.
        ids: the tokens, int64 `(n,)`.
    """

    sequence: PageLists
    ids: np.ndarray


class PackedLayer(CacheLayerMixin):
    """What transformers asks of a cache layer: the packed attention reads the pages itself."""

    is_sliding = is_compileable = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return key_states, value_states

    def get_seq_length(self) -> int:
        """0, as every sequence's positions are given to the model."""
        return 0

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        return query_length if isinstance(query_length, int) else query_length.shape[0], 0

    def get_max_cache_shape(self) -> int:
        return -1

    def get_max_length(self) -> int:
        return -1


class PackedCache(Cache):
    """The cache argument of one packed forward.

    Args:
        buffers: `key` and `value` `(slots, dim)`, and states fp32 `(slots,)`; slot = page * page_size + place.
        layer_indices: decoder indices of the layers, in the order of the segments.
        tokens: new tokens of each sequence; a sequence once.
        gated: compute log β of the tokens of these sequences, by index; their entries get it as their state.
    """

    def __init__(
        self, buffers: Mapping[str, torch.Tensor], layer_indices: Sequence[int], tokens: Sequence[PackedTokens],
        gated: Sequence[int] = (), config: PackedConfig | None = None,
    ) -> None:  # fmt: skip
        super().__init__(layers=[PackedLayer() for _ in range(max(layer_indices) + 1)])
        self.buffers, self._place = buffers, {index: i for i, index in enumerate(layer_indices)}
        # Single tokens first: they are attended for together.
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i].ids) > 1)
        self.tokens = [tokens[i] for i in order]
        lists = tokens[0].sequence
        self._heads, device = lists.heads, buffers["key"].device
        builder = ReadsBuilder(lists.layers, lists.heads, lists.page_size, buffers["key"].dtype, config or PackedConfig())
        sizes = [len(one.ids) for one in self.tokens]
        self.ends = np.cumsum(sizes)  # of each sequence's tokens, in the order of `self.tokens`
        self.last = {i: int(self.ends[place]) - 1 for place, i in enumerate(order)}  # column of a sequence's last token
        self._single = sum(size == 1 for size in sizes)
        self._decodes = builder.build([one.sequence for one in self.tokens[: self._single]], 1) if self._single else None
        self._prefills = [
            (int(end) - size, int(end), builder.build([one.sequence], 0))
            for one, size, end in zip(self.tokens, sizes, self.ends, strict=True)
            if size > 1
        ]
        slots = [one.sequence.slots(one.sequence.tokens, one.sequence.tokens + len(one.ids)) for one in self.tokens]
        flat = np.concatenate(slots, axis=1).reshape(lists.layers, lists.heads, -1)
        self._slots = torch.from_numpy(flat).to(device)
        wanted = set(gated)
        columns = [np.arange(end - size, end) for i, size, end in zip(order, sizes, self.ends, strict=True) if i in wanted]
        self.gated = torch.from_numpy(np.concatenate(columns)).to(device) if columns else None

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and positions, int64 `(1, tokens)`."""
        ids = np.concatenate([one.ids for one in self.tokens])
        positions = [np.arange(one.sequence.end, one.sequence.end + len(one.ids)) for one in self.tokens]
        device = self.buffers["key"].device
        return tuple(torch.from_numpy(x).to(device).unsqueeze(0) for x in (ids, np.concatenate(positions)))

    def open_layer(self, layer_idx: int, state: dict[str, torch.Tensor]) -> AttentionCall:
        """The attention of a layer; `state`: log β of the gated tokens, `(1, heads, gated tokens)`."""
        layer = self._place[layer_idx]

        def call(
            base: AttentionCall, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
            attention_mask: Any, **kwargs: Any,
        ) -> tuple[torch.Tensor, None]:  # fmt: skip
            refuse_unsupported(kwargs)
            scaling = kwargs.get("scaling")
            scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
            self._write(layer, key, value, state)
            return self._attend(layer, query, key, value, scaling), None

        return call

    def end_step(self, completed: bool) -> None:
        """Counts the new tokens as written, unless the forward has raised."""
        if completed:
            for one in self.tokens:
                one.sequence.tokens += len(one.ids)

    def _write(self, layer: int, key: torch.Tensor, value: torch.Tensor, state: dict[str, torch.Tensor]) -> None:
        slots = self._slots[layer].flatten()
        for name, new in (("key", key), ("value", value)):
            buffer = self.buffers[name]
            buffer.index_copy_(0, slots, new.detach().reshape(-1, new.shape[-1]).to(buffer.dtype))
        for name, new in state.items():
            self.buffers[name].index_copy_(0, self._slots[layer][:, self.gated].flatten(), new.flatten())

    def _attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Attention of all new tokens; query `(1, num_heads, tokens, head_dim)`; `(1, tokens, num_heads, value_dim)`."""
        num_heads, count, dim = query.shape[1:]
        group = num_heads // self._heads
        out = query.new_empty(count, num_heads, value.shape[-1])
        if self._decodes is not None:
            rows = query[0, :, : self._single].transpose(0, 1).reshape(self._single, self._heads, group, dim)
            outputs, log_sums = self._parts(self._decodes, layer, rows, scaling, 0)
            out[: self._single] = merged(outputs, log_sums).reshape(self._single, num_heads, -1)
        for start, end, reads in self._prefills:
            own = query[0, :, start:end].reshape(self._heads, group, end - start, dim)
            new_key, new_value = (each[0, :, None, start:end].expand(-1, group, -1, -1) for each in (key, value))
            result, log_sum = attend_part(own, new_key, new_value, scaling, causal=True)
            if reads.num_parts:
                outputs, log_sums = self._parts(reads, layer, own.reshape(1, self._heads, -1, dim), scaling, 1)
                outputs[-1, 0], log_sums[-1, 0] = result.flatten(1, 2), log_sum.flatten(1, 2)
                result = merged(outputs, log_sums)[0].reshape(result.shape)
            out[start:end] = result.flatten(0, 1).transpose(0, 1)
        return out.unsqueeze(0)

    def _parts(
        self, reads: Reads, layer: int, query: torch.Tensor, scaling: float, more: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Results of all parts of the context and room for `more`.

        Args:
            query: `(rows, heads, n, head_dim)`: the n queries of each key/value head.

        Returns:
            `(parts, rows, heads, n, value_dim)` and fp32 `(parts, rows, heads, n)`.
        """
        keys, values = self.buffers["key"], self.buffers["value"]
        shape = (reads.num_parts + more, *query.shape[:3])
        outputs = query.new_zeros(*shape, values.shape[-1])
        log_sums = query.new_full(shape, HIDDEN, dtype=torch.float32)
        size = self.tokens[0].sequence.page_size
        for group in reads.gathered:
            rows, heads = len(group.rows), self._heads
            key, value = (
                buffer.view(-1, size * buffer.shape[-1]).index_select(0, group.pages[layer])
                .view(rows, heads, -1, buffer.shape[-1])
                for buffer in (keys, values)
            )  # fmt: skip
            mask = group.mask[layer if len(group.mask) > 1 else 0]
            result, log_sum = attend_part(query[group.rows], key, value, scaling, mask)
            outputs[group.parts, group.rows], log_sums[group.parts, group.rows] = result, log_sum
        for view in reads.views[layer]:
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
        for row, part, empty in reads.empty:
            log_sums[part, row].masked_fill_(empty[layer].unsqueeze(-1), HIDDEN)
        return outputs, log_sums


def forward(session: Any, cache: PackedCache, rows: Sequence[int]) -> torch.Tensor:
    """Runs the model over the new tokens of a packed cache, inside the session's `evict` block.

    Args:
        rows: indices of the sequences, in the order in which they were given to the cache, whose next token is wanted.

    Returns:
        Logits `(rows, vocab_size)` after each one's last new token.
    """
    ids, positions = cache.inputs()
    keep = torch.tensor([cache.last[row] for row in rows], dtype=torch.long, device=ids.device)
    model = session.model
    return model(
        input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=keep
    ).logits[0]
