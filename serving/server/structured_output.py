"""Fields that fix the form of an answer: OpenAI's `response_format`, vLLM's `structured_outputs` and `guided_…`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from tenure.checked import Size

from ..sampling.constraint import Constraint, Ebnf, FixedText, JsonValue, OneOf, Regex
from .api_errors import bad_request

ANY_OBJECT: dict[str, Any] = {"type": "object", "additionalProperties": True}


@dataclass(frozen=True)
class SchemaFormat:
    """The `json_schema` of a response format.

    Attributes:
        name, description, strict: of no effect: every schema is enforced.
    """

    name: Annotated[str, Size(1, 64)]
    schema: Mapping[str, Any]
    description: str | None = None
    strict: bool | None = None


@dataclass(frozen=True)
class ResponseFormat:
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None

    def __post_init__(self) -> None:
        if (self.type == "json_schema") != (self.json_schema is not None):
            given = "without" if self.json_schema is None else "with"
            raise ValueError(
                f"got type {self.type} {given} json_schema; accepted: "
                '{"type": "json_schema", "json_schema": {"name": …, "schema": …}}, or another type alone'
            )


@dataclass(frozen=True)
class StructuredOutputs:
    """vLLM's `structured_outputs`, of which at most one is given.

    Attributes:
        json: a JSON schema, or its text.
        json_object: any JSON object.
        grammar: in EBNF, as llama.cpp has it, with the rule `root`.
    """

    json: Mapping[str, Any] | str | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: tuple[Annotated[str, Size(1)], ...] | None = None
    grammar: str | None = None

    def constraints(self) -> dict[str, Constraint]:
        """The given constraints, by field."""
        found: dict[str, Constraint] = {}
        if self.json is not None:
            found["json"] = JsonValue(_schema(self.json), "the schema in json")
        if self.json_object:
            found["json_object"] = JsonValue(ANY_OBJECT)
        if self.regex is not None:
            found["regex"] = Regex(self.regex)
        if self.choice is not None:
            found["choice"] = OneOf(tuple(FixedText(one) for one in self.choice))
        if self.grammar is not None:
            found["grammar"] = Ebnf(self.grammar)
        return found


GUIDED = ("json", "regex", "choice", "grammar")  # vLLM's older fields, with `guided_` before


def requested_constraint(
    response_format: ResponseFormat | None, structured: StructuredOutputs | None, guided: StructuredOutputs
) -> tuple[str, Constraint] | None:
    """The constraint that a body asks for, with its field; None: it asks for none.

    Raises:
        ApiError: 400, it asks for two.
        ValueError: a schema's text is no JSON.
    """
    found: dict[str, Constraint] = {}
    if response_format is not None and response_format.type != "text":
        schema = response_format.json_schema
        found["response_format"] = JsonValue(ANY_OBJECT if schema is None else schema.schema, "the schema")
    if structured is not None:
        found |= {f"structured_outputs.{name}": one for name, one in structured.constraints().items()}
    found |= {f"guided_{name}": one for name, one in guided.constraints().items()}
    if len(found) > 1:
        raise bad_request(f"got {' and '.join(found)}; accepted: one of them", [*found][-1].partition(".")[0])
    return next(iter(found.items()), None)


def _schema(given: Mapping[str, Any] | str) -> Mapping[str, Any]:
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"got a schema that is no JSON: {error}; accepted: a JSON schema") from None
