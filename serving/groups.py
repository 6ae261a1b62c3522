"""Nodes by the agents that need them, so that a new value of an agent touches groups and not nodes."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Iterable
from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .node import Node

Agent = Hashable


class Group:
    """The nodes of one set of agents; its value is that of the agent that needs them most.

    Attributes:
        agents: agent -> number of the valid entry of its value in the heap.
        nodes: how many nodes are in it.
    """

    __slots__ = ("_values", "agents", "nodes")

    def __init__(self) -> None:
        self.agents: dict[Agent, int] = {}
        self.nodes = 0
        self._values: list[tuple[float, int, Agent]] = []

    def set(self, agent: Agent, value: float, number: int) -> None:
        self.agents[agent] = number
        heapq.heappush(self._values, (-value, number, agent))
        if len(self._values) > 4 * len(self.agents) + 64:  # most entries are stale
            self._values = [entry for entry in self._values if self.agents.get(entry[2]) == entry[1]]
            heapq.heapify(self._values)

    @property
    def value(self) -> float:
        """The largest value of its agents; a shared node is worth what it is worth to the first who comes back."""
        values = self._values
        while self.agents.get(values[0][2]) != values[0][1]:
            heapq.heappop(values)  # replaced by a newer value of the agent
        return -values[0][0]


class Groups:
    """All groups; `nobody` holds the nodes that are in no agent's fixed prompt, and has no value.

    Nodes of one agent share a group. A node that a second agent comes to share gets a group of its own, which further
    agents join in place.

    Args:
        value: of an agent, larger = keep; read when an agent is first named and at `changed`.
    """

    def __init__(self, value: Callable[[Agent], float]) -> None:
        self.nobody = Group()
        self._value = value
        self._values: dict[Agent, float] = {}
        self._single: dict[Agent, Group] = {}
        self._members: dict[Agent, set[Group]] = {}
        self._numbers = count(1)

    @property
    def agents(self) -> Iterable[Agent]:
        """Those with at least one node."""
        return self._members.keys()

    def move(self, node: Node, group: Group) -> None:
        """Puts `node` into `group`; the group it leaves is forgotten if that was its last node."""
        old = node.group
        if old is group:
            return
        node.group = group
        group.nodes += 1
        old.nodes -= 1
        if old.nodes == 0 and old is not self.nobody:
            self._forget(old)

    def _forget(self, group: Group) -> None:
        for agent in group.agents:
            members = self._members[agent]
            members.discard(group)
            if self._single.get(agent) is group:
                del self._single[agent]
            if not members:
                del self._members[agent], self._values[agent]

    def add(self, node: Node, agent: Agent) -> None:
        """`node` is needed by `agent`, too."""
        group = node.group
        if agent in group.agents:
            return
        if len(group.agents) > 1 and group.nodes == 1:
            self._join(group, agent)
            return
        self.move(node, self._group((*group.agents, agent)))

    def remove(self, node: Node, agent: Agent) -> None:
        """`node` is not needed by `agent` any more."""
        group = node.group
        if agent not in group.agents:
            return
        if len(group.agents) > 2 and group.nodes == 1:
            del group.agents[agent]
            members = self._members[agent]
            members.discard(group)
            if not members:
                del self._members[agent], self._values[agent]
            return
        self.move(node, self._group(tuple(other for other in group.agents if other != agent)))

    def _group(self, agents: tuple[Agent, ...]) -> Group:
        if not agents:
            return self.nobody
        if len(agents) == 1 and agents[0] in self._single:
            return self._single[agents[0]]
        group = Group()
        for agent in agents:
            self._join(group, agent)
        if len(agents) == 1:
            self._single[agents[0]] = group
        return group

    def _join(self, group: Group, agent: Agent) -> None:
        if agent not in self._values:
            self._values[agent] = self._value(agent)
        self._members.setdefault(agent, set()).add(group)
        group.set(agent, self._values[agent], next(self._numbers))

    def changed(self, agents: Iterable[Agent] | None = None) -> list[Group]:
        """Reads the values of these agents (None: all) anew; returns the groups of those that have another."""
        groups = []
        for agent in tuple(self._values) if agents is None else agents:
            if agent not in self._values:
                continue
            value = self._value(agent)
            if value == self._values[agent]:
                continue
            self._values[agent] = value
            for group in self._members[agent]:
                group.set(agent, value, next(self._numbers))
                groups.append(group)
        return groups

    def check(self, nodes: Iterable[Node]) -> None:
        """Raises AssertionError unless nodes, groups and agents agree; `nodes` are all there are, roots included."""
        counts: dict[Group, int] = {}
        for node in nodes:
            counts[node.group] = counts.get(node.group, 0) + 1
        assert all(group.nodes == number for group, number in counts.items()), "the nodes of a group are counted"
        for agent, members in self._members.items():
            assert members, "an agent without nodes is forgotten"
            assert all(group in counts and agent in group.agents for group in members), "groups have nodes"
        for group in counts:
            assert all(group in self._members[agent] for agent in group.agents), "an agent's groups are known"
            if group.agents:
                assert group.value == max(self._values[agent] for agent in group.agents), "the largest value counts"
