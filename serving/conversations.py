"""Conversations: where the prompt of each session ends, so that hints about a session concern its own KV.

The calls of one agent by many sessions share the agent's fixed prompt; what a session adds belongs to no agent, and is
evicted by its last use. A hint to keep a session tags the whole conversation in the prefix tree with an agent that
stands for the session (`session_agent`), so that eviction, write-back and prefetch treat it as they treat a fixed
prompt. A hint that a session has ended ranks what only that session used behind everything else.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable

from .hints.hint import HintStore
from .kvcache.radix_tree import TOKEN_BYTES, Pages
from .kvcache.tiered_cache import TieredCache

Session = tuple[str, str]  # client, and the agent that stands for the session in hints


class Conversations:
    """The last prompt and answer of each session, and the sessions with a hint. Used under the cache's lock.

    Args:
        max_sessions, max_bytes: sessions, and bytes of their prompts, that are stored; beyond, the least recently
            active one is forgotten.
    """

    def __init__(self, max_sessions: int, max_bytes: int) -> None:
        self.max_sessions, self.max_bytes = max_sessions, max_bytes
        self._prompts: dict[Session, tuple[Pages, Hashable]] = {}  # least recently active first
        self._bytes = 0
        self._agents: dict[Session, str] = {}  # the agents of the sessions with a hint
        self._sessions: dict[str, Session] = {}  # the inverse
        self._tagged: set[str] = set()
        self._changed: dict[str, None] = {}  # agents whose session or hint has changed since `apply`

    def observe(self, session: Session, prompt: Pages, namespace: Hashable) -> None:
        """A call of `session` has been answered; `prompt` are the whole pages of prompt and answer that are cached."""
        self._remove(session)
        self._prompts[session] = prompt, namespace
        self._bytes += len(prompt)
        while self._bytes > self.max_bytes or len(self._prompts) > self.max_sessions:
            self._remove(next(iter(self._prompts)))
        if session in self._agents:
            self._changed[self._agents[session]] = None

    def _remove(self, session: Session) -> None:
        prompt, _ = self._prompts.pop(session, (b"", None))
        self._bytes -= len(prompt)

    def agent(self, session: Session) -> str | None:
        """The agent that stands for `session`; None while there is no hint about it."""
        return self._agents.get(session)

    def hinted(self, session: Session, agent: str) -> None:
        """A hint about `session` is in effect for `agent`, which stands for it; or it waits for its sub-agents."""
        self._agents[session], self._sessions[agent] = agent, session
        self._changed[agent] = None

    def expired(self, agents: Iterable[str]) -> None:
        """The hints in effect for `agents`, of sessions or not, have ended."""
        self._changed.update(dict.fromkeys(agent for agent in agents if agent in self._sessions))

    def changed(self, agent: str) -> None:
        """Notes a change of what is known about the session of `agent`, other than by a hint."""
        if agent in self._sessions:
            self._changed[agent] = None

    def find(self, session: Session) -> tuple[Pages, Hashable] | None:
        """The last prompt and answer of `session`, and their namespace; None if it is unknown."""
        return self._prompts.get(session)

    def apply(self, tiers: TieredCache, hints: HintStore, waiting: Collection[str], by_agents: bool) -> None:
        """Brings the tree in line with what has changed.

        Args:
            waiting: agents of sessions that wait for their sub-agents: kept whatever the hints say.
            by_agents: the eviction policy ranks by agents; otherwise only ends of sessions have an effect.
        """
        changed, self._changed = self._changed, {}
        for agent in changed:
            session, hint, waits = self._sessions[agent], hints.current(agent), agent in waiting
            prompt, namespace = self._prompts.get(session, (None, None))
            if hint is None and not waits:
                del self._agents[session], self._sessions[agent]
            if prompt is None or (not waits and (hint is None or hint.evict)):
                if agent in self._tagged:
                    self._tagged.discard(agent)
                    tiers.forget_agent(agent)
                if hint is not None and prompt is not None:
                    tiers.demote(prompt, namespace)
            elif by_agents:
                with tiers.open(prompt, namespace, retry=True) as found:
                    if found.length:
                        self._tagged.add(agent)
                        tiers.store(found, Pages(prompt[: found.length * TOKEN_BYTES]), None, agent, found.length)
