"""One running workflow: its agents and edges, the calls in progress, the calls predicted next, and steps to each agent.

A call that ends leaves predictions on the edges to its successors, and the next calls confirm or contradict them
(`transitions`). `GraphState` holds what all workflows of a step graph share.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any, TypeVar

from .durations import AgentDurations, Duration
from .graph_config import GraphConfig
from .spec import JOINS, AgentSpec, EdgeSpec, WorkflowSpec, check_name, check_probability
from .steps_solver import JoinSolver
from .transitions import PendingPredictions, TransitionCounts

Method = TypeVar("Method", bound=Callable[..., Any])


def locked(method: Method) -> Method:
    """Runs a method under the reentrant `self.lock`."""

    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.lock:
            return method(self, *args, **kwargs)

    return call  # type: ignore[return-value]


@dataclass
class ChangeLog:
    """Changes that one reader of the graph has not consumed: workflows with an event, and agents that left one."""

    workflows: set[Workflow] = field(default_factory=set)
    removed_agents: set[str] = field(default_factory=set)


@dataclass
class GraphState:
    """Counters, durations and the index of agents shared by all workflows of a step graph.

    Attributes:
        lock: guards graph and workflows; reentrant.
        agent_key: the name of the agent that a client means by a name, see `StepGraph.separate_clients`.
        durations: by agent, whichever workflow calls it; kept when the last of them ends, while there is room.
        calls, pauses: durations of all agents together.
        steps_changes, reuse_changes: one log for each of the two readers.
    """

    clock: Callable[[], float]
    config: GraphConfig
    num_agents: int = 0
    num_edges: int = 0
    durations: dict[str, AgentDurations] = field(default_factory=dict)
    calls: Duration = field(init=False)
    pauses: Duration = field(init=False)
    members: dict[str, set[Workflow]] = field(default_factory=dict)
    steps_changes: ChangeLog = field(default_factory=ChangeLog)
    reuse_changes: ChangeLog = field(default_factory=ChangeLog)
    lock: Any = field(default_factory=threading.RLock, repr=False)
    agent_key: Callable[[str, str], str] = field(default=lambda agent, client: agent, repr=False)

    def __post_init__(self) -> None:
        self.calls = Duration(0.0, 0.0, config=self.config.durations)
        self.pauses = Duration(0.0, 0.0, config=self.config.durations)

    def add_agent(self, workflow: Workflow, spec: AgentSpec) -> None:
        """Counts a new agent of `workflow`; ValueError if there are `max_agents` already."""
        limit = self.config.max_agents
        if self.num_agents >= limit:
            raise ValueError(f"the graph is full: {limit} agents are accepted in all workflows together")
        self.num_agents += 1
        self.members.setdefault(spec.name, set()).add(workflow)
        if spec.name not in self.durations:
            durations = AgentDurations.guess(spec, self.config.default_call_s, self.config.durations)
            self.durations[spec.name] = durations
            if spec.call_s is None:
                durations.call.prior = self.calls
            if spec.pause_s is None:
                durations.pause.prior = self.pauses

    def guess_again(self, agent: str, spec: AgentSpec) -> None:
        """Replaces the guesses of the durations of `agent` by those given in `spec`, as far as none was observed."""
        known = self.durations[agent]
        guess = AgentDurations.guess(spec, self.config.default_call_s, self.config.durations)
        if spec.call_s is not None and not known.call.count:
            known.call = guess.call
        if spec.pause_s is not None and not known.pause.count:
            known.pause = guess.pause

    def rename_agent(self, workflow: Workflow, agent: str, name: str) -> None:
        """An agent of `workflow` is another one from now on, with the same guesses of durations and no observations."""
        known = self.durations[agent]
        self.num_agents += 1
        self.members.setdefault(name, set()).add(workflow)
        self.durations.setdefault(name, known.without_observations())
        self.remove_agent(workflow, agent)

    def remove_agent(self, workflow: Workflow, agent: str) -> None:
        self.num_agents -= 1
        self.members[agent].discard(workflow)
        if not self.members[agent]:
            del self.members[agent]
            if len(self.durations) > self.config.max_agents:
                del self.durations[agent]
        for log in (self.steps_changes, self.reuse_changes):
            log.removed_agents.add(agent)

    def observe_call(self, agent: str, seconds: float) -> None:
        self.durations[agent].call.observe(seconds)
        self.calls.observe(seconds)

    def observe_pause(self, agent: str, seconds: float) -> None:
        """The call after one of `agent` began `seconds` after its end."""
        self.durations[agent].pause.observe(seconds)
        self.pauses.observe(seconds)

    def record_event(self, workflow: Workflow) -> None:
        self.steps_changes.workflows.add(workflow)
        self.reuse_changes.workflows.add(workflow)


class Workflow:
    """Made by `StepGraph.add_workflow`. Steps-to-execution as in KVFlow (arXiv 2507.07400, section 4.1).

    A running or expected agent is at 0, any other one step after the nearest (OR) or the farthest (AND) of its
    predecessors. A finished predecessor leaves a pending prediction on the edge, which counts as satisfied until the
    agent starts; an agent with all its predictions pending is at 0, too. Agents that nothing running leads to are
    infinitely far.

    Methods that change it may be called from any thread.

    Attributes:
        client: the client that it belongs to, whose calls are counted; "": nobody yet (`bind`).
        ids: number of each agent in the solver; the number of a removed agent is reused.
        branches: for each number, the successors' numbers and the probabilities of the edges.
        running: for each number with calls in progress, the start of each call in seconds.
        expected: numbers of agents that will be called next, whatever the edges say.
        transitions: observed successors of agents that choose between their edges.
        structure_version: counts the changes of agents and edges; `version`: these and the events.
        last_event_s: seconds, the last change or event.
        persistent: the workflow is not a single run, so it never expires from silence.
        accuracy: share of predicted calls among those that came while predictions were pending.
    """

    def __init__(self, name: str, state: GraphState, client: str = "") -> None:
        self.name, self.client = name, client
        self.graph_state = state
        self.solver = JoinSolver(state.config.horizon)
        self.ids: dict[str, int] = {}
        self.names: dict[int, str] = {}
        self.branches: dict[int, dict[int, float]] = {}
        self.running: dict[int, dict[Hashable, float]] = {}
        self.expected: set[int] = set()
        self.pending = PendingPredictions(state.config.transitions.min_validity)
        self.transitions = TransitionCounts(state.config.transitions)
        self.structure_version = self.version = 0
        self.last_event_s = state.clock()
        self.persistent = False
        self.accuracy = 1.0
        self._accuracy_count = state.config.transitions.accuracy_prior
        self._changed_agents: set[str] = set()  # agents whose steps may have changed since the last `drain`
        self._renamed: dict[str, str] = {}  # names that were declared, of agents that have another one

    @property
    def lock(self) -> Any:
        """Guards the whole graph; to be held by other threads while they read values."""
        return self.graph_state.lock

    # Structure --------------------------------------------------------------------------------------------------

    @locked
    def add_agent(self, agent: str | AgentSpec) -> None:
        """Adds an agent without edges; in a client's workflow, the agent that the client means by the name.

        Raises:
            ValueError: there is one of that name, the name is invalid, or the graph is full.
        """
        spec = agent if isinstance(agent, AgentSpec) else AgentSpec(agent)
        if self.current_name(spec.name) is not None:
            raise ValueError(f"the workflow {self.name!r} has an agent {spec.name!r} already")
        if self.client and (name := self.graph_state.agent_key(spec.name, self.client)) != spec.name:
            self._renamed[spec.name] = name
            spec = replace(spec, name=name)
        self.graph_state.add_agent(self, spec)
        node = self.solver.add_node(spec.join == "and")
        self.ids[spec.name], self.names[node], self.branches[node] = node, spec.name, {}
        self._record_structure(spec.name)

    @locked
    def remove_agent(self, agent: str) -> None:
        """Removes an agent with its edges, pending predictions and calls in progress."""
        node = self._node(agent)
        for other in list(self.solver.predecessors[node]):
            self._remove_edge(other, node)
        for other in list(self.branches[node]):
            self._remove_edge(node, other)
        self._collect_changes()
        self.solver.remove_node(node)
        self.expected.discard(node)
        self.running.pop(node, None)
        self.transitions.forget(node)
        name = self.names[node]
        del self.ids[name], self.names[node], self.branches[node]
        self._renamed = {declared: current for declared, current in self._renamed.items() if current != name}
        self.graph_state.remove_agent(self, name)
        self._record_structure()

    @locked
    def change(self, spec: WorkflowSpec) -> None:
        """Gives it the agents, joins and edges of `spec`, which fit into the graph.

        Agents and edges that were there before keep their calls in progress, predictions and habits; guesses of
        durations are replaced where nothing has been observed. While nothing runs or is predicted, the first agents of
        `spec` are expected.
        """
        kept = {self.current_name(agent.name) for agent in spec.agents}
        for agent in [name for name in self.ids if name not in kept]:
            self.remove_agent(agent)
        for agent in spec.agents:
            name = self.current_name(agent.name)
            if name is None:
                self.add_agent(agent)
            else:
                self.set_join(name, agent.join)
                self.graph_state.guess_again(name, agent)
        wanted = {(self._node(edge.source), self._node(edge.target)) for edge in spec.edges}
        for source, row in self.branches.items():
            for target in [one for one in row if (source, one) not in wanted]:
                self._remove_edge(source, target)
        for edge in spec.edges:
            self.add_edge(edge)
        if not self.running and not self.pending:
            for node in list(self.expected):
                self.expected.discard(node)
                self._update_source(node)
            for agent in spec.start:
                self.expect(agent)

    def declared_names(self) -> dict[str, str]:
        """The names that agents were declared with, by their present ones."""
        declared = {current: name for name, current in self._renamed.items()}
        return {name: declared.get(name, name) for name in self.ids}

    @locked
    def bind(self, client: str) -> None:
        """Makes a workflow of nobody that of `client`: its agents are those that the client means by their names, and
        have other names if other clients use these. All methods accept the declared names as well.

        Raises:
            ValueError: the workflow belongs to another client, or a new name is too long; then nothing has changed.
        """
        if self.client not in ("", client):
            raise ValueError(f"the workflow {self.name!r} belongs to the client {self.client!r}, not to {client!r}")
        names = {agent: self.graph_state.agent_key(agent, client) for agent in self.ids}
        for name in names.values():
            check_name(name, "an agent")
        self.client = client
        for agent, name in names.items():
            if name != agent:
                self.graph_state.rename_agent(self, agent, name)
                self.names[self.ids[agent]] = self._renamed[agent] = name
                self._record_structure(name)
        self.ids = {names[agent]: node for agent, node in self.ids.items()}

    @locked
    def close(self) -> None:
        """Leaves the shared state; the workflow must not be used afterwards."""
        state = self.graph_state
        for agent in self.ids:
            state.remove_agent(self, agent)
        state.num_edges -= sum(map(len, self.branches.values()))
        for log in (state.steps_changes, state.reuse_changes):
            log.workflows.discard(self)

    def can_add_edge(self) -> bool:
        """Whether one more edge is accepted, over all workflows together."""
        return self.graph_state.num_edges < self.graph_state.config.max_edges

    @locked
    def add_edge(self, source: str | EdgeSpec, target: str = "", probability: float = 1.0) -> None:
        """Adds an edge, or changes the probability of a known one; `probability` as in `EdgeSpec`.

        Raises:
            ValueError: an unknown agent, an invalid probability, or the graph is full.
        """
        if isinstance(source, EdgeSpec):
            source, target, probability = source.source, source.target, source.probability
        start, end, probability = self._node(source), self._node(target), check_probability(probability)
        if end not in self.branches[start]:
            if not self.can_add_edge():
                limit = self.graph_state.config.max_edges
                raise ValueError(f"the graph is full: {limit} edges are accepted in all workflows together")
            self.graph_state.num_edges += 1
            self.solver.set_edge(start, end)
        self.branches[start][end] = probability
        self._record_structure()

    @locked
    def remove_edge(self, source: str, target: str) -> None:
        """Removes an edge and its pending prediction.

        Raises:
            ValueError: there is no such edge.
        """
        start, end = self._node(source), self._node(target)
        if end not in self.branches[start]:
            raise ValueError(f"the workflow {self.name!r} has no edge from {source!r} to {target!r}")
        self._remove_edge(start, end)
        self._record_structure()

    @locked
    def set_join(self, agent: str, join: str) -> None:
        """Sets the join of an agent, `or` or `and`."""
        if join not in JOINS:
            raise ValueError(f"got join={join!r:.60}; accepted: {' or '.join(JOINS)}")
        self.solver.set_join(self._node(agent), join == "and")
        self._record_structure()

    @locked
    def edges(self) -> list[EdgeSpec]:
        """All edges with their current probabilities."""
        return [
            EdgeSpec(self.names[source], self.names[target], probability)
            for source, row in self.branches.items()
            for target, probability in row.items()
        ]

    def current_name(self, agent: str) -> str | None:
        """The name that an agent has now, by that or by its declared one; None if the workflow has no such agent."""
        name = agent if agent in self.ids else self._renamed.get(agent)
        return name if name in self.ids else None

    def join(self, agent: str) -> str:
        """The join of an agent, `or` or `and`."""
        return JOINS[self.solver.is_and[self._node(agent)]]

    def is_choice(self, node: int) -> bool:
        """Whether at most one of the outgoing edges is taken."""
        row = self.branches[node]
        return len(row) == 1 or all(p < 1 for p in row.values())

    # Events -----------------------------------------------------------------------------------------------------

    @locked
    def start(self, agent: str, call: Hashable = None) -> None:
        """A call of `agent` begins; `call` identifies it where several are in progress at once.

        It consumes the pending predictions on the incoming edges, and those on the branches of their sources that were
        not taken. An unpredicted call cancels the prediction it replaced, see `PendingPredictions`.

        Raises:
            ValueError: an unknown agent, or this call has started already.
        """
        node, now = self._node(agent), self.graph_state.clock()
        calls = self.running.setdefault(node, {})
        if call in calls:
            raise ValueError(f"the call {call!r:.60} of {agent!r} in the workflow {self.name!r} has started already")
        calls[call] = now
        confirmed = {p: self.pending[p, node] for p in self.solver.satisfied[node]}
        if self.pending and node not in self.expected:
            memory = self.graph_state.config.transitions.accuracy_memory
            self._accuracy_count = min(self._accuracy_count + 1, memory)
            self.accuracy += (bool(confirmed) - self.accuracy) / self._accuracy_count
        if confirmed:
            last = max(confirmed, key=lambda p: confirmed[p].since)
            self.graph_state.observe_pause(self.names[last], now - confirmed[last].since)
        elif node not in self.expected:
            source = self.pending.only_source()
            if source is not None:
                self.transitions.record_unpredicted(source == node)
                self._record_transition(source, node)
            for edge in self.pending.record_unpredicted():
                self._remove_pending(*edge)
        for source, prediction in confirmed.items():
            self._record_transition(source, node)
            if prediction.probability < 1:
                for other in [t for t in self.branches[source] if self.branches[source][t] < 1]:
                    self._remove_pending(source, other)
            self._remove_pending(source, node)
        self.expected.discard(node)
        self._update_source(node)

    @locked
    def finish(self, agent: str, call: Hashable = None, chose: Collection[str] | None = None) -> None:
        """A call ends; `chose`: the successors that will be called, by default any of those with an edge.

        Raises:
            ValueError: an unknown agent or call, or `chose` names an agent without an edge.
        """
        node, now = self._node(agent), self.graph_state.clock()
        taken = None if chose is None else {self._node(name) for name in chose}
        if taken is not None and not taken <= self.branches[node].keys():
            strange = sorted(self.names[t] for t in taken - self.branches[node].keys())
            raise ValueError(f"{agent!r} has no edge to {strange[0]!r} in the workflow {self.name!r}")
        began = self._end_call(node, call)
        self.graph_state.observe_call(agent, now - began)
        for target, probability in self.branches[node].items():
            if taken is None or target in taken:
                self.pending.add((node, target), now, probability if taken is None else 1.0)
                self.solver.satisfy(node, target)
        self._update_source(node)

    @locked
    def expect(self, agent: str) -> None:
        """`agent` will be called next: the first one of a workflow, or one that the edges do not predict."""
        node = self._node(agent)
        self.expected.add(node)
        self._update_source(node)

    @locked
    def retry(self, agent: str, call: Hashable = None) -> None:
        """A call failed, or its answer is withdrawn, and the agent will be called again."""
        node = self._node(agent)
        if node in self.running:
            self._end_call(node, call)
        for target in self.branches[node]:
            self._remove_pending(node, target)
        self.expect(agent)

    @locked
    def clear_predictions(self) -> None:
        """Removes all pending predictions and expected agents. This is no event: `last_event_s` does not change."""
        last_event_s = self.last_event_s
        for edge in list(self.pending):
            self._remove_pending(*edge)
        for node in list(self.expected):
            self.expected.discard(node)
            self._update_source(node)
        self._record_event()
        self.last_event_s = last_event_s

    def durations_changed(self) -> None:
        """The durations of one of its agents were updated from outside."""
        self._record_event()

    # Reads ------------------------------------------------------------------------------------------------------

    def steps(self, agent: str) -> float:
        """Steps to the execution of `agent`: 0 = running or ready, infinity = unreachable or beyond the horizon."""
        return self.solver.distance(self._node(agent))

    def next_steps(self, agent: str) -> float:
        """As `steps`, but for a running agent those to its next call (N in a ring of N): the value of its cache."""
        node = self.ids[agent] if agent in self.ids else self._node(agent)
        waiting = node in self.expected or node not in self.running
        return self.solver.distance(node) if waiting else self.solver.next_distance(node)

    def is_observed_successor(self, agent: str) -> bool:
        """Whether `agent` has repeatedly followed one that is running or has just ended, with or without an edge."""
        node, is_habit = self._node(agent), self.transitions.is_habit
        return any(is_habit(source, node) for source in (*self.running, *self.pending.source_counts))

    def drain(self) -> set[str]:
        """The agents whose steps may have changed since the last call."""
        self._collect_changes()
        changed, self._changed_agents = self._changed_agents, set()
        return changed

    # Helpers ----------------------------------------------------------------------------------------------------

    def _node(self, agent: str) -> int:
        node = self.ids.get(agent) if isinstance(agent, str) else None
        if node is None:
            name = self.current_name(agent) if isinstance(agent, str) else None
            if name is None:
                raise ValueError(f"the workflow {self.name!r} has no agent {agent!r:.60}")
            return self.ids[name]
        return node

    def _update_source(self, node: int) -> None:
        self.solver.set_source(node, node in self.running or node in self.expected)
        self._changed_agents.add(self.names[node])
        self._record_event()

    def _end_call(self, node: int, call: Hashable) -> float:
        calls = self.running.get(node, {})
        if call is None and None not in calls and calls:
            call = next(iter(calls))
        if call not in calls:
            which = "call" if call is None else f"call {call!r:.60}"
            raise ValueError(f"{self.names[node]!r} has no {which} in progress in the workflow {self.name!r}")
        began = calls.pop(call)
        if not calls:
            del self.running[node]
        return began

    def _record_transition(self, source: int, target: int) -> None:
        """Learns that `target` followed `source`, except of forks, of AND joins, and where the edges are learned."""
        if not self.persistent and self.is_choice(source) and not self.solver.is_and[target]:
            self.transitions.record(source, target, self.accuracy * self.branches[source].get(target, 0.0))

    def _remove_pending(self, source: int, target: int) -> None:
        if self.pending.remove((source, target)):
            self.solver.satisfy(source, target, False)

    def _remove_edge(self, source: int, target: int) -> None:
        self.pending.remove((source, target))
        self.solver.remove_edge(source, target)
        del self.branches[source][target]
        self.graph_state.num_edges -= 1

    def _collect_changes(self) -> None:
        self._changed_agents.update(self.names[node] for node in self.solver.drain() if node in self.names)

    def _record_structure(self, *agents: str) -> None:
        self._changed_agents.update(agents)
        self.structure_version += 1
        self._record_event()

    def _record_event(self) -> None:
        self.version += 1
        self.last_event_s = self.graph_state.clock()
        self.graph_state.record_event(self)
