"""A hint, whatever format it came in. Its numbers are checked, bounded and of one scale.

The hints that count now.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from itertools import count

from ..request import StorePolicy

MAX_TTL_S = 3600.0  # longer wishes are cut to it
DEFAULT_TTL_S = 300.0
NEUTRAL = 0.5


class ActionKind(Enum):
    RETAIN = "keep it"
    EVICT = "it is not needed soon"
    FETCH = "it is needed next"


class SessionAction(Enum):
    OPEN = "open"
    BIND = "bind"
    CLOSE = "close"


@dataclass(frozen=True)
class Action:
    """A wish about what is cached for an agent.

    Attributes:
        priority: 0 to 1, larger = keep; 0.5 is neutral.
        ttl_s: seconds after which it means nothing any more.
    """

    kind: ActionKind
    agent: str
    priority: float = NEUTRAL
    ttl_s: float = DEFAULT_TTL_S


@dataclass(frozen=True)
class Hint:
    """What one message says. All of it is advice: it moves memory and never changes an answer.

    Attributes:
        source: the format it came in.
        client: who sent it, as the server knows; not what the message says.
        message: names it; of several with one name from one client, the first counts.
        workflow, agent, session: whom it is about. An agent that is not named is that of the session.
        priority: of the request it came with, 0 to 1.
        keep: what is to become of the request's suffix and answer.
        expected_tokens: of the answer.
        pause_s: until the agent's next call, e.g. for a tool.
        fixed_tokens: of the request's prompt, those at its beginning that are worth keeping.
        steps: of agents, steps to their next calls. `sequence`: counts the messages that say so; one that is not above
            the last is late and means nothing.
        ttl_s: how long `steps` count.
    """

    source: str
    client: str = ""
    message: str | None = None
    workflow: str | None = None
    agent: str | None = None
    session: str | None = None
    session_action: SessionAction | None = None
    priority: float | None = None
    keep: StorePolicy | None = None
    expected_tokens: int | None = None
    pause_s: float | None = None
    fixed_tokens: int | None = None
    steps: Mapping[str, float] = field(default_factory=dict)
    sequence: int | None = None
    ttl_s: float = DEFAULT_TTL_S
    actions: tuple[Action, ...] = ()

    def agents(self) -> Iterator[str]:
        """All that it says something about."""
        if self.agent is not None:
            yield self.agent
        yield from self.steps
        for action in self.actions:
            yield action.agent


def session_agent(session: str) -> str:
    """The agent that stands for a session of which no agent is named."""
    return f"session:{session}"[:256]


MAX_AGENTS = 100_000  # with a hint that counts
MAX_MESSAGES = 10_000  # whose names are remembered, and clients whose counters are
FAR_STEPS = 16.0  # what a hint of the least priority says
HINTED_REUSE = 0.5  # what one of the highest says: a graph that knows better may say more


@dataclass
class Note:
    """What counts of one agent.

    Attributes:
        steps: to its next call, as a client says. until: when that means nothing any more.
        evict: it is not needed before its next call, whatever a graph says. lasting: a call does not end it.
    """

    steps: float
    until: float
    evict: bool = False
    lasting: bool = False
    number: int = 0


class HintStore:
    """Hints by agent, each until its time is over or the agent is called.

    A hint is worth steps: `FAR_STEPS` at the priority 0, none at 1. The smaller of these and a graph's counts. A wish
    to retain lasts for its time, calls or not. Memory is bounded: of too many hints, the one that ends first goes.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._notes: dict[str, Note] = {}
        self._ends: list[tuple[float, int, str]] = []
        self._numbers = count(1)
        self._messages: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._sequences: OrderedDict[str, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._notes)

    def take(self, hint: Hint, agents: Collection[str]) -> set[str]:
        """Takes in what it says about `agents`; returns those of them for which something has changed."""
        if self._is_known(hint):
            return set()
        changed = set()
        for agent, steps in hint.steps.items():
            if agent in agents:
                self._note(agent, Note(steps, self._clock() + hint.ttl_s))
                changed.add(agent)
        for action in hint.actions:
            if action.agent in agents:
                self._note(action.agent, self._read(action))
                changed.add(action.agent)
        return changed

    def _is_known(self, hint: Hint) -> bool:
        """A duplicate, or one that a later one has overtaken."""
        if hint.message is not None:
            name = (hint.client, hint.message)
            if name in self._messages:
                return True
            self._messages[name] = None
            if len(self._messages) > MAX_MESSAGES:
                self._messages.popitem(last=False)
        if hint.sequence is not None:
            if hint.sequence <= self._sequences.get(hint.client, -1):
                return True
            self._sequences[hint.client] = hint.sequence
            self._sequences.move_to_end(hint.client)
            if len(self._sequences) > MAX_MESSAGES:
                self._sequences.popitem(last=False)
        return False

    def _read(self, action: Action) -> Note:
        until = self._clock() + action.ttl_s
        if action.kind is ActionKind.EVICT:
            return Note(math.inf, until, evict=True)
        steps = 0.0 if action.kind is ActionKind.FETCH else FAR_STEPS * (1 - action.priority)
        return Note(steps, until, lasting=action.kind is ActionKind.RETAIN)

    def _note(self, agent: str, note: Note) -> None:
        note.number = next(self._numbers)
        self._notes[agent] = note
        heapq.heappush(self._ends, (note.until, note.number, agent))
        while len(self._notes) > MAX_AGENTS:
            self._end_first()
        if len(self._ends) > 4 * len(self._notes) + 64:  # most are stale
            self._ends = [(n.until, n.number, agent) for agent, n in self._notes.items()]
            heapq.heapify(self._ends)

    def _end_first(self) -> str | None:
        _, number, agent = heapq.heappop(self._ends)
        note = self._notes.get(agent)
        if note is None or note.number != number:
            return None
        del self._notes[agent]
        return agent

    def served(self, agent: str) -> None:
        """`agent` is called: what was said of its next call has come true."""
        note = self._notes.get(agent)
        if note is not None and not note.lasting:
            del self._notes[agent]

    def forget(self, agent: str) -> None:
        """Nothing counts of `agent` any more."""
        self._notes.pop(agent, None)

    def expired(self) -> set[str]:
        """The agents of which nothing counts any more since the last call."""
        now, ended = self._clock(), set()
        while self._ends and self._ends[0][0] <= now:
            agent = self._end_first()
            if agent is not None:
                ended.add(agent)
        return ended

    def next_time(self) -> float | None:
        """When a hint ends next."""
        return self._ends[0][0] if self._ends else None

    def steps(self, agent: str, known: float) -> float:
        """Steps to the next call of `agent`, of which a graph says `known`."""
        note = self._current(agent) if self._notes else None
        if note is None:
            return known
        return math.inf if note.evict else min(note.steps, known)

    def reuse(self, agent: str, known: float) -> float:
        """Its expected discounted reuse, of which a graph says `known`."""
        note = self._current(agent) if self._notes else None
        if note is None:
            return known
        return 0.0 if note.evict else max(known, HINTED_REUSE * max(0.0, 1 - note.steps / FAR_STEPS))

    def _current(self, agent: str) -> Note | None:
        note = self._notes.get(agent)
        return None if note is None or note.until <= self._clock() else note


def normalised(value: float, low: float, neutral: float, high: float) -> float:
    """A priority of a format's scale as 0 to 1, its neutral value as 0.5; what is outside is moved to the end."""
    value = min(high, max(low, value))
    if value <= neutral:
        return NEUTRAL * (value - low) / (neutral - low)
    return NEUTRAL + (1 - NEUTRAL) * (value - neutral) / (high - neutral)
