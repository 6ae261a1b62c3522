"""Hostile variants of files, by a seeded random: bytes, values of JSON and YAML, headers and numbers of tensors."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import math
import struct
from collections.abc import Callable
from copy import deepcopy
from random import Random
from typing import Any

LONG = "x" * 3000
SCRIPT = "<script>alert(1)</script>"
# Values of JSON that programs tend to trip over.
NASTY: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 10**6, 10**9, 2**31, 2**40, 2**63, 2**64, -(2**63), 10**400, 0.5, -0.5, 1e-300,
    1e308, -1e308, math.nan, math.inf, -math.inf, "", " ", "0", "-1", "nan", "x", LONG, SCRIPT, "../../etc/passwd",
    "a\nb", "a|b", "\x00", "\x1b[31m", "\ud800", "é" * 50, [], {}, [[]], [{}], {"": None}, [None], [1, 2, 3],
    [-1], ["x"], [10**400], [0.5], {"x": 1},
)  # fmt: skip
_LEVELS = [(chr(98 + level), ", ".join([f"*{chr(97 + level)}"] * 9)) for level in range(9)]
MERGE_BOMB = "a: &a {k: 1}\n" + "".join(f"{name}: &{name} {{<<: [{parts}]}}\n" for name, parts in _LEVELS)
ALIAS_BOMB = "a: &a [x, x]\n" + "".join(f"{name}: &{name} [{parts}]\n" for name, parts in _LEVELS)
DEEP_JSON = "[" * 100_000 + "]" * 100_000
# Whole texts that take the place of a file.
TEXTS: tuple[bytes, ...] = tuple(
    text.encode() if isinstance(text, str) else text
    for text in (
        "", "\n", "null", "{}", "[]", "0", '"x"', "{", "[[", "\x00", "\ufeff{}", MERGE_BOMB, ALIAS_BOMB, DEEP_JSON,
        '{"a":' * 3000 + "1" + "}" * 3000, "1" * 5000, f'{{"a": {"1" * 5000}}}', "- " * 5000, "!!python/object:os.x {}",
        "2020-13-45", "a: 1\na: 2", "&a [*a]", "? [1, 2]\n: 3", ": \n  - :", LONG, b"\xff\xfe\x00\x00", b"\x80\x81",
        bytes(range(256)), b"\x1f\x8b", gzip.compress(b"0" * 10**7),
    )
)  # fmt: skip


def mutated(random: Random, name: str, data: bytes) -> bytes:
    """A variant of a file's content; `name` says by its suffix how deep the change can be."""
    if random.random() < 0.02:
        return random.choice(TEXTS)
    if name.endswith(".gz") and random.random() < 0.7:
        return gzip.compress(mutated(random, name.removesuffix(".gz"), gzip.decompress(data)), 1)
    if name.endswith(".zst") and random.random() < 0.7:
        import zstandard

        inner = mutated(random, name.removesuffix(".zst"), zstandard.decompress(data))
        return zstandard.compress(inner, 1)
    kinds: dict[str, Callable[[Random, bytes], bytes]] = {
        "json": _json, "jsonl": _json_lines, "yaml": _yaml, "safetensors": _safetensors, "kv": _prompt_file,
        "parquet": _table, "arrow": _table, "pt": _pickled_tensors, "pth": _pickled_tensors,
    }  # fmt: skip
    change = kinds.get(name.rpartition(".")[2])
    if change is not None and random.random() < 0.75:
        return change(random, data)
    return _bytes(random, data)


def _bytes(random: Random, data: bytes) -> bytes:
    """A few changes of single bytes and of stretches."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 5))):
        at = random.randrange(len(changed) + 1)
        stretch = random.choice((1, 2, 8, 64, 1024))
        kind = random.randrange(6)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            del changed[at : at + stretch]
        elif kind == 2:
            changed[at:at] = random.randbytes(min(stretch, 64))
        elif kind == 3:
            changed[at:at] = changed[at : at + stretch]
        elif kind == 4:
            del changed[at:]
        else:
            changed[at : at + stretch] = (
                random.choice((b"\x00", b"\xff", b"9", b"-", b"e", b'"', b"{", b"\n")) * stretch
            )
    return bytes(changed)


def nasty_value(random: Random) -> Any:
    """One of `NASTY`, or a list or mapping of it, or a deep one."""
    value = deepcopy(random.choice(NASTY))
    kind = random.random()
    if kind < 0.04:
        for _ in range(random.choice((40, 150))):
            value = [value]
    elif kind < 0.08:
        value = [deepcopy(value) for _ in range(random.choice((2, 100, 5000)))]
    elif kind < 0.12:
        value = {f"k{n}": deepcopy(value) for n in range(random.choice((1, 50)))}
    return value


def changed_values(random: Random, document: Any, changes: int = 0) -> Any:
    """A copy of plain values in which some are replaced, removed, doubled, renamed or exchanged."""
    document = json.loads(json.dumps(document))
    for _ in range(changes or random.choice((1, 1, 1, 2, 4))):
        places = list(_places(document))
        if not places or random.random() < 0.02:
            document = nasty_value(random)
            continue
        parent, key = random.choice(places)
        kind = random.randrange(8)
        if kind < 4:
            parent[key] = nasty_value(random)
        elif kind == 4:
            del parent[key]
        elif kind == 5:
            other, name = random.choice(places)
            with contextlib.suppress(LookupError):
                parent[key] = json.loads(json.dumps(other[name]))
        elif isinstance(parent, dict):
            new = random.choice((LONG, SCRIPT, "", "x", "-1", "\x00", key.upper(), f"{key}s", "__class__"))
            parent[new] = parent.pop(key) if kind == 6 else nasty_value(random)
        else:
            parent.insert(key, deepcopy(parent[key]))
    return document


def _places(document: Any, depth: int = 0) -> Any:
    """(container, key) of every value."""
    if depth > 20:
        return
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in list(items):
        yield document, key
        yield from _places(value, depth + 1)


def _json(random: Random, data: bytes) -> bytes:
    return json.dumps(changed_values(random, json.loads(data))).encode("utf-8", "surrogatepass")


def _json_lines(random: Random, data: bytes) -> bytes:
    lines = data.splitlines()
    at = random.randrange(len(lines))
    if random.random() < 0.15:
        lines[at : at + 1] = random.choice(([], [lines[at]] * 2, [b""], [lines[at][:-1]]))
        return b"\n".join(lines) + b"\n"
    lines[at] = _json(random, lines[at])
    return b"\n".join(lines) + random.choice((b"\n", b"\n", b""))


def _yaml(random: Random, data: bytes) -> bytes:
    import yaml

    return json.dumps(changed_values(random, yaml.safe_load(data))).encode()  # JSON is YAML, as far as it matters here


def _safetensors(random: Random, data: bytes) -> bytes:
    """Numbers of a tensor, its dtype or shape, or the header's own texts."""
    (size,) = struct.unpack("<Q", data[:8])
    header, numbers = json.loads(data[8 : 8 + size]), bytearray(data[8 + size :])
    names = [name for name in header if name != "__metadata__"]
    kind = random.random()
    if kind < 0.45:
        first, last = header[random.choice(names)]["data_offsets"]
        if first < last:
            _change_numbers(random, numbers, first, last)
    elif kind < 0.6 and "__metadata__" in header:
        texts = header["__metadata__"]
        for name, text in list(texts.items()):
            with contextlib.suppress(ValueError):
                texts[name] = json.dumps(changed_values(random, json.loads(text)))
    elif kind < 0.8 and "__metadata__" in header:  # consistent with the list of tensors that a cache's header has
        _change_tensor(random, header, numbers, random.choice(names))
    else:
        header = changed_values(random, header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(numbers)


def _change_numbers(random: Random, numbers: bytearray, first: int, last: int) -> None:
    """Puts a number that is not finite, or out of any range, in one place or in all of a tensor."""
    pattern = random.choice((
        struct.pack("<f", math.nan), struct.pack("<f", math.inf), struct.pack("<f", -1e38), struct.pack("<i", -1),
        struct.pack("<i", 2**31 - 1), struct.pack("<q", -1), struct.pack("<q", 2**62), b"\x00", b"\x02",
    ))  # fmt: skip
    if random.random() < 0.7:
        at = first + random.randrange(max(1, (last - first) // len(pattern))) * len(pattern)
        numbers[at : at + len(pattern)] = pattern[: last - at]
    else:
        numbers[first:last] = (pattern * ((last - first) // len(pattern) + 1))[: last - first]


def _change_tensor(random: Random, header: dict[str, Any], numbers: bytearray, name: str) -> None:
    """Another dtype or shape of a tensor, of the same bytes, listed as such in a cache's header."""
    kinds = {"F32": "float32", "I32": "int32", "BOOL": "bool", "I64": "int64", "F64": "float64", "BF16": "bfloat16",
             "U8": "uint8", "F16": "float16"}  # fmt: skip
    bits = {"F32": 4, "I32": 4, "BOOL": 1, "I64": 8, "F64": 8, "BF16": 2, "U8": 1, "F16": 2}
    first, last = header[name]["data_offsets"]
    dtype = random.choice([each for each in kinds if (last - first) % bits[each] == 0])
    count = (last - first) // bits[dtype]
    shape = random.choice(([count], [1, count], [count, 1], header[name]["shape"][::-1], header[name]["shape"]))
    if math.prod(shape) != count:
        shape = [count]
    header[name] |= {"dtype": dtype, "shape": shape}
    for key, text in header["__metadata__"].items():
        document = json.loads(text) if text.startswith("{") else {}
        if name in document.get("tensors", {}):
            document["tensors"][name] = [kinds[dtype], shape]
            header["__metadata__"][key] = json.dumps(document)


def _prompt_file(random: Random, data: bytes) -> bytes:
    """Another header of a file of the disk tier, of the same length where it fits; the seal is wrong then."""
    size = int.from_bytes(data[12:16], "little")
    header = changed_values(random, json.loads(data[16 : 16 + size]))
    text = json.dumps(header, separators=(",", ":")).encode("utf-8", "surrogatepass").ljust(size)
    return data[:12] + len(text).to_bytes(4, "little") + text + data[16 + size :]


def _table(random: Random, data: bytes) -> bytes:
    """A Parquet or Arrow file of other records, of other types where Arrow finds one for them; else other bytes."""
    import pyarrow
    from pyarrow import parquet

    columnar = data[:4] == b"PAR1"
    source = pyarrow.BufferReader(data)
    table = parquet.read_table(source) if columnar else pyarrow.ipc.open_stream(source).read_all()
    rows = changed_values(random, table.to_pylist())
    packed = io.BytesIO()
    try:
        table = pyarrow.Table.from_pylist(rows)
        if columnar:
            parquet.write_table(table, packed)
        else:
            with pyarrow.ipc.new_stream(packed, table.schema) as writer:
                writer.write_table(table)
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError, NotImplementedError):  # no columns
        return _bytes(random, data)
    return packed.getvalue()


def _pickled_tensors(random: Random, data: bytes) -> bytes:
    """A file of `torch.save` with another value, shape, dtype or number in the place of a tensor, or other names."""
    import torch

    document = torch.load(io.BytesIO(data), weights_only=True)
    for _ in range(random.choice((1, 1, 2))):
        places = list(_places(document))
        parent, key = random.choice(places)
        value, kind = parent[key], random.randrange(6)
        if kind == 0 or not isinstance(value, torch.Tensor) or not 0 < value.numel() < 2**20:
            parent[key] = nasty_value(random)
        elif kind == 1:
            endless = value.reshape(-1)[:1].expand(2**40)
            parent[key] = random.choice((value.mT if value.dim() > 1 else value[:1], value[:0], value[None], endless))
        elif kind == 2:
            parent[key] = value.to(random.choice((torch.float16, torch.float64, torch.int8, torch.bool, torch.cfloat)))
        elif kind == 3:
            nasty = (math.nan, math.inf, 3e38, -1e30) if value.is_floating_point() else (0, 1)
            value.reshape(-1)[random.randrange(value.numel())] = random.choice(nasty)
        elif kind == 4:
            del parent[key]
        else:
            other, name = random.choice(places)
            parent[key] = other.get(name) if isinstance(other, dict) else value
    packed = io.BytesIO()
    torch.save(document, packed)
    return packed.getvalue()
