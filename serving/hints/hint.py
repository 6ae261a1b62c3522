"""Hints of clients about their next calls: one internal type for all formats, and the store of those in effect."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum

from tenure.checked import Count, Positive, verify

from ..lazy_heap import LazyHeap
from ..request import MAX_NAME, StorePolicy

NEUTRAL = 0.5  # priority of a hint that says nothing, on the scale of 0 to 1


@dataclass(frozen=True)
class HintConfig:
    """Bounds and weights of hints.

    Attributes:
        max_ttl_s: seconds; longer lifetimes and pauses are cut to it (vLLM's RFC: 3600).
        default_ttl_s: seconds; lifetime of a hint that gives none (vLLM's RFC: 300).
        keep_priority: 0 to 1, of a hint that asks to keep a cache without giving a priority.
        far_steps: steps to the next call implied by a hint of priority 0.
        max_reuse: expected discounted reuse (0 to 1) implied by a hint of priority 1; a graph may give more.
        max_agents: agents with a hint in effect; beyond, the hint that expires first is dropped.
        max_messages: remembered names of messages, against duplicates, and remembered counters of clients.
        max_items: entries accepted in one list or mapping of a document.
        max_warned_fields: unknown fields remembered; beyond, there are no further warnings.
    """

    max_ttl_s: Positive = 3600.0
    default_ttl_s: Positive = 300.0
    keep_priority: Positive = 0.9
    far_steps: Positive = 16.0
    max_reuse: Positive = 0.5
    max_agents: Count = 100_000
    max_messages: Count = 10_000
    max_items: Count = 1024
    max_warned_fields: Count = 1000

    def __post_init__(self) -> None:
        verify(self)

    def bounded_ttl(self, seconds: float | None) -> float:
        """A lifetime in seconds: the default for None, cut to `max_ttl_s`."""
        return min(self.max_ttl_s, self.default_ttl_s if seconds is None else seconds)


class ActionKind(Enum):
    """Requests of a client about an agent's cache."""

    RETAIN = "keep it"
    EVICT = "it is not needed soon"
    FETCH = "it is needed next"


class SessionAction(Enum):
    """Changes of a session's state."""

    OPEN = "open"
    BIND = "bind"
    CLOSE = "close"


@dataclass(frozen=True)
class HintAction:
    """A request about the cache of an agent.

    Attributes:
        priority: 0 to 1, larger = keep; 0.5 is neutral.
        ttl_s: seconds until it expires.
    """

    kind: ActionKind
    agent: str
    priority: float = NEUTRAL
    ttl_s: float = HintConfig.default_ttl_s


@dataclass(frozen=True)
class Hint:
    """One message of a client, in checked and bounded numbers. It is advice: it moves memory, never changes answers.

    Attributes:
        source: its format.
        client: the sender as known to the server, not as stated in the message.
        message: name of the message; repeated names from one client are ignored.
        workflow, agent, session: the subject. Without an agent, the session stands for it (`session_agent`).
        parent_session: the session that called this one as a sub-agent, and waits for it.
        session_action: change of the session's state.
        cache_salt: divides the client's cache: prompts are shared with calls of the same salt only.
        priority: of the request it came with, 0 to 1.
        store_policy: whether the request's suffix and answer are stored.
        expected_tokens: length of the answer in tokens.
        pause_s: seconds until the agent's next call, e.g. for a tool.
        fixed_tokens: tokens at the beginning of the request's prompt that are worth keeping.
        steps: steps to the next call by agent.
        sequence: counter of messages with `steps`; a message whose counter does not increase is late and ignored.
        ttl_s: seconds until `steps` expire.
        actions: requests about caches.
    """

    source: str
    client: str = ""
    message: str | None = None
    workflow: str | None = None
    agent: str | None = None
    session: str | None = None
    parent_session: str | None = None
    session_action: SessionAction | None = None
    cache_salt: str | None = None
    priority: float | None = None
    store_policy: StorePolicy | None = None
    expected_tokens: int | None = None
    pause_s: float | None = None
    fixed_tokens: int | None = None
    steps: Mapping[str, float] = field(default_factory=dict)
    sequence: int | None = None
    ttl_s: float = HintConfig.default_ttl_s
    actions: tuple[HintAction, ...] = ()

    def agents(self) -> Iterator[str]:
        """All agents that it mentions."""
        if self.agent is not None:
            yield self.agent
        yield from self.steps
        for action in self.actions:
            yield action.agent


SESSION = "session:"  # begins the names of agents that stand for a session


def session_agent(session: str) -> str:
    """The agent that stands for a session without a named agent: hints about it concern the session's conversation."""
    return f"{SESSION}{session}"[:MAX_NAME]


def normalised(value: float, low: float, neutral: float, high: float) -> float:
    """Maps a priority to 0 to 1, `neutral` to 0.5; values outside `low` to `high` are clipped."""
    value = min(high, max(low, value))
    if value <= neutral:
        return NEUTRAL * (value - low) / (neutral - low)
    return NEUTRAL + (1 - NEUTRAL) * (value - neutral) / (high - neutral)


@dataclass
class ActiveHint:
    """The hint in effect for one agent.

    Attributes:
        steps: to its next call.
        expires_s: seconds on the clock.
        evict: the agent is not needed before its next call, whatever a graph says.
        persistent: a call of the agent does not end it.
    """

    steps: float
    expires_s: float
    evict: bool = False
    persistent: bool = False


class HintStore:
    """The hint in effect for each agent, until it expires or the agent is called.

    A hint implies steps to the next call: `far_steps` at priority 0, none at 1; the minimum of these and the graph's
    is used. A request to retain stays in effect until it expires, calls or not. Memory is bounded by the config.
    `clock` gives seconds.
    """

    def __init__(self, clock: Callable[[], float], config: HintConfig | None = None) -> None:
        self.config = config or HintConfig()
        self._clock = clock
        self._hints: dict[str, ActiveHint] = {}
        self._expiry: LazyHeap[str] = LazyHeap()
        self._messages: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._sequences: OrderedDict[str, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._hints)

    def add(self, hint: Hint, agents: Collection[str]) -> set[str]:
        """Puts into effect what `hint` says about `agents`; returns those whose hint has changed."""
        if self._is_outdated(hint):
            return set()
        changed = set()
        for agent, steps in hint.steps.items():
            if agent in agents:
                self._set(agent, ActiveHint(steps, self._clock() + hint.ttl_s))
                changed.add(agent)
        for action in hint.actions:
            if action.agent in agents:
                self._set(action.agent, self._active(action))
                changed.add(action.agent)
        return changed

    def _is_outdated(self, hint: Hint) -> bool:
        if hint.message is not None:
            name = (hint.client, hint.message)
            if name in self._messages:
                return True
            self._messages[name] = None
            if len(self._messages) > self.config.max_messages:
                self._messages.popitem(last=False)
        if hint.sequence is not None:
            if hint.sequence <= self._sequences.get(hint.client, -1):
                return True
            self._sequences[hint.client] = hint.sequence
            self._sequences.move_to_end(hint.client)
            if len(self._sequences) > self.config.max_messages:
                self._sequences.popitem(last=False)
        return False

    def _active(self, action: HintAction) -> ActiveHint:
        expires = self._clock() + action.ttl_s
        if action.kind is ActionKind.EVICT:
            return ActiveHint(math.inf, expires, evict=True)
        steps = 0.0 if action.kind is ActionKind.FETCH else self.config.far_steps * (1 - action.priority)
        return ActiveHint(steps, expires, persistent=action.kind is ActionKind.RETAIN)

    def _set(self, agent: str, hint: ActiveHint) -> None:
        self._hints[agent] = hint
        self._expiry.push(agent, hint.expires_s)
        while len(self._hints) > self.config.max_agents:
            first = self._expiry.pop()
            assert first is not None, "every hint expires"
            del self._hints[first]

    def on_call(self, agent: str) -> None:
        """`agent` is called: hints about its next call are fulfilled."""
        hint = self._hints.get(agent)
        if hint is not None and not hint.persistent:
            self.discard(agent)

    def discard(self, agent: str) -> None:
        self._hints.pop(agent, None)
        self._expiry.discard(agent)

    def pop_expired(self) -> set[str]:
        """The agents whose hints have expired since the last call."""
        expired = set(self._expiry.pop_until(self._clock()))
        for agent in expired:
            del self._hints[agent]
        return expired

    def steps(self, agent: str, default: float) -> float:
        """Steps to the next call of `agent`, for which a graph gives `default`."""
        hint = self.current(agent) if self._hints else None
        if hint is None:
            return default
        return math.inf if hint.evict else min(hint.steps, default)

    def reuse(self, agent: str, default: float) -> float:
        """Expected discounted reuse of `agent`, 0 to 1, for which a graph gives `default`."""
        hint = self.current(agent) if self._hints else None
        if hint is None:
            return default
        config = self.config
        return 0.0 if hint.evict else max(default, config.max_reuse * max(0.0, 1 - hint.steps / config.far_steps))

    def current(self, agent: str) -> ActiveHint | None:
        """The hint in effect for `agent`; None if there is none, or it has expired."""
        hint = self._hints.get(agent)
        return None if hint is None or hint.expires_s <= self._clock() else hint
