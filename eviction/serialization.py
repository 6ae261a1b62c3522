"""A cache put together from what a file says; whatever does not add up is refused, under `python -O` too.

A cache on disk: one safetensors file whose header says what it is; nothing in it can run code.

Its tensors are the entries of every layer, without free room, and what layers and rows remember beside them. The header
is JSON: schema, the model and gates it belongs to, plan, bookkeeping, and a list of all tensors.

Parts of a prompt's KV: cut out of a cache that has evicted nothing, and put together to a cache again.

What a part holds does not depend on what came after it, so parts of different requests fit together as far as their
prompts are the same. A compressed cache has no parts: it is exported and imported as a whole.

Several caches as the rows of one, so that one forward continues all of them.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_safetensors

from ..retention.checkpoint import fingerprint, write_atomic
from ..retention.gates import RetentionGates
from .cache_layer import RaggedLayer
from .forward_state import Rows
from .plan import plan_from_json, plan_to_json
from .policies.registry import get_policy
from .recorded import QueryStatistics
from .recorders import Observers
from .rollback import Marks, replaces_tensors
from .selection import layout_of
from .storage.paged import PagedStore, store_class
from .storage.segments import SegmentStore

if TYPE_CHECKING:
    from .cache import RaggedCache
    from .session import Session



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


SCHEMA_VERSION = 1
HEADER = "tenure_cache"


class CacheFileError(ValueError):
    """A file that does not hold a cache for this session; the message names the file and what is wrong with it."""


def save_cache(cache: RaggedCache, path: Path) -> None:
    """Writes `cache` to `path`, under a temporary name first; raises what `export_cache` raises."""
    header, tensors = export_cache(cache)
    tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
    write_atomic(path, save_safetensors(tensors, metadata={HEADER: json.dumps(header)}))


def export_cache(cache: RaggedCache) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The header of a file and its tensors: of the entries copies, the others may be the cache's own.

    Raises:
        ValueError: the cache is empty, or has layers that cannot be saved (state space).
    """
    if not cache.stores:
        raise ValueError("the cache is empty: run the model with it before it is saved")
    tensors: dict[str, torch.Tensor] = {}
    layers = []
    for index, layer in enumerate(cache.layers):
        values, document = _ragged(layer) if isinstance(layer, RaggedLayer) else _foreign(layer)
        tensors |= {f"layers.{index}.{name}": value.detach() for name, value in values.items()}
        layers.append(document)
    values, rows = cache._rows.exported()
    tensors |= {f"rows.{name}": value for name, value in values.items()}
    header = {
        "schema_version": SCHEMA_VERSION,
        "model": _model(cache.session),
        "gates": _gates(cache.session),
        "plan": plan_to_json(cache.plan),
        "rows": rows,
        "last_eviction": cache._marks.floor,
        "window_size": cache.session.window_size,
        "counters": vars(cache._meter),
        "layers": layers,
        "tensors": {name: _kind(value.dtype, value.shape) for name, value in tensors.items()},
    }
    return header, tensors


def load_cache(session: Session, path: str | os.PathLike) -> RaggedCache:
    """The cache saved at `path`, made anew in `session`; see `Session.load_cache`."""
    file = Path(path)
    header, tensors = _read(file)
    try:
        return import_cache(session, header, tensors)
    except CacheFileError as error:
        raise CacheFileError(f"{file}: {error}") from None
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError, RuntimeError) as error:
        raise CacheFileError(f"{file} cannot be used: {error}") from None


def import_cache(session: Session, header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> RaggedCache:
    """The cache that `export_cache` has described; the tensors become its own.

    Raises:
        CacheFileError: it does not fit the session.
        KeyError, TypeError, ValueError: something is missing, of another kind, or does not add up.
    """
    _check_fits(session, header, set(tensors))
    cache = session.new_cache()
    cache.plan = plan_from_json(header["plan"], session.policies)
    session.require_recorded(cache.plan.policy)
    restore(cache, header, tensors)
    return cache


def _ragged(layer: RaggedLayer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of a layer by name, and what else it takes to restore it."""
    from .ops.copy_entries import entries_at

    store = layer.store
    if store is None:
        return {}, {"kind": "RaggedLayer", "lengths": None}
    slots = store.places().index(range(len(store.lengths)), store.lengths)
    tensors = {f"entries.{name}": entries for name, entries in entries_at(store.buffers, slots).items()}
    if layer.window is not None:
        tensors["window"] = layer.window
    if layer.statistics is not None:
        names = [field.name for field in fields(QueryStatistics)]
        tensors |= {f"statistics.{name}": getattr(layer.statistics, name) for name in names}
    return tensors, {"kind": "RaggedLayer", "lengths": store.lengths, "scaling": layer.scaling}


def _foreign(layer: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    kind = type(layer).__name__
    if not replaces_tensors(layer):
        raise ValueError(f"a cache with layers of the kind {kind} cannot be saved")
    if not layer.is_initialized:
        return {}, {"kind": kind, "numbers": None}
    numbers = {name: getattr(layer, name) for name in FOREIGN_NUMBERS if hasattr(layer, name)}
    return {"keys": layer.keys, "values": layer.values}, {"kind": kind, "numbers": numbers}


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Header and tensors of a file that holds exactly what its header lists."""
    if not path.is_file():
        raise CacheFileError(f"no cache at {str(path)!r}; a file written by cache.save() is accepted")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(HEADER)
            # Clones: what safe_open gives are views of the mapped file.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()} if text else {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        raise CacheFileError(f"{path} ({size} bytes) is truncated or not a safetensors file: {error}") from None
    if text is None:
        raise CacheFileError(f"{path} is a safetensors file, but not a cache: cache.save() did not write it")
    try:
        header = json.loads(text)
        version = int(header["schema_version"])
        listed = {} if version > SCHEMA_VERSION else dict(header["tensors"])
    except (ValueError, KeyError, TypeError) as error:
        raise CacheFileError(f"{path} has a header that cannot be read: {error!r}") from None
    if version > SCHEMA_VERSION:
        raise CacheFileError(
            f"{path} has schema version {version}; this version of tenure reads up to {SCHEMA_VERSION}, a newer one is "
            "needed"
        )
    missing, extra = sorted(set(listed) - set(tensors)), sorted(set(tensors) - set(listed))
    found = {name: _kind(value.dtype, value.shape) for name, value in tensors.items()}
    wrong = [f"{name} {found[name]} instead of {listed[name]}" for name in sorted(set(listed) & set(found))
             if found[name] != listed[name]]
    if missing or extra or wrong:
        raise CacheFileError(f"{path} does not hold its cache: missing {missing}, unexpected {extra}, wrong {wrong}")
    return header, tensors


def _check_fits(session: Session, header: dict[str, Any], names: set[str]) -> None:
    """Raises CacheFileError unless `session` can go on with the cache."""
    saved, own = header["model"], _model(session)
    if any(saved[name] != own[name] for name in ("fingerprint", "dtype")):
        raise CacheFileError(f"it was saved from {_described(saved)}, this is {_described(own)}")
    if header["gates"] != _gates(session):
        raise CacheFileError(
            f"its log β come from {_gates_described(header['gates'])}, this session has "
            f"{_gates_described(_gates(session))}"
        )
    recorded = {name.split(".entries.")[1] for name in names if ".entries." in name} - {"key", "value", "position"}
    if any(".statistics." in name for name in names):
        recorded.add("query statistics")
    recorded.add(f"a window of {header['window_size']} queries")
    records = {*session.entry_states, f"a window of {session.window_size} queries"}
    if session.observers.rotary is not None:
        records.add("query statistics")
    if recorded != records:
        raise CacheFileError(
            f"it holds {', '.join(sorted(recorded))}, this session records {', '.join(sorted(records))}: open evict() "
            "with the policies (policy=, observe=) that the cache was made under"
        )


def _model(session: Session) -> dict[str, str]:
    config = session.model.config
    name = str(getattr(config, "_name_or_path", "") or type(session.model).__name__)
    return {"name": name, "fingerprint": fingerprint(session.model), "dtype": str(session.model.dtype)}


def _described(model: dict[str, str]) -> str:
    return f"{model['name']} ({model['dtype'].removeprefix('torch.')}, fingerprint {model['fingerprint']})"


def _gates(session: Session) -> str | None:
    """16 hex digits that tell the gates apart whose log β are recorded; None if none are."""
    if "log_beta" not in session.entry_states:
        return None
    assert isinstance(session.gates, RetentionGates), "log β come from gates"
    digest = hashlib.sha256()
    for name, tensor in sorted(session.gates.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _gates_described(gates: str | None) -> str:
    return "no gates" if gates is None else f"gates {gates}"


def _kind(dtype: torch.dtype, shape: torch.Size) -> list[Any]:
    return [str(dtype).removeprefix("torch."), list(shape)]


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
    from .ops.copy_entries import entries_at

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


def stack(caches: Sequence[RaggedCache]) -> RaggedCache:
    """A cache whose rows are those of `caches`, one after the other; they are copied and stay what they were.

    It is for answering: it evicts nothing, and nothing is remembered for policies, so it cannot be compressed or saved.

    Raises:
        ValueError: none are given, one is empty or of another session, or their shapes do not fit: caches of other
            numbers of columns are padded on the left, which transformers' own layers (sliding windows) do not allow.
    """
    _check(caches)
    first = caches[0]
    session = first.session
    for cache in caches:
        cache._settle(0)
    columns = max(cache.columns_seen for cache in caches)
    stacked = session.new_cache()
    stacked.observed = False
    stacked.plan = replace(session.plan.changed(get_policy("full"), 1.0), protect=None, prefill_chunk=None)
    stacked._rows = Rows.stacked([cache._rows for cache in caches], columns)
    for index, own in enumerate(zip(*(cache.layers for cache in caches), strict=True)):
        layer = stacked.layers[index]
        if isinstance(layer, RaggedLayer):
            _fill(layer, own, columns)
        else:
            stacked.layers[index] = _joined(own)
    stacked._rows.stored, stacked._marks = stacked._count(), Marks(columns)
    stacked._layout = layout_of([layer for layer in stacked.ragged if layer.store is not None])
    stacked._meter.note(stacked.entries, stacked.nbytes)
    return stacked


def _check(caches: Sequence[RaggedCache]) -> None:
    if not caches:
        raise ValueError("got no caches to stack; one or more are accepted")
    if any(cache.session is not caches[0].session for cache in caches):
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
    """Entries of the layers `own` as those of `layer`, row after row."""
    layer.observers, layer.ring_size = Observers(), 0
    stores = [each.store for each in own]
    if stores[0] is None:
        layer.rewind(None, columns)
        return
    names = [name for name in stores[0].buffers if name not in own[0].observers.state_keys]
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for store in stores:
        index, valid = store.dense_index()
        slots = index[valid]
        for name in names:
            parts[name].append(store.buffers[name][slots])
    buffers = {name: torch.cat(tensors) for name, tensors in parts.items()}
    lengths = [length for store in stores for length in store.lengths]
    batch = sum(store.batch for store in stores)
    layer.lazy_initialization(buffers["key"].view(1, 1, *buffers["key"].shape))
    layer.batch_size, layer.scaling = batch, own[0].scaling
    layer.store = store_of(batch, stores[0].num_kv_heads, buffers, lengths)
    layer.rewind(lengths, columns)


def _joined(own: Sequence[Any]) -> Any:
    """One of transformers' own layers with the rows of all, which have seen the same columns."""
    layer = copy.copy(own[0])
    for name, value in vars(own[0]).items():
        if isinstance(value, torch.Tensor) and value.ndim == 4:
            setattr(layer, name, torch.cat([getattr(each, name) for each in own]))
    return layer
