"""Reading plain values into dataclasses: every value is checked against its field.

A field's annotation is its check::

    @dataclass(frozen=True)
    class Job:
        name: str
        steps: Annotated[int, Range(1)]
        budgets: Annotated[tuple[float, ...], Size(1)] = (0.2,)
        scope: Literal["global", "local"] = "global"

    job = read(Job, tenure.documents.load_yaml("job.yaml"), "job.yaml")

Accepted annotations: `str, int, float, bool, None, Any`, `Literal`, `Callable`, unions, `tuple`, `list`,
`Mapping[str, ...]`, `Mapping[int, ...]` (whose keys are digits in JSON), other dataclasses, and `Annotated` with the
rules below. Errors are a `ValueError` of the form "got 0 as steps; accepted: a whole number of 1 or more", and name the
path of the field (`cells[2].machine.card`). A class that calls `verify(self)` in its `__post_init__` is checked in the
same way when it is made by hand.
"""

from __future__ import annotations

import math
import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from numbers import Integral, Real
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from tenure.documents import shown, shown_name

T = TypeVar("T")
Converter = Callable[[Any, str, "set[str] | None"], Any]  # (value, path, unknown) -> checked value


@dataclass(frozen=True)
class Range:
    """Bounds of a number, for `Annotated`.

    Attributes:
        low, high: the least and the greatest accepted number.
        above, below: `low` or `high` itself is refused.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False

    def holds(self, value: float) -> bool:
        """Whether `value` lies within the bounds."""
        low = value > self.low if self.above else value >= self.low
        return low and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.above else f"of {self.low:g} or more"
        high = f"below {self.high:g}" if self.below else f"up to {self.high:g}"
        if math.isinf(self.high):
            return "" if math.isinf(self.low) else f" {low}"
        if math.isinf(self.low):
            return f" {high}"
        return f" {low} and {high}" if self.above or self.below else f" from {self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class OrInfinite:
    """For `Annotated[float, ...]`: an infinity is accepted where `Range` has it; documents cannot contain one."""


@dataclass(frozen=True)
class Size:
    """Bounds of the number of items of a list or mapping, or of a text's characters, for `Annotated`."""

    low: int = 0
    high: int | None = None

    def holds(self, value: Any) -> bool:
        """Whether `len(value)` lies within the bounds."""
        return self.low <= len(value) and (self.high is None or len(value) <= self.high)

    def of(self, unit: str) -> str:
        """The bounds in words, as `1 or more items`."""
        return f"{self.low} or more {unit}" if self.high is None else f"{self.low} to {self.high} {unit}"


@dataclass(frozen=True)
class Distinct:
    """For `Annotated`: no item of a list is there twice."""


@dataclass(frozen=True)
class Named:
    """For `Annotated`: the field's name in documents, where it cannot be the attribute's, as `from`."""

    name: str


@dataclass(frozen=True)
class NumbersToo:
    """For `Annotated[str, ...]`: a whole number is accepted as its digits, as ids often are."""


# Annotations that many fields share.
Positive = Annotated[float, Range(0, above=True)]
NotNegative = Annotated[float, Range(0)]
Count = Annotated[int, Range(1)]
# A budget of KV entries: a share of the tokens, or entries per head. A union, whose members are tried in turn.
KeptBudget = Annotated[float, Range(0, 1, above=True)] | Annotated[int, Range(1)]


def read(cls: type[T], document: Any, name: str = "", unknown: set[str] | None = None) -> T:
    """An instance of a dataclass from a mapping of its fields.

    Args:
        cls: a dataclass. If `document` is no mapping and the class has a static method `shorthand(value)`, what that
            returns is read instead; it may raise ValueError.
        document: parsed values; see `parse_json`, `parse_yaml` and `bounded`.
        name: the document in messages, as its file's name; paths of fields do not repeat it.
        unknown: receives the paths of fields that the class does not have; None: they are refused.

    Raises:
        ValueError: unknown or missing fields (all are named), a value of another type or out of its range, or what the
            class itself refuses.
    """
    try:
        return _dataclass(cls)(document, "", unknown)
    except ValueError as error:
        if not name or str(error).startswith(name):
            raise
        raise ValueError(f"{name}: {error}") from None


def read_fields(
    cls: type, document: Any, needed: Sequence[str] | None = None, unknown: set[str] | None = None
) -> dict[str, Any]:
    """The fields of a dataclass that a mapping has, checked, by attribute; for parts of an instance.

    Args:
        needed: fields that must be there; None: those without a default.

    Raises: as `read`.
    """
    return _fields(cls).values(document, "", unknown, needed)


def verify(instance: Any, path: str = "") -> None:
    """Checks all fields of a dataclass instance as `read` does, and makes lists of its tuple fields tuples.

    Args:
        path: of the instance in messages.

    Raises:
        ValueError: the first value that is of another type or out of its range.
    """
    kind = _fields(type(instance))
    prefix = f"{path}." if path else ""
    for field, name in kind.attributes.items():
        value = getattr(instance, name)
        checked = kind.converters[name](value, prefix + field, None)
        if checked is not value:
            object.__setattr__(instance, name, checked)


class _Fields:
    """The fields of a dataclass as documents have them."""

    def __init__(self, cls: type) -> None:
        self.cls = cls
        self.converters = _converters(cls)
        self.attributes = {_named(cls).get(name, name): name for name in self.converters}
        self.needed = [
            _named(cls).get(one.name, one.name)
            for one in fields(cls)
            if one.init and one.default is MISSING and one.default_factory is MISSING
        ]

    def values(
        self, document: Any, path: str, unknown: set[str] | None, needed: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """The checked values by attribute."""
        what = path or "the document"
        if not isinstance(document, Mapping):
            raise ValueError(f"got {shown(document)} as {what}; accepted: a mapping of {', '.join(self.attributes)}")
        others = [name for name in document if name not in self.attributes]
        if others and unknown is None:
            place = f" in {path}" if path else ""
            raise ValueError(f"got unknown fields {self._others(others)}{place}; accepted: {self._accepted()}")
        if others and unknown is not None:
            unknown.update(f"{path}.{shown_name(name)}".lstrip(".") for name in others)
        missing = [name for name in (self.needed if needed is None else needed) if name not in document]
        if missing:
            raise ValueError(f"{what} lacks {', '.join(missing)}; accepted fields: {self._accepted()}")
        prefix = f"{path}." if path else ""
        return {
            attribute: self.converters[attribute](document[name], prefix + name, unknown)
            for name, attribute in self.attributes.items()
            if name in document
        }

    def _accepted(self) -> str:
        return ", ".join(self.attributes)

    def _others(self, names: Sequence[Any]) -> str:
        parts = []
        for name in sorted(map(shown_name, names))[:10]:
            meant = get_close_matches(name, self.attributes, n=1)
            parts.append(f"{name} (meant is perhaps {meant[0]})" if meant else name)
        return ", ".join(parts)


@cache
def _fields(cls: type) -> _Fields:
    return _Fields(cls)


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


@cache
def _converters(cls: type) -> dict[str, Converter]:
    hints = _hints(cls)
    return {one.name: _converter(hints[one.name]) for one in fields(cls) if one.init}


@cache
def _named(cls: type) -> dict[str, str]:
    """Names in documents of the attributes that have another name there."""
    found = {}
    for name, hint in _hints(cls).items():
        for rule in getattr(hint, "__metadata__", ()):
            if isinstance(rule, Named):
                found[name] = rule.name
    return found


def _dataclass(cls: type) -> Converter:
    def convert(value: Any, path: str, unknown: set[str] | None) -> Any:
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping) and hasattr(cls, "shorthand"):
            try:
                value = cls.shorthand(value)
            except ValueError as error:
                raise ValueError(f"{path}: {error}" if path else str(error)) from None
        values = _fields(cls).values(value, path, unknown)
        try:
            return cls(**values)
        except ValueError as error:
            if not path:
                raise
            raise ValueError(f"{path}: {error}") from None

    return convert


def _converter(hint: Any, rules: tuple[Any, ...] = ()) -> Converter:
    """The check of one annotation."""
    origin = get_origin(hint)
    if origin is Annotated:
        return _converter(hint.__origin__, (*rules, *hint.__metadata__))
    if origin in (Union, types.UnionType):
        return _union(hint, rules)
    if is_dataclass(hint) and isinstance(hint, type):
        return _dataclass(hint)
    if origin in (tuple, list, Sequence):
        return _list(hint, rules)
    if origin in (dict, Mapping):
        return _mapping(hint, rules)
    accepted = describe(hint, rules)
    fits = _fits(hint, rules)
    as_text = hint is str and any(isinstance(rule, NumbersToo) for rule in rules)

    number = hint in (int, float)

    def convert(value: Any, path: str, unknown: set[str] | None) -> Any:
        if number and type(value) not in _PLAIN:
            value = _plain_number(value)
        if as_text and isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if not fits(value):
            raise ValueError(f"got {shown(value)} as {path}; accepted: {accepted}{_note(value)}")
        return value

    return convert


_PLAIN = (int, float, bool, str, type(None))
_MAX = sys.float_info.max
MAX_INT = 2**63 - 1  # of whole numbers: what the libraries that get them hold


def _plain_number(value: Any) -> Any:
    """NumPy's numbers as Python's; other values as they are."""
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else value


def _fits(hint: Any, rules: tuple[Any, ...]) -> Callable[[Any], bool]:
    """Whether a value is what a plain annotation accepts."""
    if hint is Any or hint is object:
        return lambda value: True
    if get_origin(hint) is Callable:
        return callable
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        return lambda value: any(value == one and type(value) is type(one) for one in choices)
    if hint is None or hint is type(None):
        return lambda value: value is None
    if hint is bool:
        return lambda value: isinstance(value, bool)
    ranges = [rule for rule in rules if isinstance(rule, Range)]
    if hint is int:
        return lambda value: (
            type(value) is int and -MAX_INT <= value <= MAX_INT and all(one.holds(value) for one in ranges)
        )
    if hint is float:
        most = math.inf if any(isinstance(rule, OrInfinite) for rule in rules) else _MAX  # also of whole numbers
        return lambda value: (
            type(value) in (int, float) and -most <= value <= most and all(one.holds(value) for one in ranges)
        )
    if hint is str:
        sizes = [rule for rule in rules if isinstance(rule, Size)]
        return lambda value: isinstance(value, str) and all(one.holds(value) for one in sizes)
    return lambda value: isinstance(value, hint)


def _union(hint: Any, rules: tuple[Any, ...]) -> Converter:
    members = get_args(hint)
    converters = [(_shape(member), _converter(member, rules)) for member in members]
    accepted = describe(hint, rules)
    optional = type(None) in members

    def convert(value: Any, path: str, unknown: set[str] | None) -> Any:
        if value is None and optional:
            return None
        candidates = [convert for shape, convert in converters if shape is None or isinstance(value, shape)]
        if isinstance(value, bool):
            candidates = [convert for shape, convert in converters if shape in (None, bool)]
        if len(candidates) == 1 and isinstance(value, Mapping | list | tuple):
            return candidates[0](value, path, unknown)  # names the place inside it
        for candidate in candidates:
            try:
                return candidate(value, path, unknown)
            except ValueError:
                continue
        raise ValueError(f"got {shown(value)} as {path}; accepted: {accepted}{_note(value)}")

    return convert


def _shape(hint: Any) -> Any:
    """The Python types of values that an annotation may accept; None for any."""
    hint = hint.__origin__ if get_origin(hint) is Annotated else hint
    origin = get_origin(hint)
    if hint is None or hint is type(None):
        return type(None)
    if origin in (tuple, list, Sequence):
        return (list, tuple)
    if is_dataclass(hint):
        return None if hasattr(hint, "shorthand") else (Mapping, hint)
    if origin in (dict, Mapping):
        return Mapping
    if origin is Literal and all(isinstance(one, str) for one in get_args(hint)):
        return str
    return {float: (int, float, Real), int: (int, Integral), bool: bool, str: str}.get(hint)


def _list(hint: Any, rules: tuple[Any, ...]) -> Converter:
    parts = get_args(hint)
    fixed = get_origin(hint) is tuple and not (len(parts) == 2 and parts[1] is Ellipsis)
    inner = [_converter(part) for part in (parts if fixed else parts[:1])]
    make = list if get_origin(hint) is list else tuple
    accepted = describe(hint, rules)
    sizes = [rule for rule in rules if isinstance(rule, Size)]
    distinct = any(isinstance(rule, Distinct) for rule in rules)

    def convert(value: Any, path: str, unknown: set[str] | None) -> Any:
        if not isinstance(value, list | tuple):
            raise ValueError(f"got {shown(value)} as {path}; accepted: {accepted}")
        if (fixed and len(value) != len(inner)) or not all(one.holds(value) for one in sizes):
            raise ValueError(f"got a list of {len(value)} as {path}; accepted: {accepted}")
        found = [
            (inner[number] if fixed else inner[0])(one, f"{path}[{number}]", unknown)
            for number, one in enumerate(value)
        ]
        if distinct and len(set(found)) < len(found):
            twice = next(one for one in found if found.count(one) > 1)
            raise ValueError(f"got {shown(twice)} twice in {path}; accepted: {accepted}, none twice")
        same = isinstance(value, make) and all(new is old for new, old in zip(found, value, strict=True))
        return value if same else make(found)

    return convert


def _mapping(hint: Any, rules: tuple[Any, ...]) -> Converter:
    parts = get_args(hint)
    inner = _converter(parts[1] if len(parts) == 2 else Any)
    number = None if len(parts) < 2 or parts[0] is str else _converter(parts[0])
    accepted = describe(hint, rules)
    sizes = [rule for rule in rules if isinstance(rule, Size)]

    def convert(value: Any, path: str, unknown: set[str] | None) -> Any:
        if not isinstance(value, Mapping):
            raise ValueError(f"got {shown(value)} as {path}; accepted: {accepted}")
        if not all(one.holds(value) for one in sizes):
            raise ValueError(f"got {len(value)} fields as {path}; accepted: {sizes[0].of('fields')}")
        if number is not None:
            found = {
                number(_digits(key), f"a key of {path}", unknown): inner(one, f"{path}.{shown_name(key)}", unknown)
                for key, one in value.items()
            }
            if len(found) < len(value):
                raise ValueError(f"got a number twice as a key of {path}; accepted: {accepted}, none twice")
            return found
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"got {shown(key)} as a field's name in {path}; accepted: text")
        return {key: inner(one, f"{path}.{shown_name(key)}", unknown) for key, one in value.items()}

    return convert


def _digits(key: Any) -> Any:
    """A key of a JSON document that should be a number: digits as one, anything else as it is."""
    return int(key) if isinstance(key, str) and len(key) <= 20 and re.fullmatch("-?[0-9]+", key) else key


def describe(hint: Any, rules: tuple[Any, ...] = ()) -> str:
    """The values that an annotation accepts, in words: `a whole number of 1 or more`."""
    origin = get_origin(hint)
    if origin is Annotated:
        return describe(hint.__origin__, (*rules, *hint.__metadata__))
    if origin in (Union, types.UnionType):
        members = [member for member in get_args(hint) if member is not int or float not in get_args(hint)]
        return " or ".join(dict.fromkeys(describe(member, rules) for member in members))
    if origin is Literal:
        return ", ".join(map(str, get_args(hint)))
    sizes = [rule for rule in rules if isinstance(rule, Size)]
    if origin in (tuple, list, Sequence):
        parts = get_args(hint)
        if origin is tuple and not (len(parts) == 2 and parts[1] is Ellipsis):
            return f"a list of {len(parts)}: {', '.join(map(describe, parts))}"
        of = f"{sizes[0].of('items')}, each " if sizes else "items that are each "
        return f"a list of {of}{describe(parts[0])}"
    if is_dataclass(hint) and isinstance(hint, type):
        return f"a mapping of {', '.join(_named(hint).get(one.name, one.name) for one in fields(hint) if one.init)}"
    if origin in (dict, Mapping):
        return "a mapping"
    if origin is Callable:
        return "something callable"
    if hint is str and sizes:
        return f"text of {sizes[0].of('characters')}"
    plain = {str: "text", int: "a whole number", float: "a number", bool: "true or false", Any: "anything"}
    text = "nothing" if hint in (None, type(None)) else plain.get(hint) or f"a {getattr(hint, '__name__', hint)}"
    return text + "".join(str(rule) for rule in rules if isinstance(rule, Range) and hint in (int, float))


def _note(value: Any) -> str:
    """A hint where a whole number is too large for any field, or a text is a number with an exponent, as `2e-4`, that
    YAML 1.1 takes for text."""
    if type(value) is int and abs(value) > MAX_INT:
        return ", of up to 63 bits"
    if not isinstance(value, str) or "e" not in value.lower() or len(value) > 40:
        return ""
    try:
        float(value)
    except ValueError:
        return ""
    return " (YAML takes an exponent as a number only after a dot, as in 2.0e-4)"
