"""One workflow: who calls whom, what runs now, and in how many steps each agent is called."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator

from .durations import MEMORY
from .followed import Followed
from .marks import Marks
from .shared import Shared
from .solver import JoinSolver
from .spec import JOINS, AgentSpec, EdgeSpec, check_probability

TRUST = 5  # calls that a graph counts as right for before any have been seen


class Workflow:
    """Made by `StepGraph.add_workflow`. Steps-to-execution as in KVFlow (arXiv 2507.07400, section 4.1).

    A running or expected agent is at 0, another one a step after the nearest (OR) or the farthest (AND) of its
    predecessors. A finished predecessor puts a mark on the edge, which counts as satisfied until the agent starts; one
    whose marks are complete is at 0, too. What nothing running leads to is infinitely far.

    Attributes:
        ids: number of each agent in the solver; a removed agent's number is given to another.
        branches: for each number, the successors' numbers and the probabilities of the edges.
        running: for each number with calls under way, when each started.
        expected: numbers of agents that will be called next, whatever the edges say.
        marks: by the numbers of source and target.
        structure: counts the changes of agents and edges; `version`: these and the events.
        touched: seconds, the last change or event. lasting: it is no run that ends, and silence means nothing.
        accuracy: the share of calls that a mark foretold, of those that came while there were marks.
        followed: what came after calls of which one of the ways is taken.
    """

    def __init__(self, name: str, shared: Shared) -> None:
        self.name = name
        self.shared = shared
        self.solver = JoinSolver(shared.horizon)
        self.ids: dict[str, int] = {}
        self.names: dict[int, str] = {}
        self.branches: dict[int, dict[int, float]] = {}
        self.running: dict[int, dict[Hashable, float]] = {}
        self.expected: set[int] = set()
        self.marks = Marks()
        self.structure = self.version = 0
        self.touched = shared.clock()
        self.lasting = False
        self.accuracy = 1.0
        self.followed = Followed()
        self._judged = TRUST
        self.changed: set[str] = set()  # agents whose steps may be other ones than at the last `drain`

    def add_agent(self, agent: str | AgentSpec) -> None:
        spec = agent if isinstance(agent, AgentSpec) else AgentSpec(agent)
        if spec.name in self.ids:
            raise ValueError(f"the workflow {self.name!r} has an agent {spec.name!r} already")
        self.shared.joined(self, spec)
        node = self.solver.add_node(spec.join == "and")
        self.ids[spec.name], self.names[node], self.branches[node] = node, spec.name, {}
        self._changed_structure(spec.name)

    def remove_agent(self, agent: str) -> None:
        """Its edges, marks and calls under way go as well."""
        node = self._id(agent)
        for other in list(self.solver.predecessors[node]):
            self._drop_edge(other, node)
        for other in list(self.branches[node]):
            self._drop_edge(node, other)
        self._note_changes()
        self.solver.remove_node(node)
        self.expected.discard(node)
        self.running.pop(node, None)
        self.followed.forget(node)
        del self.ids[agent], self.names[node], self.branches[node]
        self.shared.left(self, agent)
        self._changed_structure()

    def close(self) -> None:
        """Leave what the workflows share; nothing may be asked of this one afterwards."""
        for agent in self.ids:
            self.shared.left(self, agent)
        self.shared.edges -= sum(map(len, self.branches.values()))
        for news in (self.shared.steps_news, self.shared.reuse_news):
            news.workflows.discard(self)

    def can_add_edge(self) -> bool:
        """Whether there is room for one more, in all workflows together."""
        return self.shared.edges < self.shared.max_edges

    def add_edge(self, source: str | EdgeSpec, target: str = "", probability: float = 1.0) -> None:
        """A call of `source` leads to one of `target`; `probability` as in `EdgeSpec`, the new one for a known edge."""
        if isinstance(source, EdgeSpec):
            source, target, probability = source.source, source.target, source.probability
        start, end, probability = self._id(source), self._id(target), check_probability(probability)
        if end not in self.branches[start]:
            if not self.can_add_edge():
                raise ValueError(
                    f"the graph is full: {self.shared.max_edges} edges are accepted in all workflows together"
                )
            self.shared.edges += 1
            self.solver.set_edge(start, end)
        self.branches[start][end] = probability
        self._changed_structure()

    def remove_edge(self, source: str, target: str) -> None:
        start, end = self._id(source), self._id(target)
        if end not in self.branches[start]:
            raise ValueError(f"the workflow {self.name!r} has no edge from {source!r} to {target!r}")
        self._drop_edge(start, end)
        self._changed_structure()

    def set_join(self, agent: str, join: str) -> None:
        """`or` or `and`."""
        if join not in JOINS:
            raise ValueError(f"got join={join!r:.60}; accepted: {' or '.join(JOINS)}")
        self.solver.set_join(self._id(agent), join == "and")
        self._changed_structure()

    def start(self, agent: str, call: Hashable = None) -> None:
        """A call of `agent` begins; `call` names it where several are under way at once.

        It uses up the marks on the edges that lead here, and on the branches of their sources that were not taken. A
        call that nothing foretold has come instead of one that a mark stands for, which of them is not known.
        """
        node, now = self._id(agent), self.shared.clock()
        calls = self.running.setdefault(node, {})
        if call in calls:
            raise ValueError(f"the call {call!r:.60} of {agent!r} in the workflow {self.name!r} has started already")
        calls[call] = now
        used = {p: self.marks[p, node] for p in self.solver.satisfied[node]}
        if self.marks and node not in self.expected:
            self._judged = min(self._judged + 1, MEMORY)
            self.accuracy += (bool(used) - self.accuracy) / self._judged
        if used:
            last = max(used, key=lambda p: used[p].since)
            self.shared.pause(self.names[last], now - used[last].since)
        elif node not in self.expected:
            source = self.marks.only_source()
            if source is not None:
                self.followed.surprised(source == node)
                self._learn(source, node)
            for edge in self.marks.surprise():
                self._unmark(*edge)
        for source, mark in used.items():
            self._learn(source, node)
            if mark.probability < 1:
                for other in [t for t in self.branches[source] if self.branches[source][t] < 1]:
                    self._unmark(source, other)
            self._unmark(source, node)
        self.expected.discard(node)
        self._set_source(node)

    def _learn(self, source: int, target: int) -> None:
        """A call of `target` has followed one of `source`; from forks and of joins nothing is learned.

        Nor where the edges themselves are learned from the calls (`LearnedTransitions`).
        """
        if not self.lasting and self.is_choice(source) and not self.solver.is_and[target]:
            self.followed.saw(source, target, self.accuracy * self.branches[source].get(target, 0.0))

    def finish(self, agent: str, call: Hashable = None, chose: Collection[str] | None = None) -> None:
        """The call is over; `chose`: the successors that will be called, by default any that the edges name."""
        node, now = self._id(agent), self.shared.clock()
        taken = None if chose is None else {self._id(name) for name in chose}
        if taken is not None and not taken <= self.branches[node].keys():
            strange = sorted(self.names[t] for t in taken - self.branches[node].keys())
            raise ValueError(f"{agent!r} has no edge to {strange[0]!r} in the workflow {self.name!r}")
        began = self._end_call(node, call)
        self.shared.call(agent, now - began)
        for target, probability in self.branches[node].items():
            if taken is None or target in taken:
                self.marks.put((node, target), now, probability if taken is None else 1.0)
                self.solver.satisfy(node, target)
        self._set_source(node)

    def expect(self, agent: str) -> None:
        """It will be called next: the first agent of a workflow, or one that the edges did not foresee."""
        node = self._id(agent)
        self.expected.add(node)
        self._set_source(node)

    def retry(self, agent: str, call: Hashable = None) -> None:
        """It failed, or its answer is withdrawn, and it will be called again."""
        node = self._id(agent)
        if node in self.running:
            self._end_call(node, call)
        for target in self.branches[node]:
            self._unmark(node, target)
        self.expect(agent)

    def stop(self) -> None:
        """The next call may be any: no mark and no word that an agent comes next counts any more. That is no event."""
        touched = self.touched
        for edge in list(self.marks):
            self._unmark(*edge)
        for node in list(self.expected):
            self.expected.discard(node)
            self._set_source(node)
        self._event()
        self.touched = touched

    def durations_changed(self) -> None:
        """There is news of how long calls or pauses take."""
        self._event()

    def steps(self, agent: str) -> float:
        """Steps to the execution of `agent`: 0 = running or ready, infinity = not in sight."""
        return self.solver.distance(self._id(agent))

    def next_steps(self, agent: str) -> float:
        """As `steps`, but of a running agent those to its next call (N in a ring of N): what its cache is kept for."""
        node = self.ids[agent] if agent in self.ids else self._id(agent)
        waiting = node in self.expected or node not in self.running
        return self.solver.distance(node) if waiting else self.solver.next_distance(node)

    def is_choice(self, node: int) -> bool:
        """Whether no more than one of the ways from there is taken."""
        row = self.branches[node]
        return len(row) == 1 or all(p < 1 for p in row.values())

    def is_near(self, agent: str) -> bool:
        """Whether `agent` has more than once followed one that runs, or whose call is over, be there an edge or not."""
        node, again = self._id(agent), self.followed.again
        return any(again(source, node) for source in (*self.running, *self.marks.sources))

    def edges(self) -> Iterator[EdgeSpec]:
        for source, row in self.branches.items():
            for target, probability in row.items():
                yield EdgeSpec(self.names[source], self.names[target], probability)

    def join(self, agent: str) -> str:
        return JOINS[self.solver.is_and[self._id(agent)]]

    def drain(self) -> set[str]:
        """The agents whose steps may have changed since the last call."""
        self._note_changes()
        changed, self.changed = self.changed, set()
        return changed

    def _id(self, agent: str) -> int:
        node = self.ids.get(agent) if isinstance(agent, str) else None
        if node is None:
            raise ValueError(f"the workflow {self.name!r} has no agent {agent!r:.60}")
        return node

    def _set_source(self, node: int) -> None:
        self.solver.set_source(node, node in self.running or node in self.expected)
        self.changed.add(self.names[node])
        self._event()

    def _end_call(self, node: int, call: Hashable) -> float:
        """When the call began; without a name, the oldest is meant."""
        calls = self.running.get(node, {})
        if call is None and None not in calls and calls:
            call = next(iter(calls))
        if call not in calls:
            which = "call" if call is None else f"call {call!r:.60}"
            raise ValueError(f"{self.names[node]!r} has no {which} under way in the workflow {self.name!r}")
        began = calls.pop(call)
        if not calls:
            del self.running[node]
        return began

    def _unmark(self, source: int, target: int) -> None:
        if self.marks.take((source, target)):
            self.solver.satisfy(source, target, False)

    def _drop_edge(self, source: int, target: int) -> None:
        self.marks.take((source, target))
        self.solver.remove_edge(source, target)
        del self.branches[source][target]
        self.shared.edges -= 1

    def _note_changes(self) -> None:
        self.changed.update(self.names[node] for node in self.solver.drain() if node in self.names)

    def _changed_structure(self, *agents: str) -> None:
        self.changed.update(agents)
        self.structure += 1
        self._event()

    def _event(self) -> None:
        self.version += 1
        self.touched = self.shared.clock()
        self.shared.happened(self)
