"""Whose agents are whose, and how much one client may protect."""

from __future__ import annotations

from collections.abc import Callable, Collection

from .node import Tier
from .tiers import TieredTree

MAX_OWNED = 100_000  # agents whose owner is remembered


class Shares:
    """Of the agents of one client, the most valuable count until their prompts fill its share of the device.

    The share is one part in as many as there are clients with agents; what is beyond it is worth as much as an agent of
    which nothing is known, so it stays while nobody else needs the room. Agents of no client ("") have no cap, and a
    client that is alone has none. An agent belongs to the client that called it first, or else to the one that spoke of
    it first, until that has forgotten it.

    Args:
        worth: of an agent, larger = keep; what the cap is applied to.
    """

    def __init__(self, tiers: TieredTree, worth: Callable[[str], float]) -> None:
        self.tiers, self._worth = tiers, worth
        self.capped: set[str] = set()
        self._owner: dict[str, str] = {}
        self._agents: dict[str, set[str]] = {}
        self._only_named: set[str] = set()  # agents that their owners have never called
        self._clients = 0  # at the last update

    def call(self, agent: str, client: str) -> bool:
        """A request of `client` calls `agent`; whether that takes it from a client that has only spoken of it."""
        taken = agent in self._only_named and self._owner[agent] != client
        if taken:
            self._forget(agent)
        self.own(agent, client)
        self._only_named.discard(agent)
        return taken

    def name(self, agent: str, client: str) -> bool:
        """`client` speaks of `agent`; whether it is its own (or nobody's)."""
        known = agent in self._owner
        own = self.own(agent, client)
        if not known and agent in self._owner:
            self._only_named.add(agent)
        return own

    def own(self, agent: str, client: str) -> bool:
        """Whether `agent` is of `client` (or nobody's); it is from now on if nobody has it."""
        owner = self._owner.get(agent)
        if owner is not None or not client:
            return owner is None or owner == client
        if len(self._owner) >= MAX_OWNED:
            self._forget(next(iter(self._owner)))
        self._owner[agent] = client
        self._agents.setdefault(client, set()).add(agent)
        return True

    def owner(self, agent: str) -> str:
        return self._owner.get(agent, "")

    def part(self, client: str) -> float:
        """The share of `client`, of 1."""
        return 1 / max(1, len(self._agents)) if client else 1.0

    def update(self, agents: Collection[str]) -> set[str]:
        """The values of `agents` are new; returns those that a cap begins or ceases to apply to."""
        moved = self.tiers.tree.moved
        counts, self._clients = self._clients, len(self._agents)
        if counts == self._clients and ((self._clients < 2 and not self.capped) or (not agents and not moved)):
            moved.clear()
            return set()
        clients = {self._owner[agent] for agent in (*agents, *moved) if isinstance(agent, str) and agent in self._owner}
        moved.clear()
        if counts != self._clients:  # everybody's share is another one
            clients = set(self._agents)
        changed: set[str] = set()
        for client in clients:
            mine = self._agents[client]
            capped = self._beyond(client) if len(self._agents) > 1 else set()
            changed |= (self.capped & mine) ^ capped
            self.capped = (self.capped - mine) | capped
        return changed

    def _beyond(self, client: str) -> set[str]:
        room = self.part(client) * self.tiers.pools[Tier.DEVICE].capacity
        beyond: set[str] = set()
        for agent in sorted(self._agents[client], key=lambda agent: (-self._worth(agent), agent)):
            end = self.tiers.tree.ends.get(agent)
            if end is not None:
                room -= sum(node.nbytes for node in end.path())
                if room < 0:
                    beyond.add(agent)
        return beyond

    def _forget(self, agent: str) -> None:
        client = self._owner.pop(agent)
        self.capped.discard(agent)
        self._only_named.discard(agent)
        self._agents[client].discard(agent)
        if not self._agents[client]:
            del self._agents[client]
