"""A hint, whatever format it came in. Its numbers are checked, bounded and of one scale."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum

from ..keep import Keep

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
    keep: Keep | None = None
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
