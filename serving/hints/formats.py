"""Reads clients' wire formats into a `Hint`, one function a format, and checks untrusted documents.

Each format function takes the document and a `HintContext`, collects the names of unknown fields in it, and raises one
ValueError for a field of a wrong type or size. Priorities are mapped to 0 to 1, durations to bounded seconds.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..request import MAX_NAME, StorePolicy
from .hint import NEUTRAL, ActionKind, Hint, HintAction, HintConfig, SessionAction, normalised, session_agent

PERCENT = (0.0, 35.0, 100.0)  # lowest, neutral, highest: retention priorities of TensorRT-LLM, whose default is 35
DYNAMO = (-100.0, 0.0, 100.0)  # "higher first", without bounds there
EDITS = {"offload": ActionKind.EVICT, "evict": ActionKind.EVICT, "prefetch": ActionKind.FETCH}
KV_ACTIONS = {"kv.retain": ActionKind.RETAIN, "kv.evict": ActionKind.EVICT, "kv.fetch": ActionKind.FETCH}
TRANSFERS = (
    "do_remote_prefill", "do_remote_decode", "remote_engine_id", "remote_request_id", "remote_block_ids", "remote_host",
    "remote_port", "tp_size", "transfer_id",
)  # fmt: skip
NEVER = 1e9  # steps to the next call of an agent that will not be called


@dataclass(frozen=True)
class HintContext:
    """The server's knowledge of the request that a document came with.

    Attributes:
        client, agent, session: of the request.
        config: bounds.
        unknown: collects the names of unknown fields.
    """

    client: str = ""
    agent: str | None = None
    session: str | None = None
    config: HintConfig = field(default_factory=HintConfig)
    unknown: set[str] = field(default_factory=set)

    def bounded_ttl(self, seconds: float | None) -> float:
        return self.config.bounded_ttl(seconds)


class HintFields:
    """A mapping whose known fields are read one by one, each with a check; the others are unknown.

    Args:
        document: as received.
        what: its name in messages, e.g. `agent_hints`.
        context: bounds; collects unknown fields once `finish` is called.

    Raises:
        ValueError: `document` is no mapping, or has more than `max_items` fields. All readers raise it for a value of
            a wrong type or size.
    """

    def __init__(self, document: Any, what: str, context: HintContext) -> None:
        limit = context.config.max_items
        if not isinstance(document, Mapping):
            raise ValueError(f"got {_type(document)} as {what}; accepted: an object with fields")
        if len(document) > limit:
            raise ValueError(f"got {len(document)} fields in {what}; accepted: up to {limit}")
        self._document, self.what, self.context = document, what, context
        self._read: set[str] = set()

    def _take(self, name: str) -> Any:
        self._read.add(name)
        return self._document.get(name)

    def text(self, name: str) -> str | None:
        value = self._take(name)
        return None if value is None else self.checked(name, value)

    def checked(self, name: str, value: Any) -> str:
        """`value`, if it is valid as the field of that name."""
        if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() < 64:
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
        """A duration in seconds, given in multiples of `unit` seconds."""
        value = self.number(name)
        return None if value is None else value * unit

    def inner(self, name: str) -> HintFields | None:
        value = self._take(name)
        return None if value is None else HintFields(value, f"{self.what}.{name}", self.context)

    def list(self, name: str) -> Sequence[Any]:
        value, limit = self._take(name), self.context.config.max_items
        if value is None:
            return ()
        if not isinstance(value, Sequence) or isinstance(value, (str, bytes)) or len(value) > limit:
            raise self._wrong(name, value, f"a list of up to {limit} items")
        return value

    def texts(self, name: str) -> list[str]:
        return [self.checked(name, item) for item in self.list(name)]

    def inners(self, name: str) -> list[HintFields]:
        return [HintFields(item, f"{self.what}.{name}", self.context) for item in self.list(name)]

    def items(self, name: str) -> Mapping[Any, Any]:
        value = self._take(name)
        if value is None:
            return {}
        return HintFields(value, f"{self.what}.{name}", self.context)._document

    def value(self, name: str) -> Any:
        """The field as it is, for another reader."""
        return self._take(name)

    def ignore(self, *names: str) -> bool:
        """Marks fields as known although they are not used; returns whether there is one of them."""
        self._read.update(names)
        return any(self._document.get(name) is not None for name in names)

    def finish(self) -> None:
        """Collects the fields that were not read as unknown."""
        self.context.unknown.update(
            f"{self.what}.{_printable(name)}" for name in self._document if name not in self._read
        )

    def _wrong(self, name: str, value: Any, accepted: str) -> ValueError:
        shown = repr(value)[:60] if isinstance(value, (str, int, float, bool)) else _type(value)
        return ValueError(f"got {shown} as {self.what}.{name}; accepted: {accepted}")


def _printable(name: Any) -> str:
    """The beginning of a field's name for the log, in which a client could otherwise begin a line."""
    return "".join(sign if sign.isprintable() else "?" for sign in str(name)[:60])


def _type(value: Any) -> str:
    return type(value).__name__


def _target(context: HintContext, agent: str | None, session: str | None = None) -> str | None:
    """The agent that an action is about: the one that the document names, or else its session, whose conversation is
    meant then; if it names neither, those of the request that it came with."""
    if agent is None and session is None:
        agent, session = context.agent, context.session
    return agent if agent is not None or session is None else session_agent(session)


def _actions(agent: str | None, *actions: tuple[ActionKind, float, float]) -> tuple[HintAction, ...]:
    """Actions from (kind, priority, seconds); none without an agent."""
    return () if agent is None else tuple(HintAction(kind, agent, priority, ttl) for kind, priority, ttl in actions)


def sglang(document: Any, context: HintContext) -> Hint:
    """`agent_hints` of SGLang's RFC (sgl-project/sglang issue 24656). A child step is the agent of that name."""
    fields = HintFields(document, "agent_hints", context)
    workflow = fields.text("workflow_id")
    agent = fields.text("agent_id") or fields.text("step_id") or context.agent
    step, total = fields.whole("step_index"), fields.whole("total_steps")
    if step is not None and total is not None and step > total:
        raise ValueError(f"got agent_hints.step_index={step} of total_steps={total}; accepted: up to that")
    children = fields.texts("children_step_ids")
    pause = fields.seconds("expected_tool_duration_ms", 1e-3)
    ttl = fields.seconds("cache_ttl_ms", 1e-3)
    reuse = fields.choice("reuse_hint", ("keep", "neutral", "discard"))
    fields.ignore("step_id", "parent_step_id", "tool_name", "shared_prefix_hash")
    fields.finish()
    about, actions = _target(context, agent), []
    if reuse == "discard":
        actions.append((ActionKind.EVICT, NEUTRAL, context.bounded_ttl(ttl)))
    elif reuse == "keep" or ttl is not None:
        priority = context.config.keep_priority if reuse == "keep" else NEUTRAL
        actions.append((ActionKind.RETAIN, priority, context.bounded_ttl(ttl)))
    return Hint(
        "sglang",
        context.client,
        workflow=workflow,
        agent=agent,
        session=context.session,
        store_policy=StorePolicy.DISCARD if reuse == "discard" else None,
        pause_s=None if pause is None else context.bounded_ttl(pause),
        steps=dict.fromkeys(children, 1.0),
        ttl_s=context.bounded_ttl(ttl),
        actions=_actions(about, *actions),
    )


def sglang_session(document: Any, context: HintContext) -> Hint:
    """`session_params` of SGLang: names the session. Its continuations are refused, as they would change the prompt.

    Raises:
        ValueError: also for `rid`, with which SGLang puts the tokens of an earlier request before this one's.
    """
    fields = HintFields(document, "session_params", context)
    session, before = fields.text("id"), fields.text("rid")
    if before is not None:
        raise ValueError(
            f"got {before[:60]!r} as session_params.rid; accepted: no such field: send the whole conversation, whose "
            "known part is found in the cache"
        )
    fields.whole("offset")
    fields.flag("replace")
    fields.flag("drop_previous_output")
    fields.finish()
    return Hint("sglang_session", context.client, agent=context.agent, session=session or context.session)


def dynamo(document: Any, context: HintContext) -> Hint:
    """`nvext` of NVIDIA Dynamo: `agent_hints`, `agent_context`, `cache_salt`.

    `session_control` was removed from Dynamo in June 2026; clients of earlier versions still send it.
    """
    fields = HintFields(document, "nvext", context)
    hints, control = fields.inner("agent_hints"), fields.inner("session_control")
    about_session = fields.inner("agent_context")
    priority = expected = action = timeout = parent = None
    session, salt, speculative = fields.text("session_id"), fields.text("cache_salt"), False
    fields.finish()
    if hints is not None:
        given, strict = hints.number("priority", -1e9, 1e9), hints.number("strict_priority", -1e9, 1e9)
        priority = None if given is None else normalised(given, *DYNAMO)
        if strict:
            priority = 1.0 if strict > 0 else 0.0  # within the client's own workflow only
        expected, speculative = hints.whole("osl", 1), hints.flag("speculative_prefill")
        hints.finish()
    if about_session is not None:
        session = about_session.text("session_id") or session
        parent = about_session.text("parent_session_id")
        action = SessionAction.CLOSE if about_session.flag("session_final") else None
        about_session.ignore("compaction", "input_trigger", "session_type_id")
        about_session.finish()
    if control is not None:
        session = control.text("session_id") or session
        chosen = control.choice("action", [each.value for each in SessionAction])
        action = action if chosen is None else SessionAction(chosen)
        timeout = control.seconds("timeout")
        control.finish()
    about, actions = _target(context, None, session), []
    if speculative:
        actions.append((ActionKind.FETCH, NEUTRAL, context.bounded_ttl(timeout)))
    elif action is SessionAction.CLOSE:
        actions.append((ActionKind.EVICT, NEUTRAL, context.bounded_ttl(timeout)))
    elif action is not None:
        actions.append((ActionKind.RETAIN, NEUTRAL, context.bounded_ttl(timeout)))
    return Hint(
        "dynamo",
        context.client,
        agent=context.agent,
        session=session or context.session,
        parent_session=parent,
        session_action=action,
        cache_salt=salt,
        priority=priority,
        expected_tokens=expected,
        actions=_actions(about, *actions),
    )


def vllm(document: Any, context: HintContext) -> Hint:
    """`agent_hint` of vLLM's RFC (vllm-project/vllm issue 52113).

    Block numbers are checked but unused: edits and cache control concern the whole conversation, as the prefix tree has
    pages of its own.

    Raises:
        ValueError: also for `manage_request`, a request that is not to be answered.
    """
    fields = HintFields(document, "agent_hint", context)
    session, parent = fields.text("session_id"), fields.text("parent_session_id")
    control, management = fields.inner("cache_control"), fields.inner("context_management")
    fields.finish()
    about, actions = _target(context, None, session), []
    if control is not None:
        control.text("type")
        control.whole("block_offset")
        ttl = context.bounded_ttl(control.seconds("ttl"))
        actions.append((ActionKind.RETAIN, context.config.keep_priority, ttl))
        control.finish()
    if management is not None:
        if management.flag("manage_request"):
            raise ValueError(
                "got true as agent_hint.context_management.manage_request; accepted: false, as every request is "
                "answered; PUT and DELETE /v1/sessions/{id} keep and end a session"
            )
        for edit in management.inners("edits"):
            kind = edit.text("type")
            edit.whole("block_start")
            edit.whole("block_end")
            if kind in EDITS:
                actions.append((EDITS[kind], NEUTRAL, context.bounded_ttl(edit.seconds("ttl"))))
                edit.finish()
            else:
                context.unknown.add(f"{edit.what}.type={_printable(kind)}")
        management.finish()
    return Hint(
        "vllm",
        context.client,
        agent=context.agent,
        session=session or context.session,
        parent_session=parent,
        actions=_actions(about, *actions),
    )


def vllm_transfer(document: Any, context: HintContext) -> Hint:
    """`kv_transfer_params` of vLLM: an envelope `kv_hints` in it is read.

    Fields about transfers between engines have no meaning here.
    """
    fields = HintFields(document, "kv_transfer_params", context)
    envelope = fields.value("kv_hints")
    fields.ignore(*TRANSFERS, "kv_hint")  # the latter moves KV between Dynamo's workers
    fields.finish()
    if envelope is None:
        return Hint("vllm_transfer", context.client, agent=context.agent, session=context.session)
    return replace(kv_hints(envelope, context), source="vllm_transfer")


def kv_hints(document: Any, context: HintContext) -> Hint:
    """The `kv_hints` envelope of vLLM, SGLang and TensorRT-LLM.

    A `kv.fetch@1.0` gives `block_hashes` and the `source_control_endpoint` of the engine that has them. Nothing is ever
    fetched from there; such an action has an effect only if it names an agent or a session, whose KV is then loaded.
    """
    fields = HintFields(document, "kv_hints", context)
    fields.text("protocol_version")
    message = fields.text("message_id")
    agent, session = fields.text("agent_id"), fields.text("session_id")
    actions: list[HintAction] = []
    fixed = 0
    for action in fields.inners("actions"):
        kind = action.text("action_type")
        payload = action.inner("payload") or HintFields({}, "payload", context)
        action.ignore("action_id", "action_version")
        action.finish()
        if kind not in KV_ACTIONS:
            context.unknown.add(f"{action.what}.action_type={_printable(kind)}")
            continue
        own_agent, own_session = payload.text("agent_id"), payload.text("session_id")
        # Where blocks lie on another engine is of no use: there is one engine, which finds them by their tokens.
        remote = payload.ignore("block_hashes", "source_control_endpoint", "mode")
        if remote and kind == "kv.fetch" and own_agent is None and own_session is None:
            payload.finish()
            continue
        if own_agent is None and own_session is None:
            own_agent, own_session = agent, session
        about = _target(context, own_agent, own_session)
        priority, ttl, end = _retention(payload, context.config)
        payload.finish()
        if KV_ACTIONS[kind] is ActionKind.RETAIN and priority > NEUTRAL:
            fixed = max(fixed, end)
        actions += _actions(about, (KV_ACTIONS[kind], priority, ttl))
    fields.finish()
    return Hint(
        "kv_hints",
        context.client,
        message=message,
        agent=agent or context.agent,
        session=session or context.session,
        fixed_tokens=fixed or None,
        actions=tuple(actions),
    )


def _retention(payload: HintFields, config: HintConfig) -> tuple[float, float, int]:
    """Priority, seconds and end of the token range (0: not given) of a payload."""
    given = payload.number("priority", 0, 100)
    times = [
        payload.seconds("ttl"),
        payload.seconds("duration"),
        payload.seconds("ttl_ms", 1e-3),
        payload.seconds("duration_ms", 1e-3),
    ]
    ends = [payload.whole("token_end"), payload.whole("end")]
    for name in ("token_start", "start"):  # checked but unused: a prefix tree needs everything before the end
        payload.whole(name)
    span = payload.list("token_range")
    if span:
        bounds = HintFields(
            {"start": span[0], "end": span[-1]}, f"{payload.what}.token_range", HintContext(config=config)
        )
        if len(span) != 2 or (bounds.whole("start") or 0) > (bounds.whole("end") or 0):
            raise ValueError(f"got a {payload.what}.token_range of {len(span)} numbers; accepted: start and end of it")
        ends.append(bounds.whole("end"))
    priority = NEUTRAL if given is None else normalised(given, *PERCENT)
    ttl = next((time for time in times if time is not None), None)
    return priority, config.bounded_ttl(ttl), max((end for end in ends if end is not None), default=0)


def tensorrt(document: Any, context: HintContext) -> Hint:
    """`KvCacheRetentionConfig`: a range with more than the default priority extends the fixed part of the prompt."""
    fields = HintFields(document, "KvCacheRetentionConfig", context)
    fixed, best, ttl = 0, 0.0, None
    for part in fields.inners("token_range_retention_configs"):
        start, end = part.whole("token_start") or 0, part.whole("token_end")
        if end is not None and end < start:
            raise ValueError(f"got a token range from {start} to {end}; accepted: an end behind its start")
        given, seconds = part.whole("priority", 0, 100), part.seconds("duration_ms", 1e-3)
        priority = NEUTRAL if given is None else normalised(given, *PERCENT)
        part.finish()
        if priority > NEUTRAL:  # a prefix tree needs everything before it, too
            fixed = max(fixed, 2**31 - 1 if end is None else end)
            best, ttl = max((best, ttl), (priority, seconds), key=lambda pair: pair[0])
    decode = fields.whole("decode_retention_priority", 0, 100)
    fields.seconds("decode_duration_ms", 1e-3)
    fields.ignore("transfer_mode", "directory")
    fields.finish()
    actions = [(ActionKind.RETAIN, best, context.bounded_ttl(ttl))] if fixed else []
    return Hint(
        "tensorrt",
        context.client,
        agent=context.agent,
        session=context.session,
        store_policy=StorePolicy.DISCARD if decode == 0 else None,
        fixed_tokens=fixed or None,
        actions=_actions(_target(context, None), *actions),
    )


def kvflow(document: Any, context: HintContext) -> Hint:
    """PanZaifeng/KVFlow: `agent_id` with a request, and plans once a step.

    A plan is `agent_data` (steps by agent) or `timestep_data` (agents by steps), counted by `timestep_cnt`.
    """
    fields = HintFields(document, "kvflow", context)
    agent, counter = fields.text("agent_id") or context.agent, fields.whole("timestep_cnt", 0, 2**63)
    steps: dict[str, float] = {}
    for number, agents in fields.items("timestep_data").items():
        far = _steps(number)
        for name in HintFields({"agents": agents}, "kvflow.timestep_data", context).texts("agents"):
            steps[name] = min(far, steps.get(name, far))
    for name, number in fields.items("agent_data").items():
        steps[fields.checked("agent_data", name)] = _steps(number)
    fields.finish()
    return Hint("kvflow", context.client, agent=agent, session=context.session, steps=steps, sequence=counter)


def _steps(value: Any) -> float:
    """A number of steps, possibly as a string (JSON keys); -1 means never."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):  # 10^400
        number = -2.0
    if not -1 <= number < NEVER or isinstance(value, bool):
        raise ValueError(f"got {str(value)[:60]!r} as steps of an agent; accepted: a number from 0 up, or -1 for never")
    return number if number >= 0 else NEVER


FORMATS: dict[str, Callable[[Any, HintContext], Hint]] = {
    "dynamo": dynamo,
    "kv_hints": kv_hints,
    "kvflow": kvflow,
    "sglang": sglang,
    "sglang_session": sglang_session,
    "tensorrt": tensorrt,
    "vllm": vllm,
    "vllm_transfer": vllm_transfer,
}


def hint_formats() -> tuple[str, ...]:
    """The formats accepted by `HintReader.read`, sorted."""
    return tuple(sorted(FORMATS))


class HintReader:
    """Reads documents into hints and warns once about each unknown field; a server has one reader."""

    def __init__(self, config: HintConfig | None = None) -> None:
        self.config = config or HintConfig()
        self._warned: set[str] = set()

    def read(
        self, source: str, document: Any, client: str = "", agent: str | None = None, session: str | None = None
    ) -> Hint:
        """A client's document as a hint.

        Args:
            source: its format, one of `hint_formats()`.
            document: the parsed JSON.
            client, agent, session: of the request it came with, as known to the server; agent and session given in
                the document take precedence.

        Raises:
            ValueError: an unknown format, or a known field of a wrong type or size.
        """
        if source not in FORMATS:
            raise ValueError(f"unknown hint format {source!r:.60}; known: {', '.join(hint_formats())}")
        context = HintContext(client, agent, session, self.config)
        hint = FORMATS[source](document, context)
        fresh = sorted(context.unknown - self._warned)[: self.config.max_warned_fields - len(self._warned)]
        if fresh:
            self._warned.update(fresh)
            shown = ", ".join(fresh[:10])
            warnings.warn(f"unknown fields of hints are ignored: {shown}", stacklevel=2)
        return hint


def request_fields(hint: Hint) -> dict[str, Any]:
    """The fields of a `Request` that are set by the hint which came with it."""
    agent = hint.agent
    if agent is None and hint.session is not None and (hint.actions or hint.fixed_tokens):
        agent = session_agent(hint.session)
    found = {
        "workflow": hint.workflow,
        "agent": agent,
        "session": hint.session,
        "client": hint.client or None,
        "priority": hint.priority,
        "store_policy": hint.store_policy,
        "expected_tokens": hint.expected_tokens,
        "fixed_tokens": hint.fixed_tokens,
    }
    return {name: value for name, value in found.items() if value is not None}
