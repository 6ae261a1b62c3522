"""Groups nodes by the agents whose fixed prompts they belong to: a new value of an agent touches groups, not nodes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, Protocol

from ..lazy_heap import LazyHeap

Agent = Hashable


class AgentGroup(LazyHeap[Agent]):
    """The nodes of one set of agents: a heap of the agents by minus their values, the largest value first. The largest
    is the group's value: a shared node is kept for the agent that needs it most.

    It is the heap, and does not have one, as there are as many groups as prompts: what Python's collector walks over
    shows in the time of each change. Only `AgentIndex` changes it.

    Attributes:
        agents: the set, as the keys of a mapping.
        num_nodes: nodes in the group.
    """

    __slots__ = ("agents", "num_nodes")

    def __init__(self) -> None:
        super().__init__()
        self.agents: Mapping[Agent, Any] = self.entries
        self.num_nodes = 0

    @property
    def value(self) -> float:
        """Larger = keep; the group must have an agent. Computed when read, as values change far more often."""
        return -self.peek_priority()  # pyright: ignore[reportOptionalOperand]


class Grouped(Protocol):
    """A node as the index sees it."""

    group: AgentGroup


class AgentIndex:
    """All groups of a tree.

    Nodes of one agent share a group. A node that a second agent comes to share gets a group of its own, which further
    agents join in place.

    Args:
        value: the value of an agent, larger = keep; read when an agent is first named and by `refresh`.
    Attributes:
        unowned: the group of the nodes in nobody's fixed prompt. It has no agents and no value.
    """

    def __init__(self, value: Callable[[Agent], float]) -> None:
        self.unowned = AgentGroup()
        self._value = value
        self._values: dict[Agent, float] = {}
        self._single: dict[Agent, AgentGroup] = {}  # the group of this agent alone
        self._groups: dict[Agent, set[AgentGroup]] = {}

    @property
    def agents(self) -> Iterable[Agent]:
        """The agents with at least one node."""
        return self._groups.keys()

    def move(self, node: Grouped, group: AgentGroup) -> None:
        """Moves `node` into `group`; the group it leaves is dropped if it is then empty."""
        old = node.group
        if old is group:
            return
        node.group = group
        group.num_nodes += 1
        old.num_nodes -= 1
        if old.num_nodes == 0 and old is not self.unowned:
            for agent in old.agents:
                self._leave(old, agent)

    def _leave(self, group: AgentGroup, agent: Agent) -> None:
        """`group` is no longer one of the agent's; an agent without groups is forgotten."""
        groups = self._groups[agent]
        groups.discard(group)
        if self._single.get(agent) is group:
            del self._single[agent]
        if not groups:
            del self._groups[agent], self._values[agent]

    def add(self, node: Grouped, agent: Agent) -> None:
        """`node` belongs to the fixed prompt of `agent` as well."""
        group = node.group
        if agent in group.agents:
            return
        if len(group.agents) > 1 and group.num_nodes == 1:
            self._join(group, agent)
            return
        self.move(node, self._group_of((*group.agents, agent)))

    def remove(self, node: Grouped, agent: Agent) -> None:
        """`node` no longer belongs to the fixed prompt of `agent`."""
        group = node.group
        if agent not in group.agents:
            return
        if len(group.agents) > 2 and group.num_nodes == 1:
            group.discard(agent)
            self._leave(group, agent)
            return
        self.move(node, self._group_of(tuple(other for other in group.agents if other != agent)))

    def _group_of(self, agents: tuple[Agent, ...]) -> AgentGroup:
        if not agents:
            return self.unowned
        if len(agents) == 1 and agents[0] in self._single:
            return self._single[agents[0]]
        group = AgentGroup()
        for agent in agents:
            self._join(group, agent)
        if len(agents) == 1:
            self._single[agents[0]] = group
        return group

    def _join(self, group: AgentGroup, agent: Agent) -> None:
        if agent not in self._values:
            self._values[agent] = self._value(agent)
        self._groups.setdefault(agent, set()).add(group)
        group.push(agent, -self._values[agent])

    def refresh(self, agents: Iterable[Agent] | None = None) -> list[AgentGroup]:
        """Reads the values of these agents (None: of all) again.

        Returns:
            The groups of the agents whose values have changed.
        """
        groups = []
        for agent in tuple(self._values) if agents is None else agents:
            if agent not in self._values:
                continue
            value = self._value(agent)
            if value == self._values[agent]:
                continue
            self._values[agent] = value
            for group in self._groups[agent]:
                group.push(agent, -value)
                groups.append(group)
        return groups

    def check(self, nodes: Iterable[Grouped]) -> None:
        """Raises AssertionError unless nodes, groups and agents agree; `nodes`: all of the tree, roots included."""
        counts: dict[AgentGroup, int] = {}
        for node in nodes:
            counts[node.group] = counts.get(node.group, 0) + 1
        assert all(group.num_nodes == number for group, number in counts.items()), "the nodes of a group are counted"
        for agent, groups in self._groups.items():
            assert groups, "an agent without nodes is forgotten"
            assert all(group in counts and agent in group.agents for group in groups), "groups have nodes"
        for group in counts:
            assert all(group in self._groups[agent] for agent in group.agents), "an agent's groups are known"
            if group.agents:
                assert group.value == max(self._values[agent] for agent in group.agents), "the largest value counts"
