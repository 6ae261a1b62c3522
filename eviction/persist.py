"""A cache on disk: one safetensors file whose header says what it is; nothing in it can run code.

Its tensors are the entries of every layer, without free room, and what layers and rows remember beside them. The header
is JSON: schema, the model and gates it belongs to, plan, bookkeeping, and a list of all tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_safetensors

from ..retention.checkpoint import fingerprint, write_atomic
from ..retention.gates import RetentionGates
from .layer import RaggedLayer
from .plan_json import plan_from_json, plan_to_json
from .restore import FOREIGN_NUMBERS, restore
from .rollback import replaces_tensors
from .statistics import QueryStatistics

if TYPE_CHECKING:
    from .cache import RaggedCache
    from .session import Session

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
    from .ops.copies import entries_at

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
