"""JSON schemas of clients: bounds, keywords that are not enforced, and keywords for which xgrammar is not enough.

Nothing is ignored in silence: a schema is either enforced as a whole, or refused by the name of a keyword.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from tenure.documents import shown, shown_name

# Keywords that describe a value and forbid none.
ANNOTATIONS = frozenset(
    {
        "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "discriminator",
        "contentEncoding", "contentMediaType", "$schema", "$comment", "$defs", "definitions",
    }
)  # fmt: skip
# Keywords that one of the two libraries enforces.
ENFORCED = frozenset(
    {
        "type", "enum", "const", "$ref", "anyOf", "oneOf", "allOf", "properties", "required", "additionalProperties",
        "patternProperties", "propertyNames", "minProperties", "maxProperties", "items", "prefixItems", "minItems",
        "maxItems", "minLength", "maxLength", "pattern", "format", "minimum", "maximum", "exclusiveMinimum",
        "exclusiveMaximum", "multipleOf",
    }
)  # fmt: skip
FORMATS = frozenset(
    {
        "email", "date", "time", "date-time", "duration", "ipv4", "ipv6", "hostname", "uuid", "uri", "uri-reference",
        "uri-template", "json-pointer", "relative-json-pointer",
    }
)  # fmt: skip
# Keywords that xgrammar does not enforce beside some others; beside any, where none are named.
_ALONE: dict[str, frozenset[str]] = {
    "oneOf": frozenset(), "allOf": frozenset(), "multipleOf": frozenset(),
    "minLength": frozenset(), "maxLength": frozenset(),  # with them it allows control characters, which JSON does not
    "patternProperties": frozenset({"properties"}), "propertyNames": frozenset({"properties", "patternProperties"}),
}  # fmt: skip
_BOUNDS = frozenset(
    {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minLength", "maxLength", "pattern", "format"}
)
_OF_NAMES = frozenset({"properties", "patternProperties", "$defs", "definitions"})  # a schema for each name
_OF_SCHEMAS = frozenset({"items", "additionalProperties", "propertyNames"})  # one schema
_OF_LISTS = frozenset({"anyOf", "oneOf", "allOf", "prefixItems"})  # a list of schemas
_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,), "null": (type(None),),
    "array": (list,), "object": (Mapping,),
}  # fmt: skip


def check_schema(schema: Any, name: str, max_bytes: int) -> None:
    """Checks that a schema's keywords are known; that they are used rightly is for the libraries to say.

    Args:
        schema: parsed.
        name: the schema in messages.
        max_bytes: of its JSON text.

    Raises:
        ValueError: it is no object, too large, or has a keyword that is not enforced, by name and place.
    """
    if not isinstance(schema, Mapping):
        raise ValueError(f"got {shown(schema)} as {name}; accepted: a JSON schema, which is an object")
    size = len(json.dumps(schema, ensure_ascii=False).encode())
    if size > max_bytes:
        raise ValueError(f"got {size} bytes as {name}; accepted: up to {max_bytes}")
    for path, one in _schemas(schema, name):
        if isinstance(one, bool):
            continue
        if not isinstance(one, Mapping):
            raise ValueError(f"got {shown(one)} as {path}; accepted: a JSON schema")
        unknown = sorted(shown_name(key) for key in one if key not in ENFORCED and key not in ANNOTATIONS)
        if unknown:
            raise ValueError(
                f"got the keyword {', '.join(map(shown, unknown[:5]))} in {path}, which is not enforced; accepted: "
                f"{', '.join(sorted(ENFORCED))}"
            )
        reference = one.get("$ref", "#")
        if not isinstance(reference, str) or not reference.startswith("#"):
            raise ValueError(f"got {shown(reference)} as {path}.$ref; accepted: a place in the schema, as #/$defs/name")


def xgrammar_gap(schema: Any) -> str | None:
    """The part of a checked schema that xgrammar 0.2 accepts without enforcing it, as words; None: nothing."""
    for path, one in _schemas(schema, "the schema"):
        found = _gap(one) if isinstance(one, Mapping) else None
        if found is not None:
            return f"{found}, in {path}"
    return None


def _gap(schema: Mapping[str, Any]) -> str | None:
    keys = set(schema) - ANNOTATIONS
    for alone in ("$ref", "anyOf"):
        if alone in keys and len(keys) > 1:
            return f"{alone} beside other keywords"
    if "type" in keys and not all(_is_type(value, schema["type"]) for value in _values(schema)):
        return "enum or const beside a type that excludes it"
    if "type" not in keys and keys & _BOUNDS:
        return f"{sorted(keys & _BOUNDS)[0]} without a type"
    for name, others in _ALONE.items():
        if name in keys and (keys & others or not others):
            return f"{name} beside {sorted(keys & others)[0]}" if others else name
    if (keys & {"pattern", "format"} and keys & {"minLength", "maxLength"}) or keys >= {"pattern", "format"}:
        return "pattern or format beside another bound of a string"
    if keys & {"enum", "const"} and keys - {"enum", "const", "type"}:
        return "enum or const beside other keywords"
    if schema.get("format", "date") not in FORMATS:
        return "an unknown format"
    named = schema.get("properties")
    if set(schema.get("required") or ()) - set(named if isinstance(named, Mapping) else ()):
        return "required names without a property"
    patterns = [schema.get("pattern"), *(schema.get("patternProperties") or ())]
    return next((gap for one in patterns if isinstance(one, str) and (gap := regex_gap(one))), None)


def regex_gap(pattern: str) -> str | None:
    """The part of a regular expression that xgrammar reads otherwise than JSON Schema and Python do, as words.

    Its `.` and its negated classes also match line ends and quotes, and it takes inner anchors for nothing.
    """
    plain = re.sub(r"\\.", lambda match: match[0] if match[0] in (r"\D", r"\W", r"\S") else "", pattern, flags=re.S)
    outside = re.sub(r"\[[^\]]*\]", "[]", plain)
    if re.search(r"\[\^|\\[DWS]", plain) or "." in outside:
        return "a dot or a negated class in a regular expression"
    if ("|" in outside and re.search(r"[$^]", outside)) or re.search(r"[$^]", outside[1:-1]):
        return "an anchor inside a regular expression"
    return None


def _values(schema: Mapping[str, Any]) -> list[Any]:
    enum = schema.get("enum")
    return [*(enum if isinstance(enum, list | tuple) else ()), *([schema["const"]] if "const" in schema else ())]


def _is_type(value: Any, types: Any) -> bool:
    for name in types if isinstance(types, list | tuple) else (types,):
        if isinstance(value, bool) and name != "boolean":
            continue
        if isinstance(name, str) and isinstance(value, _TYPES.get(name, ())):
            return True
    return False


def _schemas(schema: Any, path: str) -> Iterator[tuple[str, Any]]:
    """A schema and all schemas in it, with their places."""
    pending = [(path, schema)]
    while pending:
        path, one = pending.pop()
        yield path, one
        for key, value in one.items() if isinstance(one, Mapping) else ():
            place = f"{path}.{shown_name(key)}"
            if key in _OF_NAMES and isinstance(value, Mapping):
                pending += [(f"{place}.{shown_name(name)}", each) for name, each in value.items()]
            elif key in _OF_SCHEMAS:
                pending.append((place, value))
            elif key in _OF_LISTS and isinstance(value, list | tuple):
                pending += [(f"{place}[{number}]", each) for number, each in enumerate(value)]
