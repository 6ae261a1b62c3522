"""The workflow, agent and sessions of a call, from its headers and hints, all inside its client's own space."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..hints.formats import HintReader, request_fields
from ..hints.hint import Hint, SessionAction, session_agent
from ..request import MAX_WORKFLOW_NAME, check_name, shown
from .api_keys import Caller
from .api_requests import HINT_FIELDS

# Headers by what they name, the first of several precedes. Sessions: ours, Dynamo's, OpenCode's and Codex's.
HEADERS = {
    "agent": ("x-tenure-agent",),
    "workflow": ("x-tenure-workflow",),
    "session": ("x-tenure-session", "x-dynamo-session-id", "x-session-id", "thread-id"),
    "parent session": (
        "x-tenure-parent-session", "x-dynamo-parent-session-id", "x-parent-session-id", "x-codex-parent-thread-id",
    ),
}  # fmt: skip
LAST_CALL = ("x-tenure-session-final", "x-dynamo-session-final")  # `true`: the session ends with this call
GROUP, SALT = "group", "salt"  # kinds of namespaces, in tuples, which no client's name can be


@dataclass(frozen=True)
class CallContext:
    """Everything about a call besides its prompt.

    Attributes:
        fields: of the `Request`.
        hints: to be passed on before the request.
        last_hints: to be passed on when it has been answered.
    """

    fields: dict[str, Any]
    hints: list[Hint] = field(default_factory=list)
    last_hints: list[Hint] = field(default_factory=list)


def workflow_key(name: str, caller: Caller) -> str:
    """The name in the step graph of a client's workflow, which no other client can name.

    Raises:
        ValueError: not a name of 1 to `MAX_WORKFLOW_NAME` characters.
    """
    check_name(name, "a workflow")
    if len(name) > MAX_WORKFLOW_NAME:
        raise ValueError(f"got {len(name)} characters as the name of a workflow; accepted: up to {MAX_WORKFLOW_NAME}")
    return f"{caller.client}/{name}" if caller.client else name


def namespace_of(caller: Caller, cache_salt: str | None) -> Hashable:
    """The namespace of a call's prompts: its client's, or its group's, divided by the salt that the client gives."""
    space = caller.client or None if caller.share is None else (GROUP, caller.share)
    return space if cache_salt is None else (space, SALT, cache_salt)


def read_context(
    hints: Mapping[str, Any], headers: Mapping[str, str], caller: Caller, reader: HintReader, agent: str | None = None,
    cache_salt: str | None = None,
) -> CallContext:  # fmt: skip
    """Reads the hints of a body, by field, and the headers, which precede them.

    Args:
        agent: the name made from the fixed prompt, for a call that does not name its agent.
        cache_salt: of the body, which precedes that of a hint.

    Raises:
        ValueError: a name or a hint of a wrong type or size.
    """
    named = {
        what: check_name(headers[name], f"the {what} in the header {name}")
        for what, names in HEADERS.items()
        for name in names[::-1]
        if name in headers
    }
    parent, final = named.pop("parent session", None), _flag(headers)
    read = [
        reader.read(HINT_FIELDS[name], document, caller.client, named.get("agent", agent), named.get("session"))
        for name, document in hints.items()
    ]
    fields: dict[str, Any] = {} if agent is None else {"agent": agent}
    for hint in read:
        fields |= request_fields(hint)
        parent = parent or hint.parent_session
        cache_salt = cache_salt or hint.cache_salt
    fields |= named
    if "workflow" in fields:
        fields["workflow"] = workflow_key(fields["workflow"], caller)
    fields |= {"client": caller.client, "namespace": namespace_of(caller, cache_salt)}
    session = fields.get("session")
    final = final or any(hint.session_action is SessionAction.CLOSE for hint in read)
    first = [_without_end(hint) for hint in read]
    if session is not None and parent is not None:
        first.append(Hint("server", caller.client, session=session, parent_session=parent))
    last = []
    if session is not None and final:
        last.append(Hint("server", caller.client, session=session, session_action=SessionAction.CLOSE))
    return CallContext(fields, first, last)


def _without_end(hint: Hint) -> Hint:
    """A hint that came with the last call of a session, without the end, which follows the call's answer."""
    if hint.session_action is not SessionAction.CLOSE or hint.session is None:
        return hint
    ended = session_agent(hint.session)
    return replace(hint, session_action=None, actions=tuple(one for one in hint.actions if one.agent != ended))


def _flag(headers: Mapping[str, str]) -> bool:
    """Whether a header says that the session ends with this call.

    Raises:
        ValueError: it is neither true nor false.
    """
    for name in LAST_CALL:
        value = headers.get(name)
        if value is not None:
            if value.lower() not in ("true", "false"):
                raise ValueError(f"got {shown(value)} in the header {name}; accepted: true or false")
            return value.lower() == "true"
    return False
