"""Several caches as the rows of one, so that one forward continues all of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from tenure.documents import shown

from ..retention.decoder_layers import replaces_tensors
from .cache import RaggedCache
from .cache_layer import LayerObserver, RaggedLayer
from .forward_state import SequenceState
from .policies.registry import get_policy
from .storage.paged_store import store_of


def stack(caches: Sequence[RaggedCache]) -> RaggedCache:
    """A cache with the rows of `caches` in order; these are copied and left as they were.

    It is for answering: it evicts nothing and records nothing for policies, so it cannot be compressed or saved.

    Raises:
        ValueError: no caches, one is empty or of another session, or their shapes do not fit: caches with different
            numbers of columns are padded on the left, which transformers' own layers (sliding windows) do not allow.
    """
    _check(caches)
    for cache in caches:
        cache.apply_deferred()
    columns = max(cache.columns_seen for cache in caches)
    stacked = caches[0].recording.new_cache()
    stacked.observed = False
    plan = stacked.plan.changed(get_policy("full"), 1.0)
    stacked.plan = replace(plan, protect=None, token_floors=(), prefill_chunk=None)
    for index, own in enumerate(zip(*(cache.layers for cache in caches), strict=True)):
        layer = stacked.layers[index]
        if isinstance(layer, RaggedLayer):
            _fill(layer, own, columns)
        else:
            stacked.layers[index] = _joined(own)
    stacked.adopt(SequenceState.stacked([cache.rows for cache in caches], columns), columns)
    stacked.counters.record_size(stacked.entries, stacked.nbytes)
    return stacked


def _check(caches: Sequence[RaggedCache]) -> None:
    if not isinstance(caches, Sequence) or not caches:
        got = "no caches" if isinstance(caches, Sequence) else shown(caches)
        raise ValueError(f"got {got} to stack; accepted: a list of one or more caches")
    foreign = [cache for cache in caches if not isinstance(cache, RaggedCache)]
    if foreign:
        raise ValueError(f"got {shown(foreign[0])} to stack; accepted: caches of this session")
    if any(cache.recording is not caches[0].recording for cache in caches):
        raise ValueError("the caches to stack belong to different evict() blocks")
    if any(cache.columns_seen == 0 for cache in caches):
        raise ValueError("a cache to stack is empty: run the model with it first")
    sizes = sorted({cache.columns_seen for cache in caches})
    others = {type(layer).__name__ for layer in caches[0].layers if not isinstance(layer, RaggedLayer)}
    if len(sizes) > 1 and others:
        raise ValueError(f"caches of {sizes} columns cannot be stacked: {', '.join(sorted(others))} allow no padding")
    fixed = {type(x).__name__ for x in caches[0].layers if not (isinstance(x, RaggedLayer) or replaces_tensors(x))}
    if fixed:
        raise ValueError(f"layers of the kind {', '.join(sorted(fixed))} cannot be stacked")


def _fill(layer: RaggedLayer, own: Sequence[Any], columns: int) -> None:
    """Fills `layer` with copies of the entries of the layers `own`, row after row."""
    layer.observers, layer.ring_size = LayerObserver(), 0
    stores = [each.store for each in own]
    if stores[0] is None:
        layer.rewind(None, columns)
        return
    names = [name for name in stores[0].buffers if name not in own[0].observers.state_keys]
    copies: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for store in stores:
        index, valid = store.dense_index()
        slots = index[valid]
        for name in names:
            copies[name].append(store.buffers[name][slots])
    buffers = {name: torch.cat(tensors) for name, tensors in copies.items()}
    lengths = [length for store in stores for length in store.lengths]
    batch = sum(store.batch for store in stores)
    layer.lazy_initialization(buffers["key"].view(1, 1, *buffers["key"].shape))
    layer.batch_size, layer.scaling = batch, own[0].scaling
    layer.store = store_of(batch, stores[0].num_kv_heads, buffers, lengths)
    layer.rewind(lengths, columns)


def _joined(own: Sequence[Any]) -> Any:
    """One of transformers' own layers with the rows of all `own`, which have seen the same columns."""
    layer = copy.copy(own[0])
    for name, value in vars(own[0]).items():
        if isinstance(value, torch.Tensor) and value.ndim == 4:
            setattr(layer, name, torch.cat([getattr(each, name) for each in own]))
    return layer
