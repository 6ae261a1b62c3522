"""The OpenAPI document of the server: schemas of bodies are made from the dataclasses that read them."""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from importlib.metadata import version
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from tenure.checked import Named, Range, Size

from ..request import MAX_NAME
from ..workflow.loaders import WorkflowDocument
from .agent_endpoints import MAX_PAGE, PAGE, SessionKeep
from .api_requests import HINT_FIELDS, ChatBody, CompletionBody
from .responses_body import ResponsesBody

Schema = dict[str, Any]
Route = tuple[str, str, Callable[..., Any]]  # method, path as the router has it, handler
PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
REFERENCE = "#/components/schemas/"


class SchemaBuilder:
    """JSON Schemas of annotations, as `tenure.checked` reads them.

    Attributes:
        components: schemas of the dataclasses, by name.
    """

    def __init__(self) -> None:
        self.components: dict[str, Schema] = {}

    def of(self, hint: Any, rules: tuple[Any, ...] = ()) -> Schema:
        """The schema of an annotation with the rules of an `Annotated` around it."""
        origin, parts = get_origin(hint), get_args(hint)
        if origin is Annotated:
            return self.of(hint.__origin__, (*rules, *hint.__metadata__))
        if origin in (Union, types.UnionType):
            return {"anyOf": [self.of(part, rules) for part in parts]}
        if origin is Literal:
            return {"enum": list(parts)}
        if is_dataclass(hint) and isinstance(hint, type):
            return self._dataclass(hint)
        if origin in (tuple, list, Sequence):
            return {"type": "array", "items": self.of(parts[0])} | _sizes(rules, "minItems", "maxItems")
        if origin in (dict, Mapping):
            names = {} if parts[0] is str else {"propertyNames": {"pattern": "^-?[0-9]+$"}}
            return {"type": "object", "additionalProperties": self.of(parts[1])} | names
        kind = PLAIN.get(type(None) if hint is None else hint)
        if kind is None:
            return {}
        found: Schema = {"type": kind}
        if kind == "string":
            found |= _sizes(rules, "minLength", "maxLength")
        for rule in rules:
            if isinstance(rule, Range) and kind in ("integer", "number"):
                found |= _bounds(rule)
        return found

    def _dataclass(self, cls: type) -> Schema:
        name = cls.__name__
        if name not in self.components:
            self.components[name] = {}  # of a class inside itself
            self.components[name] = self._object(cls)
        return {"$ref": REFERENCE + name}

    def _object(self, cls: type) -> Schema:
        """Fields that are not known are accepted."""
        hints = get_type_hints(cls, include_extras=True)
        properties, required = {}, []
        for one in fields(cls):
            named = [rule.name for rule in getattr(hints[one.name], "__metadata__", ()) if isinstance(rule, Named)]
            name = named[0] if named else one.name
            properties[name] = self.of(hints[one.name])
            if one.default is MISSING and one.default_factory is MISSING:
                required.append(name)
        found: Schema = {"type": "object", "properties": properties, "description": _first_line(cls)}
        if required:
            found["required"] = required
        return {"anyOf": [found, {"type": "array"}]} if hasattr(cls, "shorthand") else found


def _sizes(rules: tuple[Any, ...], low: str, high: str) -> Schema:
    found: Schema = {}
    for rule in rules:
        if isinstance(rule, Size):
            found |= {low: rule.low} if rule.low else {}
            found |= {} if rule.high is None else {high: rule.high}
    return found


def _bounds(rule: Range) -> Schema:
    found: Schema = {}
    if not math.isinf(rule.low):
        found["exclusiveMinimum" if rule.above else "minimum"] = rule.low
    if not math.isinf(rule.high):
        found["exclusiveMaximum" if rule.below else "maximum"] = rule.high
    return found


def _first_line(documented: Any) -> str:
    return (inspect.getdoc(documented) or "").partition("\n")[0]


# Responses ----------------------------------------------------------------------------------------------------------


def _object(**properties: Any) -> Schema:
    """An object with these properties, all of which are there; further ones may be."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def _list_of(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _constant(value: str) -> Schema:
    return {"const": value}


TEXT, WHOLE, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
TEXT_OR_NULL: Schema = {"type": ["string", "null"]}
NAME: Schema = {"type": "string", "minLength": 1, "maxLength": MAX_NAME}
USAGE = _object(
    prompt_tokens=WHOLE, completion_tokens=WHOLE, total_tokens=WHOLE,
    prompt_tokens_details=_object(cached_tokens=WHOLE),
)  # fmt: skip
MODEL = _object(id=TEXT, object=_constant("model"), created=WHOLE, owned_by=TEXT, max_model_len=WHOLE)
WORKFLOW = _object(id=TEXT, object=_constant("workflow"))
CHAT_CHOICE = _object(
    index=WHOLE, message=_object(role=_constant("assistant"), content=TEXT_OR_NULL), finish_reason=TEXT
)
RESPONSE_USAGE = _object(
    input_tokens=WHOLE, output_tokens=WHOLE, total_tokens=WHOLE, input_tokens_details=_object(cached_tokens=WHOLE),
    output_tokens_details=_object(reasoning_tokens=WHOLE),
)  # fmt: skip
OUTPUT_ITEM = _object(
    id=TEXT, type={"enum": ["message", "reasoning", "function_call"]}, status={"enum": ["completed", "incomplete"]}
)
RESPONSES: dict[str, Schema] = {
    "Error": _object(error=_object(message=TEXT, type=TEXT, param=TEXT_OR_NULL, code=TEXT_OR_NULL)),
    "ChatCompletion": _object(
        id=TEXT, object=_constant("chat.completion"), created=WHOLE, model=TEXT, usage=USAGE,
        choices=_list_of(CHAT_CHOICE),
    ),
    "Completion": _object(
        id=TEXT, object=_constant("text_completion"), created=WHOLE, model=TEXT, usage=USAGE,
        choices=_list_of(_object(index=WHOLE, text=TEXT, finish_reason=TEXT)),
    ),
    "Response": _object(
        id=TEXT, object=_constant("response"), created_at=WHOLE, model=TEXT, usage=RESPONSE_USAGE,
        status={"enum": ["completed", "incomplete"]}, output=_list_of(OUTPUT_ITEM),
    ),
    "Model": MODEL,
    "ModelList": _object(object=_constant("list"), data=_list_of(MODEL)),
    "Health": _object(status={"enum": ["ok", "draining", "dead"]}),
    "DeclaredWorkflow": _object(id=TEXT, object=_constant("workflow"), agents=_list_of(TEXT)),
    "Workflow": _object(
        id=TEXT, object=_constant("workflow"), running=WHOLE,
        agents={"type": "object", "additionalProperties": _object(join=TEXT, running=WHOLE, steps={})},
        edges=_list_of(_object(**{"from": TEXT, "to": TEXT, "probability": {"type": "number"}})),
    ),
    "WorkflowList": _object(object=_constant("list"), data=_list_of(WORKFLOW), has_more=FLAG),
    "Ended": _object(id=TEXT, object=TEXT, deleted=FLAG),
    "Session": _object(
        id=TEXT, object=_constant("session"), cached_tokens=WHOLE, ended=FLAG, kept_s={"type": ["number", "null"]},
        parent=TEXT_OR_NULL, sub_agents=_list_of(TEXT),
    ),
    "KeptSession": _object(id=TEXT, object=_constant("session"), ttl_s={"type": "number"}),
    "Flushed": _object(status=_constant("flushed")),
}  # fmt: skip


@dataclass(frozen=True)
class Operation:
    """A described endpoint.

    Attributes:
        responses: names in `RESPONSES` by status; errors are added.
        body: the dataclass that reads the request.
        needs_body: a request without one is refused.
        yaml: the body may be YAML, too.
        stream: the response may be server-sent events.
        query: schemas of parameters by name.
        media_type: of a response that is not JSON.
    """

    responses: Mapping[str, str] = field(default_factory=dict)
    body: type | None = None
    needs_body: bool = True
    yaml: bool = False
    stream: bool = False
    query: Mapping[str, Schema] = field(default_factory=dict)
    media_type: str = "application/json"


OPERATIONS: dict[tuple[str, str], Operation] = {
    ("POST", "/v1/chat/completions"): Operation({"200": "ChatCompletion"}, ChatBody, stream=True),
    ("POST", "/v1/completions"): Operation({"200": "Completion"}, CompletionBody, stream=True),
    ("POST", "/v1/responses"): Operation({"200": "Response"}, ResponsesBody, stream=True),
    ("GET", "/v1/responses/{id}"): Operation({"404": "Error"}),
    ("GET", "/v1/models"): Operation({"200": "ModelList"}),
    ("GET", "/v1/models/{name}"): Operation({"200": "Model"}),
    ("GET", "/health"): Operation({"200": "Health", "503": "Health"}),
    ("GET", "/metrics"): Operation(media_type="text/plain"),
    ("GET", "/v1/workflows"): Operation(
        {"200": "WorkflowList"},
        query={"limit": {"type": "integer", "minimum": 1, "maximum": MAX_PAGE, "default": PAGE}, "after": TEXT},
    ),
    ("POST", "/v1/workflows"): Operation({"201": "DeclaredWorkflow"}, WorkflowDocument, yaml=True),
    ("GET", "/v1/workflows/{name}"): Operation({"200": "Workflow"}),
    ("PUT", "/v1/workflows/{name}"): Operation(
        {"200": "DeclaredWorkflow", "201": "DeclaredWorkflow"}, WorkflowDocument, yaml=True
    ),
    ("DELETE", "/v1/workflows/{name}"): Operation({"200": "Ended"}),
    ("GET", "/v1/sessions/{id}"): Operation({"200": "Session"}),
    ("PUT", "/v1/sessions/{id}"): Operation({"200": "KeptSession"}, SessionKeep, needs_body=False),
    ("DELETE", "/v1/sessions/{id}"): Operation({"200": "Ended"}),
    ("POST", "/admin/flush"): Operation({"200": "Flushed"}),
}


def openapi_document(routes: Sequence[Route], model_name: str, keys_required: bool) -> dict[str, Any]:
    """The document of the routes; one that is not in `OPERATIONS` is described by its handler's docstring alone."""
    schemas = SchemaBuilder()
    paths: dict[str, dict[str, Any]] = {}
    for method, route, handler in routes:
        path = route.replace(":path", "")
        operation = OPERATIONS.get((method, path), Operation())
        found: dict[str, Any] = {
            "summary": _first_line(handler),
            "operationId": getattr(handler, "__name__", f"{method} {path}"),
            "responses": _responses(operation),
        }
        parameters = [
            {"name": name, "in": "path", "required": True, "schema": NAME}
            for name in ("name", "id")
            if f"{{{name}}}" in path
        ]
        parameters += [{"name": name, "in": "query", "schema": schema} for name, schema in operation.query.items()]
        if parameters:
            found["parameters"] = parameters
        if operation.body is not None:
            schema = schemas.of(operation.body)
            kinds = ["application/json", *(["application/yaml"] if operation.yaml else [])]
            content = {kind: {"schema": schema} for kind in kinds}
            found["requestBody"] = {"required": operation.needs_body, "content": content}
        if path == "/health":
            found["security"] = []
        paths.setdefault(path, {})[method.lower()] = found
    components: dict[str, Any] = {"schemas": RESPONSES | schemas.components}
    _complete(components["schemas"], model_name)
    document: dict[str, Any] = {
        "openapi": "3.1.0", "info": {"title": "tenure", "version": version("tenure")}, "paths": paths,
        "components": components,
    }  # fmt: skip
    if keys_required:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def _responses(operation: Operation) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": f"{REFERENCE}Error"}}}
    found: dict[str, Any] = {"default": {"description": "an error", "content": error}}
    for status, name in operation.responses.items():
        content: dict[str, Any] = {operation.media_type: {"schema": {"$ref": REFERENCE + name}}}
        if operation.stream:
            content["text/event-stream"] = {"schema": {"type": "string"}}
        found[status] = {"description": "the answer", "content": content}
    if not operation.responses:
        content = {} if operation.media_type == "application/json" else {operation.media_type: {"schema": TEXT}}
        found["200"] = {"description": "the answer"} | ({"content": content} if content else {})
    return found


def _complete(schemas: dict[str, Schema], model_name: str) -> None:
    """Fields that the dataclasses of bodies leave to code: the model's name, the forms of a prompt, and the hints."""
    for name in (ChatBody.__name__, CompletionBody.__name__, ResponsesBody.__name__):
        body = schemas.get(name)
        if body is None:
            continue
        properties = body["properties"]
        properties["model"] = {"enum": [model_name]}
        if "prompt" in properties:
            ids: Schema = {"type": "array", "items": WHOLE, "minItems": 1}
            one = {"anyOf": [TEXT, ids]}
            properties["prompt"] = {"anyOf": [TEXT, ids, {"type": "array", "items": one, "minItems": 1}]}
        for hint, format in HINT_FIELDS.items():
            properties[hint] = {"type": ["object", "null"], "description": f"a hint in the format {format}"}
