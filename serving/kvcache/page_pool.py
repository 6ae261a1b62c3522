"""The pages of the device tier: one buffer for all prompts, requests, layers and heads, and who holds which page.

A page has `page_size` entries of one head of one layer. Prompts and requests hold page numbers, with a reference on
each page; storing, sharing, splitting and joining move page numbers, never entries. All buffers are allocated once.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .base import Kind, KVPayload, record_event, use_on_stream
from .free_ranges import FreeRanges

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PageGeometry:
    """The entries that a model stores for each token: the same in every layer and head.

    Attributes:
        layers: indices of the layers in the decoder.
        num_kv_heads: heads of each layer.
        entry: name, dtype and width of each buffer of an entry: keys and values in the model's dtype, states in fp32
            with width 0 (a number, not a vector).
        page_size: entries per page.
    """

    layers: tuple[int, ...]
    num_kv_heads: int
    entry: tuple[tuple[str, torch.dtype, int], ...]
    page_size: int

    @property
    def segments(self) -> int:
        """Segments of a prompt: one for each head of each layer, in this order."""
        return len(self.layers) * self.num_kv_heads

    @property
    def entry_bytes(self) -> int:
        return sum(dtype.itemsize * max(1, width) for _, dtype, width in self.entry)

    @property
    def page_bytes(self) -> int:
        return self.entry_bytes * self.page_size

    @property
    def token_bytes(self) -> int:
        """Bytes of a token that every head keeps."""
        return self.entry_bytes * self.segments


class PagePool:
    """Pages and their references. `allocate` is called by one thread at a time; references may end on any thread.

    Args:
        geometry: of the model.
        nbytes: bytes of all buffers, rounded down to whole pages.
        device: of the buffers.
    Attributes:
        buffers: by name, `(num_pages * page_size, width)`, or `(num_pages * page_size,)` for a state.
        num_pages: pages in all.

    Raises:
        ValueError: not one page fits.
    """

    def __init__(self, geometry: PageGeometry, nbytes: int, device: str | torch.device) -> None:
        import torch

        self.geometry, self.num_pages = geometry, nbytes // geometry.page_bytes
        if self.num_pages < 1:
            raise ValueError(f"got {nbytes} bytes for pages of {geometry.page_bytes}; accepted: one page or more")
        slots = self.num_pages * geometry.page_size
        self.buffers: dict[str, torch.Tensor] = {
            name: torch.empty((slots, width) if width else (slots,), dtype=dtype, device=device)
            for name, dtype, width in geometry.entry
        }
        self.device = torch.device(device)
        self._references = np.zeros(self.num_pages, np.int32)
        self._free = FreeRanges()
        self._free.add(0, self.num_pages)
        self._returned: deque[np.ndarray] = deque()  # the collector may drop pages at any moment, on any thread
        self._busy = threading.Lock()

    @property
    def nbytes(self) -> int:
        return self.num_pages * self.geometry.page_bytes

    @property
    def num_free(self) -> int:
        with self._busy:
            self._collect()
            return self._free.total

    def allocate(self, count: int) -> Pages:
        """`count` pages, one after the other where the free memory allows it; else in as few runs as possible.

        Raises:
            MemoryError: fewer are free.
        """
        with self._busy:
            self._collect()
            if count > self._free.total:
                raise MemoryError(f"{count} pages are asked for, {self._free.total} are free")
            numbers, missing = [], count
            while missing:
                size = min(missing, self._free.longest)
                start = self._free.take(size)
                assert start is not None, "the longest range has that many"
                numbers.append(np.arange(start, start + size, dtype=np.int32))
                missing -= size
            pages = np.concatenate(numbers) if numbers else np.zeros(0, np.int32)
            return self._held(pages)

    def share(self, numbers: np.ndarray) -> Pages:
        """Further references on pages that are held.

        Args:
            numbers: int32, any shape, each page once.
        """
        with self._busy:
            return self._held(np.array(numbers, np.int32))

    def _held(self, numbers: np.ndarray) -> Pages:
        self._references[numbers] += 1
        numbers.flags.writeable = False
        return Pages(numbers, self._returned)

    def _collect(self) -> None:
        """Takes back the pages whose last reference has ended."""
        while self._returned:
            numbers = self._returned.popleft().ravel()
            self._references[numbers] -= 1
            free = np.sort(numbers[self._references[numbers] == 0])
            if not len(free):
                continue
            for run in np.split(free, np.flatnonzero(np.diff(free) != 1) + 1):
                self._free.add(int(run[0]), int(run[-1]) + 1)

    def slots(self, pages: np.ndarray) -> np.ndarray:
        """Flat indices of the entries of `pages`, int64 `(*pages.shape, page_size)`."""
        size = self.geometry.page_size
        return pages[..., None].astype(np.int64) * size + np.arange(size)

    def read(self, pages: np.ndarray) -> dict[str, torch.Tensor]:
        """Copies of the entries of `pages` `(n,)`: by name `(n * page_size, width)`, packed in one block."""
        import torch

        from ...eviction.storage.packing import entries_at

        slots = torch.from_numpy(self.slots(pages).ravel())
        return entries_at(self.buffers, slots.to(self.device))

    def write(self, pages: np.ndarray, entries: Mapping[str, torch.Tensor]) -> None:
        """Fills `pages` `(n,)` with entries `(n * page_size, width)` by name; from any device."""
        import torch

        device = self.device
        slots = torch.from_numpy(self.slots(pages).ravel()).to(device, non_blocking=True)
        for name, buffer in self.buffers.items():
            new = entries[name].to(device, non_blocking=True)
            buffer.index_copy_(0, slots, new.reshape(len(slots), *buffer.shape[1:]))

    def clear(self, pages: np.ndarray) -> None:
        """Fills `pages` `(n,)` with zeros: a masked entry must be finite, and somebody's may not have been."""
        import torch

        index = torch.from_numpy(pages.astype(np.int64)).to(self.device)
        for buffer in self.buffers.values():
            buffer.view(self.num_pages, -1).index_fill_(0, index, 0)

    def check(self) -> None:
        """Raises AssertionError unless every page is held or free."""
        with self._busy:
            self._collect()
            assert (self._references >= 0).all(), "references end once"
            assert self._free.total == int((self._references == 0).sum()), "what nobody holds is free"


class Pages:
    """References on pages, which end with `release`, or with this object.

    Attributes:
        numbers: int32, each page once, of any shape; read only.
        release: ends the references; no effect the second time. On any thread.
    """

    __slots__ = ("__weakref__", "numbers", "release")

    def __init__(self, numbers: np.ndarray, returned: deque[np.ndarray]) -> None:
        self.numbers = numbers
        self.release = weakref.finalize(self, returned.append, numbers)
        self.release.atexit = False


@dataclass(frozen=True, eq=False)
class PagePayload:
    """The KV of a token span in pages of the device: plain, or a compressed prompt whose heads keep different numbers.

    Attributes:
        pool: of the pages.
        held: its references.
        table: int32 `(segments, pages)` of a plain span. Of a compressed prompt the pages of all segments, one after
            the other, `(pages,)`.
        tokens: tokens that it stands for.
        lengths: int32 `(segments,)`: entries of each segment of a compressed prompt; None: a plain span.
        written: an event of the stream that wrote the entries; None on a CPU.
    """

    pool: PagePool
    held: Pages
    table: np.ndarray
    tokens: int
    lengths: np.ndarray | None = None
    written: Any = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "written", record_event(self.pool.device))  # the dataclass is frozen

    @property
    def nbytes(self) -> int:
        return self.table.size * self.pool.geometry.page_bytes

    @property
    def device(self) -> torch.device:
        return self.pool.device

    @property
    def divisible(self) -> bool:
        return self.lengths is None

    @property
    def token_dim(self) -> int | None:
        return -2 if self.lengths is None else None

    @property
    def joins_freely(self) -> bool:
        """Joining it with another copies no entries."""
        return True

    @property
    def layers(self) -> tuple[int, ...]:
        size = self.pool.geometry.page_bytes
        if self.lengths is None:
            return (self.pool.geometry.num_kv_heads * self.table.shape[1] * size,) * len(self.pool.geometry.layers)
        # The heads' lengths travel with a layer: 4 bytes each.
        return tuple(int(n) * size + self.pool.geometry.num_kv_heads * 4 for n in self._pages_of_layers())

    def _pages_of_layers(self) -> np.ndarray:
        assert self.lengths is not None
        return pages_of(self.lengths, self.pool.geometry.page_size).reshape(len(self.pool.geometry.layers), -1).sum(1)

    def kinds(self) -> dict[str, Kind]:
        import torch

        geometry, kinds = self.pool.geometry, {}
        heads, size = geometry.num_kv_heads, geometry.page_size
        for place, layer in enumerate(geometry.layers):
            if self.lengths is None:
                shape: tuple[int, ...] = (1, heads, self.tokens)
            else:
                shape = (int(self._pages_of_layers()[place]) * size,)
                kinds[f"layers.{layer}.lengths"] = torch.int32, (heads,)
            for name, dtype, width in geometry.entry:
                kinds[f"layers.{layer}.{name}"] = dtype, (*shape, max(1, width))
        return kinds

    def read(self, layer: int) -> dict[str, torch.Tensor]:
        import torch

        use_on_stream(self.pool.device, self.pool.buffers.values(), self.written)
        geometry, heads = self.pool.geometry, self.pool.geometry.num_kv_heads
        start = f"layers.{geometry.layers[layer]}."
        if self.lengths is None:
            entries = self.pool.read(self.table[layer * heads : (layer + 1) * heads].ravel())
            return {start + name: one.view(1, heads, self.tokens, -1) for name, one in entries.items()}
        ends = np.cumsum(self._pages_of_layers())
        first = 0 if layer == 0 else int(ends[layer - 1])
        entries = self.pool.read(self.table[first : int(ends[layer])])
        lengths = torch.from_numpy(self.lengths[layer * heads : (layer + 1) * heads].copy())
        found = {start + "lengths": lengths.to(self.pool.device)}
        return found | {start + name: one.view(len(one), -1) for name, one in entries.items()}

    def split(self, at: int) -> tuple[PagePayload, PagePayload]:
        """The first `at` tokens, whole pages, and the rest. No entry is copied: both hold their pages themselves."""
        size = self.pool.geometry.page_size
        assert self.divisible and 0 < at < self.tokens and at % size == 0, "only divisible payloads, between pages"
        first, rest = self.table[:, : at // size], self.table[:, at // size :]
        return plain_payload(self.pool, first), plain_payload(self.pool, rest)

    def join(self, other: KVPayload) -> PagePayload | None:
        if not isinstance(other, PagePayload) or other.pool is not self.pool:
            return None
        if not (self.divisible and other.divisible):
            return None
        return plain_payload(self.pool, np.concatenate([self.table, other.table], axis=1))


def plain_payload(pool: PagePool, table: np.ndarray) -> PagePayload:
    """A payload with references of its own on the pages of `table`, int32 `(segments, pages)`."""
    held = pool.share(table)
    return PagePayload(pool, held, held.numbers, table.shape[1] * pool.geometry.page_size)


def pages_of(lengths: np.ndarray, page_size: int) -> np.ndarray:
    """Pages for so many entries each, int32."""
    return -(-lengths // page_size)


def pages_for(payload: KVPayload, geometry: PageGeometry) -> int:
    """Pages that a copy of `payload`, as `PagePayload.kinds` describes it, takes.

    Raises:
        ValueError: a payload of another kind or model.
    """
    if isinstance(payload, PagePayload):
        return payload.table.size
    kinds, total = payload.kinds(), 0
    entry = {name: (dtype, max(1, width)) for name, dtype, width in geometry.entry}
    plain = payload.token_dim is not None
    parts = [*entry, *([] if plain else ["lengths"])]
    names = {f"layers.{layer}.{name}" for layer in geometry.layers for name in parts}
    if names != set(kinds):
        differ = ", ".join(sorted(names ^ set(kinds))[:4])
        raise ValueError(f"got a payload that differs from the engine's pages in {differ}")
    for layer in geometry.layers:
        for name, (dtype, width) in entry.items():
            given, shape = kinds[f"layers.{layer}.{name}"]
            whole = (1, geometry.num_kv_heads, payload.tokens) if plain else shape[:1]
            if given != dtype or shape != (*whole, width) or (shape[-2] % geometry.page_size):
                raise ValueError(
                    f"got layers.{layer}.{name} {tuple(shape)} of {given}; accepted: {(*whole, width)} of {dtype}, "
                    f"whole pages of {geometry.page_size}"
                )
        entries = kinds[f"layers.{layer}.key"][1]
        total += (geometry.num_kv_heads if plain else 1) * entries[-2] // geometry.page_size
    return total


class PageBuilder:
    """Copies a payload of another tier into pages, layer by layer; see `memory_pool.PayloadBuilder`."""

    def __init__(self, pool: PagePool, payload: KVPayload) -> None:
        self._pool, self._tokens, self._plain = pool, payload.tokens, payload.token_dim is not None
        self._held = pool.allocate(pages_for(payload, pool.geometry))
        self.device = pool.device
        self._at = 0
        self._lengths: list[torch.Tensor] = []
        geometry = pool.geometry
        if self._plain:
            self._table = self._held.numbers.reshape(geometry.segments, -1)
        else:
            self._table = self._held.numbers

    def write(self, layer: int, tensors: dict[str, torch.Tensor]) -> None:
        geometry = self._pool.geometry
        start = f"layers.{geometry.layers[layer]}."
        entries = {name: tensors[start + name] for name, _, _ in geometry.entry}
        count = entries["key"].shape[:-1].numel() // geometry.page_size
        self._pool.write(self._held.numbers[self._at : self._at + count], entries)
        self._at += count
        if not self._plain:
            self._lengths.append(tensors[start + "lengths"].cpu())

    def commit(self) -> PagePayload:
        import torch

        lengths = None if self._plain else torch.cat(self._lengths).to(torch.int32).numpy()
        size = self._pool.geometry.page_size
        if lengths is not None and (filled := int(pages_of(lengths, size).sum())) != self._table.size:
            raise ValueError(
                f"got a compressed prompt of {self._table.size} pages whose heads fill {filled}; accepted: pages of "
                f"{size} entries"
            )
        return PagePayload(self._pool, self._held, self._table, self._tokens, lengths)

    def abort(self) -> None:
        self._held.release()
