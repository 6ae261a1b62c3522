"""Parts of a prompt's KV: cut out of a cache that has evicted nothing, and put together to a cache again.

What a part holds does not depend on what came after it, so parts of different requests fit together as far as their
prompts are the same. A compressed cache has no parts: it is exported and imported as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from .layer import RaggedLayer
from .restore import restore

if TYPE_CHECKING:
    from .cache import RaggedCache
    from .session import Session
    from .store import SegmentStore

Part = dict[str, torch.Tensor]


def check_parts(session: Session) -> None:
    """Raises ValueError unless the session's caches can be cut: every layer is ragged and nothing is accumulated."""
    cache = session.new_cache()
    others = {type(layer).__name__ for layer in cache.layers if not isinstance(layer, RaggedLayer)}
    if others:
        raise ValueError(
            f"{type(session.model).__name__} has cache layers of the kind {', '.join(sorted(others))}, whose contents "
            "depend on what came later; prompts are cached in parts for models with full attention only"
        )
    gathered = [f"a window of {session.window_size} queries"] * (session.window_size > 0)
    gathered += [session.observers.accumulated] * bool(session.observers.accumulated)
    gathered += ["hidden states"] * any("hidden_states" in policy.needs for policy in session.policies)
    if gathered:
        raise ValueError(
            f"{', '.join(policy.name for policy in session.policies)} need {', '.join(gathered)}, which a part of a "
            "prompt does not bring; policies that score entries by themselves are accepted, such as 'retention'"
        )


def part_of(cache: RaggedCache, start: int, stop: int, row: int | None = None) -> Part:
    """The KV of the tokens [start, stop) of a row that has evicted nothing; the caller owns it.

    Args:
        row: which; None if the cache has one.

    Returns:
        By name, `layers.I.key`, `.value` and the session's per-entry states, e.g. `.log_beta`: each
        `(1, num_kv_heads, stop - start, dim)`, dim 1 for states, which are fp32.
    Raises:
        ValueError: several rows and none is named, evicted entries, or tokens that the row has not seen.
    """
    rows = cache.tokens_seen.tolist()
    if row is None and len(rows) != 1:
        raise ValueError(f"got a cache of {len(rows)} rows; accepted: one, or the number of the row")
    row = row or 0
    if not 0 <= row < len(rows):
        raise ValueError(f"got row {row}; accepted: 0 to {len(rows) - 1}")
    tokens = rows[row]
    if not 0 <= start < stop <= tokens:
        raise ValueError(f"got the tokens [{start}, {stop}); accepted: some of the {tokens} that the row has seen")
    part: Part = {}
    for layer in cache.ragged:
        store = layer.store
        if store is None:
            continue
        heads = store.num_kv_heads
        if any(length != tokens for length in store.lengths[row * heads : (row + 1) * heads]):
            raise ValueError("the cache has evicted entries: export it as a whole")
        for name, entries in _cut(store, row, start, stop).items():
            part[f"layers.{layer.layer_idx}.{name}"] = entries.view(1, heads, stop - start, -1)
    return part


def _cut(store: SegmentStore, row: int, start: int, stop: int) -> dict[str, torch.Tensor]:
    """Copies `(num_kv_heads * (stop - start), …)` of entries of all heads of a row, positions apart, in one block."""
    from .ops.copies import entries_at

    buffers = {name: buffer for name, buffer in store.buffers.items() if name != "position"}
    return entries_at(buffers, store.dense_index()[0][row, :, start:stop].flatten())


def cache_of(session: Session, parts: Sequence[Mapping[str, torch.Tensor]]) -> RaggedCache:
    """A cache of one row under the session's plan that holds `parts` one after the other, as if they had been computed.

    Args:
        parts: see `part_of`; at least one. They are copied.

    Raises:
        ValueError: parts of another model, or of a session that records something else.
    """
    cache = session.new_cache()
    names = [f"layers.{layer.layer_idx}.{name}" for layer in cache.ragged for name in _entry_names(session, layer)]
    wrong = sorted({name for part in parts for name in part.keys() ^ set(names)})
    if wrong or not parts:
        differ = ", ".join(wrong) or "nothing"
        raise ValueError(f"got {len(parts)} parts that differ from what the session's caches hold in {differ}")
    sizes = [part[names[0]].shape[2] for part in parts]
    total = sum(sizes)
    tensors: dict[str, torch.Tensor] = {}
    documents = []
    for layer in cache.layers:
        assert isinstance(layer, RaggedLayer), "check_parts has been called"
        heads, start = layer.attention.num_kv_heads, f"layers.{layer.layer_idx}."
        for name in _entry_names(session, layer):
            whole = torch.cat([part[start + name] for part in parts], dim=2)
            if whole.shape[:3] != (1, heads, total):
                raise ValueError(f"{start}{name} are {tuple(whole.shape)}; accepted: (1, {heads}, {total}, …)")
            flat = whole.reshape(heads * total, -1)
            tensors[f"{start}entries.{name}"] = flat if name in ("key", "value") else flat.squeeze(1)
        lengths = None
        if _has_entries(layer):
            positions = torch.arange(total, dtype=torch.int32, device=session.model.device)
            tensors[f"{start}entries.position"] = positions.repeat(heads)
            lengths = [total] * heads
        documents.append({"kind": "RaggedLayer", "lengths": lengths, "scaling": layer.scaling})
    header = {
        "rows": {"tokens": [total], "runs": [total]},
        "last_eviction": 0,
        "counters": vars(cache._meter),
        "layers": documents,
    }
    restore(cache, header, tensors)
    return cache


def _entry_names(session: Session, layer: RaggedLayer) -> tuple[str, ...]:
    return ("key", "value", *session.entry_states) if _has_entries(layer) else ()


def _has_entries(layer: RaggedLayer) -> bool:
    """Whether the layer stores entries of its own; some models' layers read those of another."""
    return not getattr(layer.attention.module, "is_kv_shared_layer", False)
