"""Plain values from outside: files, JSON and YAML within bounds, and how values are shown in messages.

Nothing is executed, and nothing is read before its size is known: `file_bytes` and `json_lines` are the only ways to a
file's content that other readers need.
"""

from __future__ import annotations

import gzip
import json
import math
import stat
import zlib
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class DocumentLimits:
    """Bounds of a document from outside.

    Attributes:
        json_characters, yaml_characters: of the whole text; YAML is read at about a hundredth of JSON's speed.
        depth: of lists and mappings inside one another.
        items: of one list or mapping.
        text: characters of one string.
        values: in the whole document; those that a YAML alias or merge key repeats count every time.
        merged: fields that the merge keys of a YAML text copy.
        lines_bytes: of a file with a JSON document a line, unpacked; the other bounds are those of a line.
        line_bytes: of one of its lines.
    """

    json_characters: int = 16 << 20
    yaml_characters: int = 1 << 20
    depth: int = 32
    items: int = 1 << 16
    text: int = 1 << 20
    values: int = 1 << 20
    merged: int = 1 << 14
    lines_bytes: int = 1 << 28
    line_bytes: int = 1 << 20


LIMITS = DocumentLimits()


def bounded(value: Any, name: str = "the document", limits: DocumentLimits = LIMITS) -> Any:
    """A copy of plain values (None, bool, int, float, str, list or tuple, mapping with string keys).

    Raises:
        ValueError: another type, NaN or an infinity, or more of anything than `limits` allow.
    """
    left = [limits.values]

    def copied(value: Any, path: str, depth: int) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise ValueError(f"got more than {limits.values} values in {name}; accepted: up to {limits.values}")
        if value is None or isinstance(value, bool | int):
            return value
        if isinstance(value, float):
            if not math.isfinite(value):
                raise ValueError(f"got {value} as {path or name}; accepted: a finite number")
            return value
        if isinstance(value, str):
            if len(value) > limits.text:
                raise ValueError(f"got {len(value)} characters as {path or name}; accepted: up to {limits.text}")
            return value
        if depth == limits.depth:
            raise ValueError(f"got {name} nested deeper than {depth} levels; accepted: up to {limits.depth}")
        if isinstance(value, Mapping | list | tuple) and len(value) > limits.items:
            raise ValueError(f"got {len(value)} items as {path or name}; accepted: up to {limits.items}")
        if isinstance(value, Mapping):
            for key in value:
                if not isinstance(key, str) or len(key) > limits.text:
                    raise ValueError(f"got {shown(key)} as a field's name in {path or name}; accepted: text")
            return {key: copied(one, f"{path}.{shown_name(key)}".lstrip("."), depth + 1) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [copied(one, f"{path}[{number}]", depth + 1) for number, one in enumerate(value)]
        raise ValueError(f"got {shown(value)} as {path or name}; accepted: plain values as in JSON")

    return copied(value, "", 0)


def parse_json(text: str | bytes, name: str = "the document", limits: DocumentLimits = LIMITS) -> Any:
    """The values of a JSON text, within `limits`.

    Raises:
        ValueError: no JSON, NaN or an infinity, or more of anything than `limits` allow.
    """
    _check_length(text, limits.json_characters, name)

    def refused(constant: str) -> Any:
        raise ValueError(f"got {constant}; accepted: a finite number")

    try:
        return bounded(json.loads(text, parse_constant=refused), name, limits)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} is not JSON: {plain_line(error)}") from None
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply; accepted: up to {limits.depth} levels") from None
    except ValueError as error:
        if "integer string conversion" not in str(error):  # Python's own limit; its advice is for programmers
            raise
        raise ValueError(f"{name} has a whole number of thousands of digits; accepted: up to 63 bits") from None


def parse_yaml(text: str, name: str = "the document", extra: str = "train", limits: DocumentLimits = LIMITS) -> Any:
    """The values of a YAML text, within `limits`; tags that would make Python objects are refused.

    Args:
        extra: the extra of this package that brings PyYAML along, for the message where it is missing.

    Raises:
        ImportError: PyYAML is missing.
        ValueError: no YAML, NaN or an infinity, or more of anything than `limits` allow.
    """
    try:
        import yaml
    except ImportError:
        raise ImportError(f"reading {name} needs PyYAML: pip install 'tenure[{extra}]'") from None
    _check_length(text, limits.yaml_characters, name)

    class BoundedLoader(yaml.SafeLoader):
        """Merge keys (`<<: [*a, *a]`) copy the fields they name, so the copies are counted before they are made."""

        merged = 0

        def flatten_mapping(self, node: yaml.MappingNode) -> None:
            for key, value in node.value:
                if key.tag == "tag:yaml.org,2002:merge":
                    for part in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                        if isinstance(part, yaml.MappingNode):
                            self.flatten_mapping(part)
                            self.merged += len(part.value)
                if self.merged > limits.merged:
                    raise ValueError(
                        f"got merge keys that add more than {limits.merged} fields to {name}; accepted: up to that"
                    )
            super().flatten_mapping(node)

    try:
        values = yaml.load(text, BoundedLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is not YAML: {plain_line(error)}") from None
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply; accepted: up to {limits.depth} levels") from None
    except (ValueError, TypeError, AttributeError, LookupError, OverflowError) as error:  # of values such as 2020-13-45
        raise ValueError(f"{name} has a value that cannot be read: {plain_line(error)}") from None
    return bounded(values, name, limits)


def load_json(path: str | Path, limits: DocumentLimits = LIMITS) -> Any:
    """`parse_json` of a file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: see `parse_json`; or the file is not UTF-8.
    """
    return parse_json(_file_text(Path(path), limits.json_characters), str(path), limits)


def load_yaml(path: str | Path, extra: str = "train", limits: DocumentLimits = LIMITS) -> Any:
    """`parse_yaml` of a file.

    Raises:
        FileNotFoundError: there is none.
        ImportError, ValueError: see `parse_yaml`; or the file is not UTF-8.
    """
    return parse_yaml(_file_text(Path(path), limits.yaml_characters), str(path), extra, limits)


def json_lines(path: str | Path, limits: DocumentLimits = LIMITS) -> Iterator[tuple[int, Any]]:
    """The number, from 1, and the values of every line of a file that is not empty; `.gz` is unpacked.

    One line at a time is in memory.

    Raises:
        OSError: the file cannot be opened.
        ValueError: from the line that is no JSON or beyond the limits; see `file_lines`.
    """
    for number, line in file_lines(path, limits):
        if line.strip():
            yield number, parse_json(line, f"line {number} of {path}", limits)


def file_lines(path: str | Path, limits: DocumentLimits = LIMITS) -> Iterator[tuple[int, bytes]]:
    """The number, from 1, and the bytes of every line of a file, with its line break; `.gz` is unpacked.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is no regular file, its lines or all of them are longer than the limits, or it cannot be
            unpacked.
    """
    path, total, number = Path(path), 0, 0
    require_file(path)
    packed = path.suffix == ".gz"
    with closing(gzip.open(path, "rb") if packed else path.open("rb")) as file:
        try:
            while line := file.readline(limits.line_bytes + 1):
                total, number = total + len(line), number + 1
                if len(line) > limits.line_bytes:
                    raise ValueError(
                        f"got more than {limits.line_bytes} bytes in line {number} of {path}; accepted: up to that"
                    )
                if total > limits.lines_bytes:
                    raise ValueError(f"got more than {limits.lines_bytes} bytes in {path}; accepted: up to that")
                yield number, line
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path} cannot be unpacked: {plain_line(error)}") from None


def file_bytes(path: str | Path, limit: int) -> bytes:
    """The content of a file of up to `limit` bytes.

    Raises:
        OSError: there is none, or it cannot be read.
        ValueError: a folder, device or pipe, or more bytes.
    """
    path = Path(path)
    require_file(path)
    size = path.stat().st_size
    if size > limit:
        raise ValueError(f"got {path} of {size} bytes; accepted: up to {limit}")
    with path.open("rb") as file:  # a file that grows in the meantime is not read further
        return file.read(size)


def require_file(path: str | Path) -> None:
    """Raises ValueError for a folder, device, pipe or socket, and FileNotFoundError if there is nothing."""
    mode = Path(path).stat().st_mode
    if not stat.S_ISREG(mode):
        raise ValueError(f"got {'a folder' if stat.S_ISDIR(mode) else 'a device or pipe'} at {path}; accepted: a file")


def shown(value: Any) -> str:
    """A value for a message: plain ones as they are, up to 60 characters; of others the type."""
    if isinstance(value, str):
        return repr(value) if len(value) <= 60 else f"{value[:60]!r}…"
    if value is None:
        return "nothing"
    if isinstance(value, int) and abs(value) >= 10**20:
        return f"{value:.3e}" if value.bit_length() < 1000 else f"a whole number of {value.bit_length()} bits"
    if isinstance(value, bool | int | float):
        return repr(value)[:60]
    return f"a {type(value).__name__}"


def shown_name(name: Any) -> str:
    """A field's name for a message: up to 60 characters, line ends and the like as escapes."""
    text = str(name)[:60]
    return text if text.isprintable() else repr(text)[1:-1]


def plain_line(text: Any, length: int = 300) -> str:
    """A text of unknown origin, such as another library's message, as one line of up to `length` characters."""
    line = " ".join(str(text)[: 8 * length].split())
    line = "".join(one if one.isprintable() else repr(one)[1:-1] for one in line)
    return line if len(line) <= length else f"{line[:length]}…"


def _check_length(text: str | bytes, limit: int, name: str) -> None:
    if len(text) > limit:
        raise ValueError(f"got {name} of {len(text)} characters; accepted: up to {limit}")


def _file_text(path: Path, limit: int) -> str:
    content = file_bytes(path, 4 * limit)  # UTF-8 has up to 4 bytes a character
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
