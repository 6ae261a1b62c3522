"""Reads a client's document with suspicion: known fields, their types, bounded sizes.

The wire formats that clients send already, each read into a `Hint`.

Every function takes the document, what the server knows of the sender, and a set for the names of unknown fields, and
raises one ValueError for a field that is not of its type. Priorities come out as 0 to 1, durations in bounded seconds.

One door for the hints of all formats.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..request import MAX_NAME, StorePolicy
from .hint import DEFAULT_TTL_S, MAX_TTL_S, NEUTRAL, Action, ActionKind, Hint, SessionAction, normalised, session_agent

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


KEPT = 0.9  # the priority that a bare "keep" stands for
PERCENT = (0.0, 35.0, 100.0)  # retention priorities of TensorRT-LLM, whose default is 35
DYNAMO = (-100.0, 0.0, 100.0)  # "higher first", without bounds there
EDITS = {"offload": ActionKind.EVICT, "evict": ActionKind.EVICT, "prefetch": ActionKind.FETCH}
KV_ACTIONS = {"kv.retain": ActionKind.RETAIN, "kv.evict": ActionKind.EVICT, "kv.fetch": ActionKind.FETCH}


@dataclass(frozen=True)
class Sender:
    """What the server knows: the client, and the agent or session of the request that the document came with."""

    client: str = ""
    agent: str | None = None
    session: str | None = None


def bounded(seconds: float | None, default: float = DEFAULT_TTL_S) -> float:
    return min(MAX_TTL_S, default if seconds is None else seconds)


def target(agent: str | None, session: str | None) -> str | None:
    """The agent that a wish is about; a session without one stands for itself."""
    return agent if agent is not None or session is None else session_agent(session)


def _actions(agent: str | None, *wishes: tuple[ActionKind, float, float]) -> tuple[Action, ...]:
    return () if agent is None else tuple(Action(kind, agent, priority, ttl) for kind, priority, ttl in wishes)


def sglang(document: Any, sender: Sender, unknown: set[str]) -> Hint:
    """`agent_hints` (sgl-project/sglang issue 24656). A child step counts as the agent of that name."""
    fields = Fields(document, "agent_hints", unknown)
    workflow = fields.text("workflow_id")
    agent = fields.text("agent_id") or fields.text("step_id") or sender.agent
    step, total = fields.whole("step_index"), fields.whole("total_steps")
    if step is not None and total is not None and step > total:
        raise ValueError(f"got agent_hints.step_index={step} of total_steps={total}; accepted: up to that")
    children = fields.texts("children_step_ids")
    pause = fields.seconds("expected_tool_duration_ms", 1e-3)
    ttl = fields.seconds("cache_ttl_ms", 1e-3)
    reuse = fields.choice("reuse_hint", ("keep", "neutral", "discard"))
    fields.ignore("step_id", "parent_step_id", "tool_name", "shared_prefix_hash")
    fields.rest()
    about, wishes = target(agent, sender.session), []
    if reuse == "discard":
        wishes.append((ActionKind.EVICT, NEUTRAL, bounded(ttl)))
    elif reuse == "keep" or ttl is not None:
        wishes.append((ActionKind.RETAIN, KEPT if reuse == "keep" else NEUTRAL, bounded(ttl)))
    return Hint(
        "sglang",
        sender.client,
        workflow=workflow,
        agent=agent,
        session=sender.session,
        keep=StorePolicy.DISCARD if reuse == "discard" else None,
        pause_s=None if pause is None else bounded(pause),
        steps=dict.fromkeys(children, 1.0),
        ttl_s=bounded(ttl),
        actions=_actions(about, *wishes),
    )


def dynamo(document: Any, sender: Sender, unknown: set[str]) -> Hint:
    """`nvext` with `agent_hints` and `session_control`."""
    fields = Fields(document, "nvext", unknown)
    hints, control = fields.inner("agent_hints"), fields.inner("session_control")
    priority = expected = action = timeout = None
    session, speculative = fields.text("session_id") or sender.session, False
    fields.rest()
    if hints is not None:
        given, strict = hints.number("priority", -1e9, 1e9), hints.number("strict_priority", -1e9, 1e9)
        priority = None if given is None else normalised(given, *DYNAMO)
        if strict:
            priority = 1.0 if strict > 0 else 0.0  # within the client's own workflow: no tier stands above others
        expected, speculative = hints.whole("osl", 1), hints.flag("speculative_prefill")
        hints.rest()
    if control is not None:
        session = control.text("session_id") or session
        action = control.choice("action", [each.value for each in SessionAction])
        timeout = control.seconds("timeout")
        control.rest()
    about, wishes = target(sender.agent, session), []
    if speculative:
        wishes.append((ActionKind.FETCH, NEUTRAL, bounded(timeout)))
    elif action == "close":
        wishes.append((ActionKind.EVICT, NEUTRAL, bounded(timeout)))
    elif action is not None:
        wishes.append((ActionKind.RETAIN, NEUTRAL, bounded(timeout)))
    return Hint(
        "dynamo",
        sender.client,
        agent=sender.agent,
        session=session,
        session_action=None if action is None else SessionAction(action),
        priority=priority,
        expected_tokens=expected,
        actions=_actions(about, *wishes),
    )


def vllm(document: Any, sender: Sender, unknown: set[str]) -> Hint:
    """`agent_hint`. Where the cached blocks end is not taken over: the tree knows its own pages."""
    fields = Fields(document, "agent_hint", unknown)
    session = fields.text("session_id") or sender.session
    fields.text("parent_session_id")
    control, management = fields.inner("cache_control"), fields.inner("context_management")
    fields.rest()
    about, wishes = target(sender.agent, session), []
    if control is not None:
        control.text("type")
        control.whole("block_offset")
        wishes.append((ActionKind.RETAIN, KEPT, bounded(control.seconds("ttl"))))
        control.rest()
    if management is not None:
        for edit in management.inners("edits"):
            kind = edit.text("type")
            if kind in EDITS:
                wishes.append((EDITS[kind], NEUTRAL, bounded(edit.seconds("ttl"))))
                edit.rest()
            else:
                unknown.add(f"{edit.what}.type={kind}")
        management.rest()
    return Hint("vllm", sender.client, agent=sender.agent, session=session, actions=_actions(about, *wishes))


def kv_hints(document: Any, sender: Sender, unknown: set[str]) -> Hint:
    """The `kv_hints` envelope of vLLM, SGLang and TensorRT-LLM."""
    fields = Fields(document, "kv_hints", unknown)
    fields.text("protocol_version")
    message = fields.text("message_id")
    agent, session = fields.text("agent_id") or sender.agent, fields.text("session_id") or sender.session
    actions: list[Action] = []
    fixed = 0
    for action in fields.inners("actions"):
        kind = action.text("action_type")
        payload = action.inner("payload") or Fields({}, "payload", unknown)
        action.ignore("action_id", "action_version")
        action.rest()
        if kind not in KV_ACTIONS:
            unknown.add(f"{action.what}.action_type={kind}")
            continue
        about = target(payload.text("agent_id") or agent, payload.text("session_id") or session)
        priority, ttl, end = _retention(payload)
        payload.rest()
        if KV_ACTIONS[kind] is ActionKind.RETAIN and priority > NEUTRAL:
            fixed = max(fixed, end)
        actions += _actions(about, (KV_ACTIONS[kind], priority, ttl))
    fields.rest()
    return Hint(
        "kv_hints",
        sender.client,
        message=message,
        agent=agent,
        session=session,
        fixed_tokens=fixed or None,
        actions=tuple(actions),
    )


def _retention(payload: Fields) -> tuple[float, float, int]:
    """Priority, seconds and the end of the token range (0: none is given) of a payload."""
    given = payload.number("priority", 0, 100)
    times = [
        payload.seconds("ttl"),
        payload.seconds("duration"),
        payload.seconds("ttl_ms", 1e-3),
        payload.seconds("duration_ms", 1e-3),
    ]
    ends = [payload.whole("token_end"), payload.whole("end")]
    for name in ("token_start", "start"):  # checked, and of no use: a prefix tree needs all that is before the end
        payload.whole(name)
    span = payload.list("token_range")
    if span:
        bounds = Fields({"start": span[0], "end": span[-1]}, f"{payload.what}.token_range", set())
        if len(span) != 2 or (bounds.whole("start") or 0) > (bounds.whole("end") or 0):
            raise ValueError(f"got a {payload.what}.token_range of {len(span)} numbers; accepted: start and end of it")
        ends.append(bounds.whole("end"))
    priority = NEUTRAL if given is None else normalised(given, *PERCENT)
    ttl = next((time for time in times if time is not None), None)
    return priority, bounded(ttl), max((end for end in ends if end is not None), default=0)


def tensorrt(document: Any, sender: Sender, unknown: set[str]) -> Hint:
    """`KvCacheRetentionConfig`: what is worth more than the default at a prompt's beginning is its fixed part."""
    fields = Fields(document, "KvCacheRetentionConfig", unknown)
    fixed, best, ttl = 0, 0.0, None
    for part in fields.inners("token_range_retention_configs"):
        start, end = part.whole("token_start") or 0, part.whole("token_end")
        if end is not None and end < start:
            raise ValueError(f"got a token range from {start} to {end}; accepted: an end behind its start")
        given, seconds = part.whole("priority", 0, 100), part.seconds("duration_ms", 1e-3)
        priority = NEUTRAL if given is None else normalised(given, *PERCENT)
        part.rest()
        if priority > NEUTRAL:  # a prefix tree needs all that is before it, too
            fixed = max(fixed, 2**31 - 1 if end is None else end)
            best, ttl = max((best, ttl), (priority, seconds), key=lambda pair: pair[0])
    decode = fields.whole("decode_retention_priority", 0, 100)
    fields.seconds("decode_duration_ms", 1e-3)
    fields.ignore("transfer_mode", "directory")
    fields.rest()
    wishes = [(ActionKind.RETAIN, best, bounded(ttl))] if fixed else []
    return Hint(
        "tensorrt",
        sender.client,
        agent=sender.agent,
        session=sender.session,
        keep=StorePolicy.DISCARD if decode == 0 else None,
        fixed_tokens=fixed or None,
        actions=_actions(target(sender.agent, sender.session), *wishes),
    )


def kvflow(document: Any, sender: Sender, unknown: set[str]) -> Hint:
    """What PanZaifeng/KVFlow sends: `agent_id` with a request; `agent_data` (steps by agent) and `timestep_data`
    (agents by steps) once a step, counted by `timestep_cnt`."""
    fields = Fields(document, "kvflow", unknown)
    agent, counter = fields.text("agent_id") or sender.agent, fields.whole("timestep_cnt", 0, 2**63)
    steps: dict[str, float] = {}
    for number, agents in fields.items("timestep_data").items():
        far = _steps(number)
        for name in Fields({"agents": agents}, "kvflow.timestep_data", unknown).texts("agents"):
            steps[name] = min(far, steps.get(name, far))
    for name, number in fields.items("agent_data").items():
        steps[fields.checked("agent_data", name)] = _steps(number)
    fields.rest()
    return Hint("kvflow", sender.client, agent=agent, session=sender.session, steps=steps, sequence=counter)


def _steps(value: Any) -> float:
    """A number of steps, which JSON may have made the key of a mapping; -1 means out of sight."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -2.0
    if not -1 <= number < 1e9 or isinstance(value, bool):
        raise ValueError(f"got {str(value)[:60]!r} as steps of an agent; accepted: a number from 0 up, or -1 for never")
    return number if number >= 0 else 1e9


FORMATS: dict[str, Callable[[Any, Sender, set[str]], Hint]] = {
    "dynamo": dynamo,
    "kv_hints": kv_hints,
    "kvflow": kvflow,
    "sglang": sglang,
    "tensorrt": tensorrt,
    "vllm": vllm,
}
MAX_WARNED = 1000  # names of unknown fields that are remembered; beyond, nothing is warned about


def hint_formats() -> tuple[str, ...]:
    """The formats that `HintReader.read` knows."""
    return tuple(sorted(FORMATS))


class HintReader:
    """Reads documents into hints and warns once about each unknown field; a server has one reader."""

    def __init__(self) -> None:
        self._warned: set[str] = set()

    def read(
        self, source: str, document: Any, client: str = "", agent: str | None = None, session: str | None = None
    ) -> Hint:
        """A client's document as a hint.

        Args:
            source: its format, of `hint_formats()`.
            document: the parsed JSON.
            client, agent, session: of the request it came with, as the server knows them; what the document says
                about agent and session goes before.

        Raises:
            ValueError: no such format, or a known field of a wrong type or size.
        """
        if source not in FORMATS:
            raise ValueError(f"unknown hint format {source!r:.60}; known: {', '.join(hint_formats())}")
        unknown: set[str] = set()
        hint = FORMATS[source](document, Sender(client, agent, session), unknown)
        fresh = sorted(unknown - self._warned)[: MAX_WARNED - len(self._warned)]
        if fresh:
            self._warned.update(fresh)
            shown = ", ".join(fresh[:10])
            warnings.warn(f"unknown fields of hints are left out: {shown}", stacklevel=2)
        return hint


def request_fields(hint: Hint) -> dict[str, Any]:
    """The fields of a `Request` that the hint which came with it decides; those it says nothing of are not in it."""
    agent = hint.agent
    if agent is None and hint.session is not None and (hint.actions or hint.fixed_tokens):
        agent = session_agent(hint.session)
    found = {
        "workflow": hint.workflow,
        "agent": agent,
        "session": hint.session,
        "client": hint.client or None,
        "priority": hint.priority,
        "store_policy": hint.keep,
        "expected_tokens": hint.expected_tokens,
        "fixed_tokens": hint.fixed_tokens,
    }
    return {name: value for name, value in found.items() if value is not None}
