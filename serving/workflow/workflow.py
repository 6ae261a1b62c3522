"""What the workflows of one step graph have in common.

Which calls have been foretold and have not come yet, and what is left of that where others have come instead.

What has followed whose calls: a declared graph is believed the less, the more calls have been seen.

One workflow: who calls whom, what runs now, and in how many steps each agent is called.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from .durations import MEMORY, AgentDurations, Duration
from .spec import JOINS, AgentSpec, EdgeSpec, check_probability
from .steps_solver import JoinSolver


@dataclass
class News:
    """What one reader of the graph has not been told yet: workflows with an event, and agents that left one."""

    workflows: set[Workflow] = field(default_factory=set)
    agents: set[str] = field(default_factory=set)


@dataclass
class Shared:
    """Counters, durations and the index of agents; each workflow writes to them for its own agents and edges.

    Attributes:
        clock: seconds.
        horizon: steps; what is farther is infinitely far.
        default_s: guessed seconds of a call of an agent of which nothing is known.
        max_agents, max_edges: of all workflows together; `agents` and `edges` count them.
        durations: of every agent, whichever workflow calls it; kept when the last of them ends, while there is room.
        calls, pauses: of all agents together.
        members: of every agent, the workflows that have it.
        steps_news, reuse_news: one for each of the two readers.
    """

    clock: Callable[[], float]
    horizon: float
    default_s: float
    max_agents: int
    max_edges: int
    agents: int = 0
    edges: int = 0
    durations: dict[str, AgentDurations] = field(default_factory=dict)
    calls: Duration = field(default_factory=lambda: Duration(0.0, 0.0))
    pauses: Duration = field(default_factory=lambda: Duration(0.0, 0.0))
    members: dict[str, set[Workflow]] = field(default_factory=dict)
    steps_news: News = field(default_factory=News)
    reuse_news: News = field(default_factory=News)

    def joined(self, workflow: Workflow, spec: AgentSpec) -> None:
        """`workflow` has a new agent."""
        if self.agents >= self.max_agents:
            raise ValueError(f"the graph is full: {self.max_agents} agents are accepted in all workflows together")
        self.agents += 1
        self.members.setdefault(spec.name, set()).add(workflow)
        if spec.name not in self.durations:
            self.durations[spec.name] = AgentDurations.guess(spec, self.default_s)
            if spec.call_s is None:
                self.durations[spec.name].call.like = self.calls
            if spec.pause_s is None:
                self.durations[spec.name].pause.like = self.pauses

    def left(self, workflow: Workflow, agent: str) -> None:
        """`workflow` has one agent less."""
        self.agents -= 1
        self.members[agent].discard(workflow)
        if not self.members[agent]:
            del self.members[agent]
            if len(self.durations) > self.max_agents:
                del self.durations[agent]
        for news in (self.steps_news, self.reuse_news):
            news.agents.add(agent)

    def call(self, agent: str, seconds: float) -> None:
        """A call of `agent` took so long."""
        self.durations[agent].call.observe(seconds)
        self.calls.observe(seconds)

    def pause(self, agent: str, seconds: float) -> None:
        """What a call of `agent` led to came so much later."""
        self.durations[agent].pause.observe(seconds)
        self.pauses.observe(seconds)

    def happened(self, workflow: Workflow) -> None:
        self.steps_news.workflows.add(workflow)
        self.reuse_news.workflows.add(workflow)


FAINT = 0.1  # of the probability of its edge: less is left of no mark
TINY = 1e-200  # so small may a product of chances become before it begins anew
Edge = tuple[int, int]


class PendingPrediction(NamedTuple):
    """On an edge: its source has finished (at `since`, in seconds) and its target has not started since.

    `probability` is that of the edge, or 1 if it is known to be taken. `doubts` belongs to `PendingPredictions.valid`.
    """

    since: float
    probability: float
    doubts: float = 1.0


class PendingPredictions(dict[Edge, PendingPrediction]):
    """By the agents' numbers (source, target), the oldest first; changed by `put`, `take` and `surprise` alone.

    Attributes:
        sources: those that have marks, with how many.
    """

    def __init__(self) -> None:
        super().__init__()
        self._doubts = 1.0  # the product of what each surprise has left
        self.sources: dict[int, int] = {}

    def put(self, edge: Edge, since: float, probability: float) -> None:
        """A new mark, also where there was one."""
        self.take(edge)
        self[edge] = PendingPrediction(since, probability, self._doubts)
        self.sources[edge[0]] = self.sources.get(edge[0], 0) + 1

    def take(self, edge: Edge) -> bool:
        """Removes the mark of an edge; whether there was one."""
        if self.pop(edge, None) is None:
            return False
        self.sources[edge[0]] -= 1
        if not self.sources[edge[0]]:
            del self.sources[edge[0]]
        return True

    def only_source(self) -> int | None:
        """The source of all marks; None if there are several, or no marks."""
        return next(iter(self.sources)) if len(self.sources) == 1 else None

    def valid(self, mark: PendingPrediction) -> float:
        """The chance that no other call has come instead of the one that `mark` stands for."""
        return self._doubts / mark.doubts

    def surprise(self) -> list[Edge]:
        """One of the calls that the marks stand for will not come: that of any source, with the same chance.

        Returns:
            The edges whose marks are to be taken, as nearly nothing is left of them. It takes no longer where there
            are thousands, as all become less valid by the same factor.
        """
        if len(self.sources) < 2:
            return list(self)
        self._doubts *= 1 - 1 / len(self.sources)
        if self._doubts < TINY:
            for edge, mark in self.items():
                self[edge] = mark._replace(doubts=mark.doubts / self._doubts)
            self._doubts = 1.0
        faint = []
        for edge, mark in self.items():
            if self.valid(mark) >= FAINT:
                break
            faint.append(edge)
        return faint


TRUST = 8.0  # calls of an agent that its edges count as much as
FADING = 0.98  # of what was seen, with every further call
DOUBT = 2.0  # surprises that it counts as much as, that any agent is as likely to be one
MOST = 32  # successors of an agent that are counted; beyond, the least frequent is forgotten
_NONE: Mapping[int, float] = {}


class TransitionCounts:
    """Decayed counts of successors, by the agents' numbers.

    Of an agent whose calls lead elsewhere than its edges say, one time is put down to chance and the rest is a habit.
    Without that, what goes anywhere would leave its traces where it has just been.

    Attributes:
        moved: by how much the chances that follow from the counts have changed since it was last set to 0, in all.
        surprises, repeats: decayed numbers of calls that nothing foretold, and of those among them that were of the
            agent that had just been called.
    """

    def __init__(self) -> None:
        self._counts: dict[int, dict[int, float]] = {}
        self._sources: dict[int, set[int]] = {}  # of each target, so that nobody else is asked when it goes
        self.moved = self.surprises = self.repeats = 0.0

    def surprised(self, repeats: bool) -> None:
        """A call has come that nothing foretold, perhaps of the agent that had just been called."""
        self.surprises = FADING * self.surprises + 1.0
        self.repeats = FADING * self.repeats + repeats

    def repeating(self, agents: int) -> float:
        """How many times as likely as another of so many agents the last one is to be a surprise."""
        return (self.repeats * agents + DOUBT) / (self.surprises + DOUBT)

    def saw(self, source: int, target: int, told: float) -> None:
        """A call of `target` has followed one of `source`; `told` is the chance that the graph gives it."""
        counts = self._counts.setdefault(source, {})
        total = TRUST + sum(counts.values())
        self.moved += (1 - (TRUST * told + counts.get(target, 0.0)) / total) / (total + 1)
        for other in counts:
            counts[other] *= FADING
        counts[target] = counts.get(target, 0.0) + 1.0
        self._sources.setdefault(target, set()).add(source)
        if len(counts) > MOST:
            rarest = min(counts, key=lambda other: (other == target, counts[other]))
            del counts[rarest]
            self._sources[rarest].discard(source)

    def counts(self, source: int, named: Collection[int]) -> dict[int, float]:
        """How often each agent has followed `source`; of those that no edge names, how often again."""
        counts = self._counts.get(source, _NONE)
        return {target: n if target in named else n - 1 for target, n in counts.items() if target in named or n > 1}

    def again(self, source: int, target: int) -> bool:
        """Whether `target` has followed `source` more than once."""
        return self._counts.get(source, _NONE).get(target, 0.0) > 1

    def forget(self, node: int) -> None:
        """It is none of the workflow's agents any more; its number may be another's from now on."""
        for target in self._counts.pop(node, _NONE):
            self._sources[target].discard(node)
        for source in self._sources.pop(node, ()):
            self._counts[source].pop(node, None)


TRUST_WORKFLOW = 5  # calls that a graph counts as right for before any have been seen


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
        self.marks = PendingPredictions()
        self.structure = self.version = 0
        self.touched = shared.clock()
        self.lasting = False
        self.accuracy = 1.0
        self.followed = TransitionCounts()
        self._judged = TRUST_WORKFLOW
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
