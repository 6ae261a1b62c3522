"""Caches as files and as tensors: save and load, export and import, and slices of a prompt's KV.

A file is one safetensors file whose header says what it contains; nothing in it can run code. Its tensors are the
entries of every layer, without free slots, and what layers and rows have recorded. The header is JSON: schema, model
and gates, plan, bookkeeping, and a list of all tensors. A file that is inconsistent is refused, under `python -O` too.

A slice is the KV of consecutive tokens of a row that has evicted nothing. It does not depend on the tokens after it, so
slices of different requests can be joined as far as their prompts agree. A compressed cache has no slices: it is
exported and imported as a whole.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_safetensors
from transformers.cache_utils import DynamicLayer

from tenure.documents import DocumentLimits, parse_json, plain_line, shown

from ..retention.checkpoint import fingerprint, write_atomic
from ..retention.decoder_layers import execution_device, layer_device, replaces_tensors
from .cache import RaggedCache, Recording
from .cache_layer import RaggedLayer
from .forward_state import SequenceState
from .plan import plan_from_json, plan_to_json
from .recorded import QueryStatistics
from .storage.packing import entries_at
from .storage.paged_store import store_of
from .storage.segment_store import SegmentStore

SCHEMA_VERSION = 1
HEADER = "tenure_cache"  # key of the header in the file's metadata
HEADER_LIMITS = DocumentLimits(items=1 << 20, values=1 << 22)  # lengths of all heads and rows
MAX_MAGNITUDE = 1e6  # of keys, values and queries: none of a model's come near; beyond, their products would overflow
FOREIGN_NUMBERS = {"cumulative_length": int, "record_past": bool}  # of transformers' layers
KVSlice = dict[str, torch.Tensor]


class CacheFileError(ValueError):
    """A file that does not hold a cache for this session; the message names the file and the reason."""


def save_cache(cache: RaggedCache, path: Path) -> None:
    """Writes `cache` to `path`, under a temporary name first; raises as `export_cache`."""
    header, tensors = export_cache(cache)
    tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
    write_atomic(path, save_safetensors(tensors, metadata={HEADER: json.dumps(header)}))


def load_cache(recording: Recording, path: str | os.PathLike) -> RaggedCache:
    """A cache with the contents of the file; see `Session.load_cache`."""
    if not isinstance(path, str | os.PathLike):
        raise CacheFileError(f"got {shown(path)} as path; accepted: that of a file written by cache.save()")
    file = Path(path)
    header, tensors = _read(file)
    try:
        return import_cache(recording, header, tensors)
    except CacheFileError as error:
        raise CacheFileError(f"{file}: {error}") from None
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError, RuntimeError) as error:
        raise CacheFileError(f"{file} cannot be used: {plain_line(error)}") from None


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Header and tensors of a file, whose tensors must be exactly those that the header lists."""
    if not path.is_file():  # nor a device
        raise CacheFileError(f"no cache at {str(path)!r}; a file written by cache.save() is accepted")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(HEADER)
            # Clones: safe_open returns views of the mapped file.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()} if text else {}  # noqa: SIM118
    except (SafetensorError, KeyError, OSError) as error:  # KeyError: a dtype that torch does not have
        size = path.stat().st_size
        raise CacheFileError(
            f"{path} ({size} bytes) is truncated or not a safetensors file: {plain_line(error)}"
        ) from None
    if text is None:
        raise CacheFileError(f"{path} is a safetensors file, but not a cache: cache.save() did not write it")
    try:
        header = parse_json(text, "the header", HEADER_LIMITS)
        version = int(header["schema_version"])
        listed = {} if version > SCHEMA_VERSION else dict(header["tensors"])
    except (ValueError, KeyError, TypeError) as error:
        raise CacheFileError(f"{path} has a header that cannot be read: {plain_line(repr(error))}") from None
    if version > SCHEMA_VERSION:
        raise CacheFileError(
            f"{path} has schema version {version}; this version of tenure reads up to {SCHEMA_VERSION}, a newer one is "
            "needed"
        )
    missing, extra = sorted(set(listed) - set(tensors)), sorted(set(tensors) - set(listed))
    found = {name: _kind(value.dtype, value.shape) for name, value in tensors.items()}
    wrong = [
        f"{name} {found[name]} instead of {plain_line(listed[name], 60)}"
        for name in sorted(set(listed) & set(found))
        if found[name] != listed[name]
    ]
    if missing or extra or wrong:
        raise CacheFileError(
            f"{path} does not hold its cache: missing {plain_line(missing)}, unexpected {plain_line(extra)}, wrong "
            f"{plain_line(wrong)}"
        )
    return header, tensors


def _check_fits(recording: Recording, header: dict[str, Any], names: set[str]) -> None:
    """Raises CacheFileError unless the cache was made with the same model, gates and recorded data."""
    saved, own = header["model"], _model(recording)
    if any(saved[name] != own[name] for name in ("fingerprint", "dtype")):
        raise CacheFileError(f"it was saved from {_described(saved)}, this is {_described(own)}")
    if header["gates"] != _gates(recording):
        raise CacheFileError(
            f"its log β come from {_gates_described(header['gates'])}, this session has "
            f"{_gates_described(_gates(recording))}"
        )
    recorded = {name.split(".entries.")[1] for name in names if ".entries." in name} - {"key", "value", "position"}
    if any(".statistics." in name for name in names):
        recorded.add("query statistics")
    recorded.add(f"a window of {header['window_size']} queries")
    records = {*recording.entry_states, f"a window of {recording.window_size} queries"}
    if recording.observers.rotary is not None:
        records.add("query statistics")
    if recorded != records:
        raise CacheFileError(
            f"it holds {', '.join(sorted(recorded))}, this session records {', '.join(sorted(records))}: open evict() "
            "with the policies (policy=, observe=) that the cache was made under"
        )


def _model(recording: Recording) -> dict[str, str]:
    model = recording.model
    name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    return {"name": name, "fingerprint": fingerprint(model), "dtype": str(model.dtype)}


def _described(model: dict[str, str]) -> str:
    return f"{model['name']} ({model['dtype'].removeprefix('torch.')}, fingerprint {model['fingerprint']})"


def _gates(recording: Recording) -> str | None:
    """16 hex digits that identify the gates whose log β are recorded; None if none are."""
    if "log_beta" not in recording.entry_states:
        return None
    assert recording.gates is not None, "log β come from gates"
    digest = hashlib.sha256()
    for name, tensor in sorted(recording.gates.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _gates_described(gates: str | None) -> str:
    return "no gates" if gates is None else f"gates {gates}"


def _kind(dtype: torch.dtype, shape: torch.Size) -> list[Any]:
    return [str(dtype).removeprefix("torch."), list(shape)]


def export_cache(cache: RaggedCache) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The header and tensors of a file: entries are copied, other tensors may be the cache's own.

    Raises:
        ValueError: the cache is empty, has layers that cannot be saved (state space), or is of a model in tensor
            parallel, of which a process has a part.
    """
    if cache.ragged[0].attention.shards.count > 1:
        raise ValueError("got a cache of a model in tensor parallel; accepted: one whose process has all heads")
    if not cache.stores:
        raise ValueError("the cache is empty: run the model with it before it is saved")
    tensors: dict[str, torch.Tensor] = {}
    layers = []
    for index, layer in enumerate(cache.layers):
        values, document = _ragged(layer) if isinstance(layer, RaggedLayer) else _foreign(layer)
        tensors |= {f"layers.{index}.{name}": value.detach() for name, value in values.items()}
        layers.append(document)
    values, rows = cache.rows.export()
    tensors |= {f"rows.{name}": value for name, value in values.items()}
    header = {
        "schema_version": SCHEMA_VERSION,
        "model": _model(cache.recording),
        "gates": _gates(cache.recording),
        "plan": plan_to_json(cache.plan),
        "rows": rows,
        "last_eviction": cache.rollback_points.floor,
        "window_size": cache.recording.window_size,
        "counters": vars(cache.counters),
        "layers": layers,
        "tensors": {name: _kind(value.dtype, value.shape) for name, value in tensors.items()},
    }
    return header, tensors


def _ragged(layer: RaggedLayer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of a layer by name, and its other values."""
    store = layer.store
    if store is None:
        return {}, {"kind": "RaggedLayer", "lengths": None}
    slots = store.locations().index(range(len(store.lengths)), store.lengths)
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


def import_cache(recording: Recording, header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> RaggedCache:
    """A cache from what `export_cache` returned; it takes ownership of the tensors.

    Raises:
        CacheFileError: it does not fit the session.
        KeyError, TypeError, ValueError: a value is missing, of another type, or inconsistent.
    """
    _check_fits(recording, header, set(tensors))
    cache = recording.new_cache()
    cache.plan = plan_from_json(header["plan"], recording.policies)
    recording.require(cache.plan.policy)
    restore(cache, header, tensors)
    return cache


def restore(cache: RaggedCache, header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Fills the new `cache`.

    Args:
        header, tensors: as `export_cache` returns them.

    Raises:
        KeyError, TypeError, ValueError: a value is missing, of another type, inconsistent, or does not fit the model.
    """
    model = cache.recording.model
    rows = {name: tensor.to(execution_device(model)) for name, tensor in _with_prefix("rows.", tensors).items()}
    rows = SequenceState.restore(header["rows"], rows)
    floor = _number(header["last_eviction"], "last_eviction")
    if not rows.tokens or rows.columns == 0:
        raise ValueError("it has no rows")
    _refuse(rows.faults())
    _check_window_positions(rows, cache.ragged[0].ring_size)
    kinds = [type(layer).__name__ for layer in cache.layers]
    saved = [layer["kind"] for layer in header["layers"]]
    if saved != kinds:
        raise ValueError(f"it has the layers {plain_line(saved)}, the model's are {plain_line(kinds)}")
    for index, (layer, document) in enumerate(zip(cache.layers, header["layers"], strict=True)):
        device = layer_device(model, index)
        own = {name: tensor.to(device) for name, tensor in _with_prefix(f"layers.{index}.", tensors).items()}
        if isinstance(layer, RaggedLayer):
            _fill_ragged(layer, document, own, rows)
        else:
            _fill_foreign(layer, document["numbers"], own, rows)
    cache.plan.check_rows(len(rows.tokens))
    for name in vars(cache.counters):
        setattr(cache.counters, name, _number(header["counters"][name], name))
    cache.adopt(rows, floor)
    _refuse(cache.faults())


def _fill_ragged(
    layer: RaggedLayer, document: dict[str, Any], own: dict[str, torch.Tensor], rows: SequenceState
) -> None:
    attention, batch, buffers = layer.attention, len(rows.tokens), _with_prefix("entries.", own)
    lengths = document["lengths"]
    if lengths is None:
        raise ValueError(f"layer {layer.layer_idx} has no entries")
    key, value = buffers["key"], buffers["value"]
    if key.ndim != 2 or key.shape[1] != attention.head_dim or value.ndim != 2:
        raise ValueError(f"keys are {tuple(key.shape)}, the model's have {attention.head_dim} numbers a head")
    if not key.dtype.is_floating_point:
        raise ValueError(f"keys are {key.dtype}")
    kinds = {"key": key.dtype, "value": key.dtype, "position": torch.int32}
    for name, buffer in buffers.items():
        expected = kinds.get(name, torch.float32)
        if buffer.dtype != expected or (name not in ("key", "value") and buffer.ndim != 1):
            raise ValueError(
                f"{name} is {buffer.dtype} {tuple(buffer.shape)}, expected {expected}, one number per entry"
            )
    _check_numbers(buffers)
    whole = isinstance(lengths, list) and all(type(length) is int and length >= 0 for length in lengths)
    if not whole or len(lengths) != batch * attention.num_kv_heads or sum(lengths) != len(key):
        raise ValueError("the lengths of the segments do not add up to the entries")
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
        assert rows.window_positions is not None, "_check_window_positions has refused that"
        used = (rows.window_positions >= 0).to(layer.window.device)
        recorded = layer.window.transpose(1, 2)[used]  # what other slots hold is never read
        _require_finite(recorded, "recorded queries", MAX_MAGNITUDE)
    if layer.observers.rotary is not None:
        dim = attention.head_dim
        shapes = {"count": (batch,), "mean": (*heads, dim), "scatter": (*heads, dim, dim), "next_position": (batch,)}
        names = [field.name for field in fields(QueryStatistics)]
        layer.statistics = QueryStatistics(
            **{name: _shaped(own[f"statistics.{name}"], shapes[name], f"statistics.{name}") for name in names}
        )
        _check_statistics(layer.statistics)


def _check_numbers(buffers: Mapping[str, torch.Tensor]) -> None:
    """Raises ValueError for entries that attention or a policy would make NaN of."""
    for name, buffer in buffers.items():
        if name in ("key", "value"):
            _require_finite(buffer, f"{name}s", MAX_MAGNITUDE)
        elif name == "log_beta" and not bool((buffer <= 0).all() and buffer.isfinite().all()):
            raise ValueError("log β is not in (-∞, 0]")
        elif name != "position" and bool(buffer.isnan().any()):
            raise ValueError(f"{plain_line(name, 60)} is not a number for some entries")


def _check_statistics(found: QueryStatistics) -> None:
    _require_finite(found.mean, "statistics.mean", MAX_MAGNITUDE)
    _require_finite(found.scatter, "statistics.scatter", math.inf)
    if found.next_position.dtype != torch.int64 or not bool(
        ((found.next_position >= 0) & (found.next_position < 2**31)).all()
    ):
        raise ValueError("statistics.next_position is not a position of every row")
    if not bool(((found.count >= 0) & found.count.isfinite()).all()):
        raise ValueError("statistics.count is not a number of queries for every row")


def _require_finite(tensor: torch.Tensor, name: str, most: float) -> None:
    """Raises ValueError unless the numbers are finite and at most `most` by magnitude."""
    if not tensor.dtype.is_floating_point or not bool((tensor.abs() <= most).all() and tensor.isfinite().all()):
        raise ValueError(f"{name} are not finite numbers" + (f" of up to {most:g}" if most < math.inf else ""))


def _fill_foreign(layer: Any, numbers: Any, own: dict[str, torch.Tensor], rows: SequenceState) -> None:
    if numbers is None and not own:
        return
    keys, values = own["keys"], own["values"]
    for tensor in (keys, values):
        bounded = type(layer) is not DynamicLayer  # which holds an image (cross-attention), of any length
        _require_finite(tensor, "keys and values of a layer that does not evict", MAX_MAGNITUDE)
        if tensor.ndim != 4 or len(tensor) != len(rows.tokens) or (bounded and tensor.shape[2] > rows.columns):
            raise ValueError(f"a layer that does not evict has {tuple(tensor.shape)} for {len(rows.tokens)} rows")
    wanted = {name: kind for name, kind in FOREIGN_NUMBERS.items() if hasattr(layer, name)}
    if not isinstance(numbers, dict) or {name: type(value) for name, value in numbers.items()} != wanted:
        raise ValueError(f"a layer that does not evict has {numbers}, expected {sorted(wanted)}")
    if numbers.get("cumulative_length", rows.columns) != rows.columns:
        raise ValueError(f"a layer that does not evict has seen another number of columns than {rows.columns}")
    layer.lazy_initialization(keys, values)
    vars(layer).update(keys=keys, values=values, **numbers)


def _check_window_positions(rows: SequenceState, ring: int) -> None:
    positions = rows.window_positions
    if not ring:
        if positions is not None:
            raise ValueError("it has recorded queries, which no policy of this session reads")
        return
    if positions is None:
        raise ValueError("the positions of the recorded queries are missing")
    _shaped(positions, (len(rows.tokens), ring), "the positions of the recorded queries")
    if positions.dtype != torch.int64:
        raise ValueError(f"the positions of the recorded queries are {positions.dtype}, expected torch.int64")
    tokens = torch.tensor(rows.tokens, device=positions.device).unsqueeze(1)
    slots = torch.arange(ring, device=positions.device)
    if not bool(((positions == -1) | ((positions >= 0) & (positions < tokens) & (positions % ring == slots))).all()):
        raise ValueError("recorded queries are not of tokens seen, or not in their slots")


def _refuse(faults: Iterator[str]) -> None:
    for fault in faults:
        raise ValueError(fault)


def _shaped(tensor: torch.Tensor, shape: tuple[int, ...], name: str) -> torch.Tensor:
    if tensor.shape != shape:
        raise ValueError(f"{name} are {tuple(tensor.shape)}, expected {shape}")
    return tensor


def _number(value: Any, name: str) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{name} is {shown(value)}, not an integer >= 0")
    return value


def _with_prefix(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def check_sliceable(recording: Recording) -> None:
    """Raises ValueError unless the session's caches have slices: all layers are ragged and no sums are accumulated."""
    cache = recording.new_cache()
    others = {type(layer).__name__ for layer in cache.layers if not isinstance(layer, RaggedLayer)}
    if others:
        raise ValueError(
            f"{type(recording.model).__name__} has cache layers of the kind {', '.join(sorted(others))}, whose "
            "contents depend on later tokens; prompts are cached in slices for models with full attention only"
        )
    window, accumulated = recording.window_size, recording.observers.accumulated
    needed = [f"a window of {window} queries"] * (window > 0)
    needed += [accumulated] * bool(accumulated)
    needed += ["hidden states"] * any("hidden_states" in policy.needs for policy in recording.policies)
    if needed:
        raise ValueError(
            f"{', '.join(policy.name for policy in recording.policies)} need {', '.join(needed)}, which a slice of a "
            "prompt does not have; policies that score entries by themselves are accepted, such as 'retention'"
        )


def slice_of(cache: RaggedCache, start: int, stop: int, row: int | None = None) -> KVSlice:
    """The KV of the tokens [start, stop) of a row that has evicted nothing; a copy, owned by the caller.

    Args:
        row: index of the row; None if the cache has a single one.

    Returns:
        By name, `layers.I.key`, `.value` and the session's per-entry states, e.g. `.log_beta`: each
        `(1, num_kv_heads, stop - start, dim)`, dim 1 for states, which are fp32.
    Raises:
        ValueError: several rows and `row` is None, evicted entries, or tokens that the row has not seen.
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
    kv: KVSlice = {}
    for layer in cache.ragged:
        store = layer.store
        if store is None:
            continue
        heads = store.num_kv_heads
        if any(length != tokens for length in store.lengths[row * heads : (row + 1) * heads]):
            raise ValueError("the cache has evicted entries: export it as a whole")
        for name, entries in _copy_entries(store, row, start, stop).items():
            kv[f"layers.{layer.layer_idx}.{name}"] = entries.view(1, heads, stop - start, -1)
    return kv


def _copy_entries(store: SegmentStore, row: int, start: int, stop: int) -> dict[str, torch.Tensor]:
    """Copies entries of all heads of a row, except positions: `(num_kv_heads * (stop - start), …)`, in one block."""
    buffers = {name: buffer for name, buffer in store.buffers.items() if name != "position"}
    return entries_at(buffers, store.dense_index()[0][row, :, start:stop].flatten())


def cache_of_slices(recording: Recording, slices: Sequence[Mapping[str, torch.Tensor]]) -> RaggedCache:
    """A cache of one row under the session's plan with `slices` in order, as if they had been computed.

    Args:
        slices: see `slice_of`; at least one. They are copied.

    Raises:
        ValueError: slices of another model, or of a session that records other data.
    """
    cache = recording.new_cache()
    stored = ("key", "value", *recording.entry_states)
    names = [f"layers.{layer.layer_idx}.{name}" for layer in cache.ragged for name in stored]
    wrong = sorted({name for one in slices for name in one.keys() ^ set(names)})
    if wrong or not slices:
        differ = ", ".join(wrong) or "nothing"
        raise ValueError(f"got {len(slices)} slices that differ from the contents of the session's caches in {differ}")
    sizes = [one[names[0]].shape[2] for one in slices]
    total = sum(sizes)
    tensors: dict[str, torch.Tensor] = {}
    documents = []
    for layer in cache.layers:
        assert isinstance(layer, RaggedLayer), "check_sliceable has been called"
        heads, start = layer.attention.num_kv_heads, f"layers.{layer.layer_idx}."
        for name in stored:
            whole = torch.cat([one[start + name] for one in slices], dim=2)
            if whole.shape[:3] != (1, heads, total):
                raise ValueError(f"{start}{name} are {tuple(whole.shape)}; accepted: (1, {heads}, {total}, …)")
            flat = whole.reshape(heads * total, -1)
            tensors[f"{start}entries.{name}"] = flat if name in ("key", "value") else flat.squeeze(1)
        positions = torch.arange(total, dtype=torch.int32, device=execution_device(recording.model))
        tensors[f"{start}entries.position"] = positions.repeat(heads)
        documents.append({"kind": "RaggedLayer", "lengths": [total] * heads, "scaling": layer.scaling})
    header = {
        "rows": {"tokens": [total], "runs": [total]},
        "last_eviction": 0,
        "counters": vars(cache.counters),
        "layers": documents,
    }
    restore(cache, header, tensors)
    return cache
