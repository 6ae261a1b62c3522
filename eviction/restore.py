"""A cache put together from what a file says; whatever does not add up is refused, under `python -O` too."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch

from .compress import layout_of
from .layer import RaggedLayer
from .marks import Marks
from .paged import PagedStore, store_class
from .rows import Rows
from .statistics import QueryStatistics
from .store import SegmentStore

if TYPE_CHECKING:
    from .cache import RaggedCache

FOREIGN_NUMBERS = {"cumulative_length": int, "record_past": bool}  # beside keys and values of transformers' layers


def restore(cache: RaggedCache, header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Fills the new `cache`.

    Args:
        header, tensors: of a file, as `persist.save_cache` writes them.

    Raises:
        KeyError, TypeError, ValueError: something is missing, of another kind, or does not fit the rest or the model.
    """
    device = cache.session.model.device
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    rows = cache._rows = Rows.restored(header["rows"], under("rows.", tensors))
    cache._marks = Marks(_number(header["last_eviction"], "last_eviction"))
    if not rows.tokens or rows.columns == 0:
        raise ValueError("it has no rows")
    _refuse(rows.faults())
    _check_window_positions(rows, cache.ragged[0].ring_size)
    kinds = [type(layer).__name__ for layer in cache.layers]
    saved = [layer["kind"] for layer in header["layers"]]
    if saved != kinds:
        raise ValueError(f"it has the layers {saved}, the model's are {kinds}")
    for index, (layer, document) in enumerate(zip(cache.layers, header["layers"], strict=True)):
        own = under(f"layers.{index}.", tensors)
        if isinstance(layer, RaggedLayer):
            _fill_ragged(layer, document, own, rows)
        else:
            _fill_foreign(layer, document["numbers"], own, rows)
    if cache.plan.protect is not None:
        cache.plan.protect.check_rows(len(rows.tokens))
    rows.stored = cache._count()
    for name in vars(cache._meter):
        setattr(cache._meter, name, _number(header["counters"][name], name))
    _refuse(cache.faults())
    cache._layout = layout_of([layer for layer in cache.ragged if layer.store is not None])


def _fill_ragged(layer: RaggedLayer, document: dict[str, Any], own: dict[str, torch.Tensor], rows: Rows) -> None:
    attention, batch, buffers = layer.attention, len(rows.tokens), under("entries.", own)
    lengths = document["lengths"]
    if lengths is None:
        if own or not getattr(attention.module, "is_kv_shared_layer", False):
            raise ValueError(f"layer {layer.layer_idx} has no entries")
        layer.rewind(None, rows.columns)
        return
    key, value = buffers["key"], buffers["value"]
    if key.ndim != 2 or key.shape[1] != attention.head_dim or value.ndim != 2:
        raise ValueError(f"keys are {tuple(key.shape)}, the model's have {attention.head_dim} numbers a head")
    if not key.dtype.is_floating_point:
        raise ValueError(f"keys are {key.dtype}")
    kinds = {"key": key.dtype, "value": key.dtype, "position": torch.int32}
    for name, buffer in buffers.items():
        wanted = kinds.get(name, torch.float32)
        if buffer.dtype != wanted or (name not in ("key", "value") and buffer.ndim != 1):
            raise ValueError(f"{name} is {buffer.dtype} {tuple(buffer.shape)}, expected {wanted}, one number an entry")
    whole = isinstance(lengths, list) and all(type(length) is int and length >= 0 for length in lengths)
    if not whole or len(lengths) != batch * attention.num_kv_heads or sum(lengths) != len(key):
        raise ValueError("one length a segment, together as many as there are entries, is needed")
    layer.lazy_initialization(key.view(1, 1, *key.shape))
    layer.batch_size = batch
    layer.store = store_of(batch, attention.num_kv_heads, buffers, lengths)
    layer.rewind(lengths, rows.columns)
    layer.scaling = float(document["scaling"])
    if not 0 < layer.scaling < math.inf:
        raise ValueError(f"scaling is {layer.scaling}")
    heads = (batch, attention.num_heads)
    if layer.ring_size:
        layer.window = _shaped(own["window"], (*heads, layer.ring_size, attention.head_dim), "the window of queries")
    if layer.observers.rotary is not None:
        dim = attention.head_dim
        shapes = {"count": (batch,), "mean": (*heads, dim), "scatter": (*heads, dim, dim), "next_position": (batch,)}
        names = [field.name for field in fields(QueryStatistics)]
        layer.statistics = QueryStatistics(
            **{name: _shaped(own[f"statistics.{name}"], shapes[name], f"statistics.{name}") for name in names}
        )


def store_of(batch: int, num_kv_heads: int, buffers: dict[str, torch.Tensor], lengths: list[int]) -> SegmentStore:
    """The storage for entries that stand behind each other, segment by segment; it may adopt the buffers."""
    key, value = buffers["key"], buffers["value"]
    if store_class(key.device, key.dtype, key.shape[1], value.shape[1]) is PagedStore:
        return PagedStore.of_segments(batch, num_kv_heads, buffers, lengths)
    return SegmentStore(batch, num_kv_heads, buffers, lengths, lengths)


def _fill_foreign(layer: Any, numbers: Any, own: dict[str, torch.Tensor], rows: Rows) -> None:
    if numbers is None and not own:
        return
    keys, values = own["keys"], own["values"]
    for tensor in (keys, values):
        if tensor.ndim != 4 or tensor.shape[0] != len(rows.tokens) or tensor.shape[2] > rows.columns:
            raise ValueError(f"a layer that does not evict has {tuple(tensor.shape)} for {len(rows.tokens)} rows")
    wanted = {name: kind for name, kind in FOREIGN_NUMBERS.items() if hasattr(layer, name)}
    if not isinstance(numbers, dict) or {name: type(value) for name, value in numbers.items()} != wanted:
        raise ValueError(f"a layer that does not evict has {numbers}, expected {sorted(wanted)}")
    if numbers.get("cumulative_length", rows.columns) != rows.columns:
        raise ValueError(f"a layer that does not evict has seen another number of columns than {rows.columns}")
    layer.lazy_initialization(keys, values)
    vars(layer).update(keys=keys, values=values, **numbers)


def _check_window_positions(rows: Rows, ring: int) -> None:
    places = rows.window_positions
    if not ring:
        if places is not None:
            raise ValueError("it remembers queries that nobody asked for")
        return
    if places is None:
        raise ValueError("the positions of the remembered queries are missing")
    _shaped(places, (len(rows.tokens), ring), "the positions of the remembered queries")
    tokens = torch.tensor(rows.tokens, device=places.device).unsqueeze(1)
    slots = torch.arange(ring, device=places.device)
    if not bool(((places == -1) | ((places >= 0) & (places < tokens) & (places % ring == slots))).all()):
        raise ValueError("remembered queries are not of tokens seen, or not in their slots")


def _refuse(faults: Iterator[str]) -> None:
    for fault in faults:
        raise ValueError(fault)


def _shaped(tensor: torch.Tensor, shape: tuple[int, ...], name: str) -> torch.Tensor:
    if tensor.shape != shape:
        raise ValueError(f"{name} are {tuple(tensor.shape)}, expected {shape}")
    return tensor


def _number(value: Any, name: str) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{name} is {value!r}, not a number from 0 on")
    return value


def under(start: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those whose names begin with `start`, without it."""
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
