"""The workflow, agent and session of a call, from its headers and hints, all inside its client's own space."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..hints.formats import HintReader, request_fields
from ..hints.hint import Hint
from ..request import MAX_WORKFLOW_NAME, check_name
from .api_keys import Caller
from .api_requests import HINT_FIELDS

HEADERS = {
    "agent": ("x-tenure-agent",),
    "workflow": ("x-tenure-workflow",),
    "session": ("x-tenure-session", "x-dynamo-session-id"),
}


@dataclass(frozen=True)
class CallContext:
    """Everything about a call besides its prompt.

    Attributes:
        fields: of the `Request`.
        hints: to be passed on before the request.
    """

    fields: dict[str, Any]
    hints: list[Hint] = field(default_factory=list)


def workflow_key(name: str, caller: Caller) -> str:
    """The name in the step graph of a client's workflow, which no other client can name.

    Raises:
        ValueError: not a name of 1 to `MAX_WORKFLOW_NAME` characters.
    """
    check_name(name, "a workflow")
    if len(name) > MAX_WORKFLOW_NAME:
        raise ValueError(f"got {len(name)} characters as the name of a workflow; accepted: up to {MAX_WORKFLOW_NAME}")
    return f"{caller.client}/{name}" if caller.client else name


def read_context(
    hints: Mapping[str, Any], headers: Mapping[str, str], caller: Caller, reader: HintReader, agent: str | None = None
) -> CallContext:
    """Reads the hints of a body, by field, and the headers, which precede them.

    Args:
        agent: the name made from the fixed prompt, for a call that does not name its agent.

    Raises:
        ValueError: a name or a hint of a wrong type or size.
    """
    named = {
        what: check_name(headers[name], f"the {what} in the header {name}")
        for what, names in HEADERS.items()
        for name in names[::-1]
        if name in headers
    }
    read = [
        reader.read(HINT_FIELDS[name], document, caller.client, named.get("agent", agent), named.get("session"))
        for name, document in hints.items()
    ]
    fields: dict[str, Any] = {} if agent is None else {"agent": agent}
    for hint in read:
        fields |= request_fields(hint)
    fields |= named
    if "workflow" in fields:
        fields["workflow"] = workflow_key(fields["workflow"], caller)
    # A client's prompts are shared by its own calls, and with nobody else.
    fields |= {"client": caller.client, "namespace": caller.client or None}
    return CallContext(fields, read)
