"""Reads a client's document with suspicion: known fields, their types, bounded sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..spec import MAX_NAME

MAX_ITEMS = 1024  # of a list or a mapping


class Fields:
    """A mapping of which known fields are taken one by one; the others are unknown.

    Args:
        document: as it came.
        what: for messages, e.g. `agent_hints`.
        unknown: gets the names of fields that nobody asks for, once `rest` is called.
    """

    def __init__(self, document: Any, what: str, unknown: set[str]) -> None:
        if not isinstance(document, Mapping):
            raise ValueError(f"got {_type(document)} as {what}; accepted: an object with fields")
        if len(document) > MAX_ITEMS:
            raise ValueError(f"got {len(document)} fields in {what}; accepted: up to {MAX_ITEMS}")
        self._document, self.what, self.unknown = document, what, unknown
        self._asked: set[str] = set()

    def _take(self, name: str) -> Any:
        self._asked.add(name)
        return self._document.get(name)

    def text(self, name: str) -> str | None:
        value = self._take(name)
        return None if value is None else self.checked(name, value)

    def checked(self, name: str, value: Any) -> str:
        """`value` as what `text` accepts in the field of that name."""
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)  # ids are often numbers
        if not isinstance(value, str) or not 0 < len(value) <= MAX_NAME:
            raise self._wrong(name, value, f"a string of 1 to {MAX_NAME} characters")
        return value

    def number(self, name: str, low: float = 0.0, high: float = math.inf) -> float | None:
        value = self._take(name)
        if value is None:
            return None
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < 1e300:
            raise self._wrong(name, value, "a finite number")
        if not low <= value <= high:
            raise self._wrong(name, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def whole(self, name: str, low: int = 0, high: int = 2**31 - 1) -> int | None:
        value = self._take(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self._wrong(name, value, f"a whole number from {low} to {high}")
        return value

    def flag(self, name: str) -> bool:
        value = self._take(name)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return bool(value)

    def choice(self, name: str, accepted: Sequence[str]) -> str | None:
        value = self._take(name)
        if value is not None and value not in accepted:
            raise self._wrong(name, value, ", ".join(accepted))
        return value

    def seconds(self, name: str, unit: float = 1.0) -> float | None:
        """A duration, given in `unit` seconds."""
        value = self.number(name)
        return None if value is None else value * unit

    def inner(self, name: str) -> Fields | None:
        value = self._take(name)
        return None if value is None else Fields(value, f"{self.what}.{name}", self.unknown)

    def list(self, name: str) -> Sequence[Any]:
        value = self._take(name)
        if value is None:
            return ()
        if not isinstance(value, Sequence) or isinstance(value, (str, bytes)) or len(value) > MAX_ITEMS:
            raise self._wrong(name, value, f"a list of up to {MAX_ITEMS} items")
        return value

    def texts(self, name: str) -> list[str]:
        return [self.checked(name, item) for item in self.list(name)]

    def inners(self, name: str) -> list[Fields]:
        return [Fields(item, f"{self.what}.{name}", self.unknown) for item in self.list(name)]

    def items(self, name: str) -> Mapping[Any, Any]:
        value = self._take(name)
        if value is None:
            return {}
        return Fields(value, f"{self.what}.{name}", self.unknown)._document

    def ignore(self, *names: str) -> None:
        """These are known, and of no use here."""
        self._asked.update(names)

    def rest(self) -> None:
        """All known fields have been asked for."""
        self.unknown.update(f"{self.what}.{str(name)[:60]}" for name in self._document if name not in self._asked)

    def _wrong(self, name: str, value: Any, accepted: str) -> ValueError:
        shown = repr(value)[:60] if isinstance(value, (str, int, float, bool)) else _type(value)
        return ValueError(f"got {shown} as {self.what}.{name}; accepted: {accepted}")


def _type(value: Any) -> str:
    return type(value).__name__
