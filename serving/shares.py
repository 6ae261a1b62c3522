"""Whose agents are whose, and how much one client may protect."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from .node import Tier
from .tiers import TieredTree

MAX_OWNED = 100_000  # agents whose owner is remembered


class Shares:
    """Of the agents of one client, the most valuable count until their prompts fill its share of the device.

    The share is one part in as many as there are clients with agents; what is beyond it is worth as much as an agent of
    which nothing is known, so it stays while nobody else needs the room. Agents of no client ("") have no cap, and a
    client that is alone has none. An agent belongs to the client that named it first, until that has forgotten it.

    Args:
        worth: of an agent, larger = keep; what the cap is applied to.
    """

    def __init__(self, tiers: TieredTree, worth: Callable[[str], float]) -> None:
        self.tiers, self._worth = tiers, worth
        self.capped: set[str] = set()
        self._owner: dict[str, str] = {}
        self._agents: dict[str, set[str]] = {}

    def own(self, agent: str, client: str) -> bool:
        """`client` names `agent`; whether it is its own (or nobody's)."""
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

    def update(self, agents: Iterable[str]) -> set[str]:
        """The values of `agents` are new; returns those that a cap begins or ceases to apply to."""
        if len(self._agents) < 2 and not self.capped:
            return set()
        clients = {self._owner[agent] for agent in agents if agent in self._owner}
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
        for agent in sorted(self._agents[client], key=self._worth, reverse=True):
            end = self.tiers.tree.ends.get(agent)
            if end is not None:
                room -= sum(node.nbytes for node in end.path())
                if room < 0:
                    beyond.add(agent)
        return beyond

    def _forget(self, agent: str) -> None:
        client = self._owner.pop(agent)
        self.capped.discard(agent)
        self._agents[client].discard(agent)
        if not self._agents[client]:
            del self._agents[client]
