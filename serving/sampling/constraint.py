"""Constraints on the text of an answer, and their sources for the two libraries that enforce them.

xgrammar (Dong et al. 2024) reads structural tags in JSON, llguidance a dialect of Lark. xgrammar is asked first; what
it would accept without enforcing it, and what it refuses, is for llguidance.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .grammar_config import GrammarConfig
from .json_schema import check_schema, regex_gap, xgrammar_gap


class LarkRules:
    """The rules of a Lark grammar while it is written; each has a name of its own.

    Args:
        max_whitespace: characters between two tokens of JSON.
    """

    def __init__(self, max_whitespace: int) -> None:
        self.max_whitespace = max_whitespace
        self._lines: list[str] = []

    def add(self, body: str, options: str = "") -> str:
        """Adds a rule and returns its name."""
        name = f"p{len(self._lines)}"
        self._lines.append(f"{name}{options}: {body}")
        return name

    def text(self, start: str) -> str:
        """The whole grammar."""
        return "\n".join([f"start: {start}", *self._lines])


class Constraint(ABC):
    """A set of texts; an answer under it is one of them, or the beginning of one where it is cut short."""

    @abstractmethod
    def tag(self, max_whitespace: int) -> dict[str, Any]:
        """xgrammar's format, a part of a structural tag."""

    @abstractmethod
    def lark(self, rules: LarkRules) -> str:
        """Adds llguidance's rules and returns the name of the one for this constraint.

        Raises:
            ValueError: llguidance has nothing like it.
        """

    def check(self, config: GrammarConfig) -> None:
        """Raises ValueError for what neither library enforces, or what exceeds a bound."""
        for part in self.inner:
            part.check(config)

    @property
    def inner(self) -> Sequence[Constraint]:
        """The constraints that it is made of."""
        return ()

    @property
    def gap(self) -> str | None:
        """The part of it that xgrammar would accept without enforcing it; None: nothing."""
        return next((gap for part in self.inner if (gap := part.gap) is not None), None)

    def structural_tag(self, max_whitespace: int) -> str:
        """xgrammar's source."""
        return json.dumps({"type": "structural_tag", "format": self.tag(max_whitespace)})

    def lark_grammar(self, max_whitespace: int) -> str:
        """llguidance's source; raises as `lark` does."""
        rules = LarkRules(max_whitespace)
        return rules.text(self.lark(rules))


@dataclass(frozen=True)
class FixedText(Constraint):
    """One text, not empty."""

    value: str

    def tag(self, max_whitespace: int) -> dict[str, Any]:
        return {"type": "const_string", "value": self.value}

    def lark(self, rules: LarkRules) -> str:
        return rules.add(json.dumps(self.value, ensure_ascii=False))


@dataclass(frozen=True)
class JsonValue(Constraint):
    """JSON that a schema allows; the properties of an object follow in the schema's order.

    Attributes:
        name: of the schema in messages.
    """

    schema: Mapping[str, Any]
    name: str = "the schema"

    def check(self, config: GrammarConfig) -> None:
        check_schema(self.schema, self.name, config.max_source_bytes)

    def tag(self, max_whitespace: int) -> dict[str, Any]:
        return {"type": "json_schema", "json_schema": dict(self.schema), "max_whitespace_cnt": max_whitespace}

    def lark(self, rules: LarkRules) -> str:
        options = {"whitespace_pattern": rf"[\x20\x0A\x0D\x09]{{0,{rules.max_whitespace}}}"}
        return rules.add(f"%json {json.dumps({'x-guidance': options, **self.schema})}")

    @property
    def gap(self) -> str | None:
        return xgrammar_gap(self.schema)


@dataclass(frozen=True)
class Regex(Constraint):
    """Texts that match a regular expression as a whole."""

    pattern: str

    def check(self, config: GrammarConfig) -> None:
        if not 0 < len(self.pattern) <= config.max_regex_characters:
            raise ValueError(
                f"got a regular expression of {len(self.pattern)} characters; accepted: 1 to "
                f"{config.max_regex_characters}"
            )

    def tag(self, max_whitespace: int) -> dict[str, Any]:
        return {"type": "regex", "pattern": self.pattern}

    def lark(self, rules: LarkRules) -> str:
        escaped, found = False, ""
        for character in self.pattern:
            if escaped or character not in "/\n\r":
                found += character
            else:
                found += {"/": r"\/", "\n": r"\n", "\r": r"\r"}[character]
            escaped = character == "\\" and not escaped
        return rules.add(f"/{found}/")

    @property
    def gap(self) -> str | None:
        return regex_gap(self.pattern)


@dataclass(frozen=True)
class Ebnf(Constraint):
    """Texts of a grammar in the EBNF of llama.cpp (GBNF), from its rule `root`."""

    grammar: str

    def tag(self, max_whitespace: int) -> dict[str, Any]:
        return {"type": "grammar", "grammar": self.grammar}

    def lark(self, rules: LarkRules) -> str:
        raise ValueError("a grammar in EBNF needs xgrammar")


@dataclass(frozen=True)
class Concatenation(Constraint):
    """Constraints one after the other."""

    parts: tuple[Constraint, ...]

    def tag(self, max_whitespace: int) -> dict[str, Any]:
        return {"type": "sequence", "elements": [part.tag(max_whitespace) for part in self.parts]}

    def lark(self, rules: LarkRules) -> str:
        return rules.add(" ".join([part.lark(rules) for part in self.parts]))

    @property
    def inner(self) -> Sequence[Constraint]:
        return self.parts


@dataclass(frozen=True)
class OneOf(Constraint):
    """Any one of several constraints."""

    parts: tuple[Constraint, ...]

    def check(self, config: GrammarConfig) -> None:
        if not 0 < len(self.parts) <= config.max_choices:
            raise ValueError(f"got {len(self.parts)} choices; accepted: 1 to {config.max_choices}")
        super().check(config)

    def tag(self, max_whitespace: int) -> dict[str, Any]:
        return {"type": "or", "elements": [part.tag(max_whitespace) for part in self.parts]}

    def lark(self, rules: LarkRules) -> str:
        return rules.add(" | ".join([part.lark(rules) for part in self.parts]))

    @property
    def inner(self) -> Sequence[Constraint]:
        return self.parts


@dataclass(frozen=True)
class Maybe(Constraint):
    """A constraint, or nothing."""

    part: Constraint

    def tag(self, max_whitespace: int) -> dict[str, Any]:
        return {"type": "optional", "content": self.part.tag(max_whitespace)}

    def lark(self, rules: LarkRules) -> str:
        return rules.add(f"{self.part.lark(rules)}?")

    @property
    def inner(self) -> Sequence[Constraint]:
        return (self.part,)


@dataclass(frozen=True)
class Tagged:
    """A constraint between two fixed texts."""

    begin: str
    content: Constraint
    end: str

    def tag(self, max_whitespace: int) -> dict[str, Any]:
        """xgrammar's tag."""
        return {"type": "tag", "begin": self.begin, "content": self.content.tag(max_whitespace), "end": self.end}

    def lark(self, rules: LarkRules) -> str:
        """Adds llguidance's rules."""
        return Concatenation((FixedText(self.begin), self.content, FixedText(self.end))).lark(rules)


@dataclass(frozen=True)
class Tags(Constraint):
    """One or more of several tagged texts.

    Attributes:
        separator: between two of them.
        many: more than one may follow.
        trigger: None: nothing else is allowed. Else any text is, with no tag at all too, but a tag must follow where
            the text has `trigger`, with which every tag begins.
    """

    tags: tuple[Tagged, ...]
    separator: str
    many: bool
    trigger: str | None = None

    def tag(self, max_whitespace: int) -> dict[str, Any]:
        tags = [one.tag(max_whitespace) for one in self.tags]
        if self.trigger is not None:
            return {
                "type": "triggered_tags", "triggers": [self.trigger], "tags": tags, "stop_after_first": not self.many,
            }  # fmt: skip
        return {
            "type": "tags_with_separator", "tags": tags, "separator": self.separator, "at_least_one": True,
            "stop_after_first": not self.many,
        }  # fmt: skip

    def lark(self, rules: LarkRules) -> str:
        if self.trigger is not None:
            raise ValueError("tools that are strict, but need not be called, need xgrammar")
        one = rules.add(" | ".join([tagged.lark(rules) for tagged in self.tags]))
        return rules.add(f"{one} ({json.dumps(self.separator)} {one})*") if self.many else one

    @property
    def inner(self) -> Sequence[Constraint]:
        return [one.content for one in self.tags]


@dataclass(frozen=True)
class TextUntil(Constraint):
    """Any text up to and with its first `end`."""

    end: str

    def tag(self, max_whitespace: int) -> dict[str, Any]:
        return {"type": "tag", "begin": "", "content": {"type": "any_text"}, "end": self.end}

    def lark(self, rules: LarkRules) -> str:
        escaped = "".join(f"\\x{ord(one):02X}" for one in self.end)
        return rules.add(f"/(?s:.*){escaped}/", "[lazy]")
