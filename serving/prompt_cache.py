"""Computes and compresses prompts, between the caches of an eviction session and the pages of the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..eviction import Policy, RaggedCache, Session
from ..eviction.cache_layer import RaggedLayer
from ..eviction.presets import make_plan
from ..eviction.serialization import cache_of_slices, check_sliceable, slice_of
from ..eviction.storage.packing import entries_at
from .kvcache.base import KVPayload, TensorPayload
from .kvcache.page_pool import PageBuilder, PageGeometry, PagePayload, PagePool
from .kvcache.paged_sequence import PagedSequence

MAX_PAGE_SIZE = 16  # entries: half a page is lost in each head of a compressed prompt


@dataclass(frozen=True)
class Compression:
    """How an agent's fixed prompt is compressed: once, right after it was computed, before any other token.

    Attributes:
        policy, budget, scope, sinks, recent: as in `evict`; the budget counts tokens of the fixed prompt.

    Raises:
        ValueError: an unknown policy, or no budget.
    """

    policy: str | Policy = "retention"
    budget: float | int | str = 0.25
    scope: str | None = None
    sinks: int | None = None
    recent: int | None = None

    def __post_init__(self) -> None:
        make_plan(self.policy, self.budget, scope=self.scope, sinks=self.sinks, recent=self.recent)


def page_geometry(session: Session, page_size: int) -> PageGeometry:
    """The pages that a session's model needs.

    Args:
        page_size: tokens per page of the prefix tree, which consists of whole pages of entries.

    Raises:
        ValueError: layers of different shapes, or states other than log β.
    """
    layers = session.new_cache().ragged
    shapes = {(layer.attention.num_kv_heads, layer.attention.head_dim) for layer in layers}
    if len(shapes) > 1:
        given = ", ".join(f"{heads} heads of {dim}" for heads, dim in sorted(shapes))
        raise ValueError(f"got a model whose layers have {given}; accepted: models whose layers are alike")
    others = [name for name in session.entry_states if name != "log_beta"]
    if others:
        raise ValueError(f"got a session that records {', '.join(others)}; accepted: policies that need at most log β")
    ((heads, dim),) = shapes
    dtype = session.model.dtype
    states = tuple((name, torch.float32, 0) for name in session.entry_states)
    entry = (("key", dtype, dim), ("value", dtype, dim), *states)
    return PageGeometry(tuple(layer.layer_idx for layer in layers), heads, entry, math.gcd(page_size, MAX_PAGE_SIZE))


class PromptKV:
    """Computes prompts with a session, compresses them, and moves their entries into pages.

    Args:
        session: inside its `evict` block.
        page_size: tokens per page of the prefix tree.
    Attributes:
        geometry: of the pages.

    Raises:
        ValueError: the model or the policy keeps KV that cannot be separated by tokens, see `check_sliceable`, or as
            `page_geometry`.
    """

    def __init__(self, session: Session, page_size: int = MAX_PAGE_SIZE) -> None:
        check_sliceable(session.recording)
        self.session, self.geometry = session, page_geometry(session, page_size)

    def bytes_per_token(self) -> int:
        """Bytes of KV per token of a plain prompt."""
        return self.geometry.token_bytes

    def forward(self, cache: RaggedCache, ids: Sequence[int] | Any) -> torch.Tensor:
        """Extends `cache` by a row of tokens; returns the logits `(vocab,)` of the last one."""
        tokens = torch.as_tensor(ids, dtype=torch.long).view(1, -1)
        return self.session.extend(cache, tokens, logits_to_keep=1)[0, -1]

    @staticmethod
    def compress(cache: RaggedCache, how: Compression) -> None:
        """Compresses the entries of `cache`; tokens that follow are kept whole."""
        cache.compress(how.policy, how.budget, how.scope, sinks=how.sinks, recent=how.recent)
        cache.compress("full", 1.0)

    def compute(self, prompt: Sequence[int], how: Compression | None = None) -> TensorPayload:
        """Computes the KV of a prompt, compressed by `how`, outside the pages; None: plain, whole pages."""
        cache = self.session.new_cache()
        self.forward(cache, prompt)
        if how is None:
            return TensorPayload(slice_of(cache, 0, len(prompt)), len(prompt), token_dim=-2)
        self.compress(cache, how)
        return self.export_compressed(cache)

    def export_compressed(self, cache: RaggedCache) -> TensorPayload:
        """All entries that `cache`, of one row, has kept, each head padded to whole pages, as `PagePayload.kinds`."""
        tensors: dict[str, torch.Tensor] = {}
        for layer in cache.ragged:
            entries, lengths = self._padded(layer)
            start = f"layers.{layer.layer_idx}."
            tensors[start + "lengths"] = lengths
            tensors |= {start + name: one.reshape(len(one), -1) for name, one in entries.items()}
        return TensorPayload(tensors, cache.columns_seen, token_dim=None)

    def _padded(self, layer: RaggedLayer) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Entries of a layer by name, `(pages * page_size, …)`, and each head's length, int32."""
        store, size = layer.store, self.geometry.page_size
        assert store is not None, "the cache has entries"
        index, valid = (each[0] for each in store.dense_index())
        # Free slots of a head's last page get a copy of its last entry: they are never read.
        width = -(-index.shape[1] // size) * size
        place = torch.arange(width, device=index.device)
        lengths = valid.sum(1)
        source = index.gather(1, torch.minimum(place, (lengths - 1).clamp(min=0).unsqueeze(1)))
        wanted = place < (-(-lengths // size) * size).unsqueeze(1)
        buffers = {name: store.buffers[name] for name, _, _ in self.geometry.entry}
        return entries_at(buffers, source[wanted]), lengths.to(torch.int32)

    def compress_pages(self, sequence: PagedSequence, how: Compression) -> PagePayload:
        """Compresses a plain sequence, which is of no use then: its pages make room for those of the result."""
        payload = self._compressed(sequence, how)
        sequence.release()
        return in_pages(sequence.pool, payload)

    def _compressed(self, sequence: PagedSequence, how: Compression) -> TensorPayload:
        pool, heads, tokens = sequence.pool, self.geometry.num_kv_heads, sequence.tokens
        slots = torch.from_numpy(sequence.slots(0, tokens)).to(pool.device)
        content = {}
        for place, layer in enumerate(self.geometry.layers):
            entries = entries_at(pool.buffers, slots[place * heads : (place + 1) * heads].flatten())
            content |= {f"layers.{layer}.{name}": one.view(1, heads, tokens, -1) for name, one in entries.items()}
        cache = cache_of_slices(self.session.recording, [content])
        self.compress(cache, how)
        return self.export_compressed(cache)


def in_pages(pool: PagePool, payload: KVPayload) -> PagePayload:
    """A copy of `payload` in pages; MemoryError if there are too few free ones."""
    builder = PageBuilder(pool, payload)
    for layer in range(len(payload.layers)):
        builder.write(layer, payload.read(layer))
    return builder.commit()
