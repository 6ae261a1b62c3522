"""The step graph: all workflows that run, and what their agents' caches are worth."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Collection, Iterator

from .reuse_model import WorkflowReuse
from .spec import WorkflowSpec, check_name
from .workflow import News, Shared, Workflow

SILENT_S = 3600.0
OF_A_STEP = 0.4
COPY, SLOWER = 0.001, 16.0  # see `worth`
STEADY = 1.4  # the factor by which 1/γ must be off before it follows
OLD = 8.0  # in 1/γ: what was read of a workflow so long ago is read anew, be there news or not
LEAST_S, MOST_S = 0.01, 100.0  # of 1/γ
LEAST = sys.float_info.min  # of a chance, so that its logarithm is a number


class StepGraph:
    """Workflows by name. An agent that several of them call takes the smallest of its steps and the chances of all.

    Agents are the strings that workflows share; a tree tags a fixed prompt with one. Clients' words are checked and
    bounded here, and believed: they move memory, never answers. Not for several threads at once.

    Args:
        clock: seconds; a simulator passes its own.
        horizon: steps; what is farther counts as out of sight.
        discount_s: seconds, 1/γ: a call that far away is worth 1/e of one now. None: `OF_A_STEP` of what a step, a
            call and the pause after it, has taken in the mean lately, and never less than 10 ms.
        default_s: guessed seconds of a call of an agent of which nothing is known.
        max_workflows, max_agents, max_edges: what all clients together may declare.
    Attributes:
        rate: γ in 1/s. It changes in `changed_reuse` alone, and then all that was read before is to be read anew.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        *,
        horizon: float = 64,
        discount_s: float | None = None,
        default_s: float = 5.0,
        max_workflows: int = 10_000,
        max_agents: int = 100_000,
        max_edges: int = 1_000_000,
    ) -> None:
        for name, value in (("horizon", horizon), ("discount_s", discount_s), ("default_s", default_s)):
            if value is not None and (not value > 0 or (math.isinf(value) and name != "horizon")):
                raise ValueError(f"got {name}={value}; accepted: a number above 0")
        self.rate = 1 / (OF_A_STEP * default_s if discount_s is None else discount_s)
        self._follows = discount_s is None
        self.max_workflows = max_workflows
        self._shared = Shared(clock, horizon, default_s, max_agents, max_edges)
        self._workflows: dict[str, Workflow] = {}
        self._reuse: dict[Workflow, WorkflowReuse] = {}
        self._told: dict[Workflow, float] = {}  # when `changed_reuse` last named a workflow's agents, the oldest first

    def add_workflow(self, spec: str | WorkflowSpec, name: str | None = None) -> Workflow:
        """Declare a workflow, empty if only its name is given; `name` instead of the one in `spec` for one more run.

        Where there is no room, those without a call for `SILENT_S` go for it.
        """
        if isinstance(spec, str):
            spec = WorkflowSpec(spec, ())
        name = check_name(spec.name if name is None else name, "a workflow")
        shared = self._shared
        if name in self._workflows:
            raise ValueError(f"there is a workflow {name!r} already")
        if (lack := self._lacks(spec)) is not None and self.expire(SILENT_S):
            lack = self._lacks(spec)
        if lack is not None:
            raise ValueError(f"the workflow {name!r} does not fit: {lack} are accepted in all")
        workflow = self._workflows[name] = Workflow(name, shared)
        for agent in spec.agents:
            workflow.add_agent(agent)
        for edge in spec.edges:
            workflow.add_edge(edge)
        for agent in spec.start:
            workflow.expect(agent)
        self._reuse[workflow] = WorkflowReuse(workflow, self.rate)
        return workflow

    def _lacks(self, spec: WorkflowSpec) -> str | None:
        """The limit that is in the way of one more workflow."""
        shared = self._shared
        for kind, limit, wanted in (
            ("workflows", self.max_workflows, len(self._workflows) + 1),
            ("agents", shared.max_agents, shared.agents + len(spec.agents)),
            ("edges", shared.max_edges, shared.edges + len(spec.edges)),
        ):
            if wanted > limit:
                return f"{limit} {kind}"
        return None

    def remove_workflow(self, name: str) -> None:
        """It has ended, or its client has gone."""
        workflow = self[name]
        workflow.close()
        del self._workflows[name], self._reuse[workflow]
        self._told.pop(workflow, None)

    def expire(self, seconds: float) -> list[str]:
        """Remove the workflows without an event for so long that have no call under way and are not `lasting`.

        Returns:
            Their names.
        """
        limit = self._shared.clock() - seconds
        silent = [name for name, workflow in self._workflows.items() if workflow.touched < limit]
        old = [name for name in silent if not (self._workflows[name].running or self._workflows[name].lasting)]
        for name in old:
            self.remove_workflow(name)
        return old

    def stop(self, seconds: float = SILENT_S) -> None:
        """Nothing is expected of workflows without an event for so long until they call again."""
        limit = self._shared.clock() - seconds
        for workflow in self._workflows.values():
            if workflow.touched < limit and (workflow.marks or workflow.expected) and not workflow.running:
                workflow.stop()

    def __getitem__(self, name: str) -> Workflow:
        if name not in self._workflows:
            raise ValueError(f"there is no workflow {name!r:.60}")
        return self._workflows[name]

    def __contains__(self, name: str) -> bool:
        return name in self._workflows

    def __iter__(self) -> Iterator[Workflow]:
        return iter(self._workflows.values())

    def __len__(self) -> int:
        return len(self._workflows)

    @property
    def agents(self) -> int:
        """Agents of all workflows, one that is in two counted twice."""
        return self._shared.agents

    @property
    def edges(self) -> int:
        return self._shared.edges

    def steps(self, agent: str) -> float:
        """The least steps-to-execution over the workflows that have `agent`; infinity if none has."""
        return min((workflow.steps(agent) for workflow in self._shared.members.get(agent, ())), default=math.inf)

    def next_steps(self, agent: str) -> float:
        """As `steps`, with a running agent's next call instead of this one: the value for eviction."""
        least = math.inf
        for workflow in self._shared.members.get(agent, ()):
            least = min(least, workflow.next_steps(agent))
        return least

    def is_near(self, agent: str) -> bool:
        """Whether `agent` has been seen to follow what some workflow runs, edges or none; see `Workflow.is_near`."""
        return any(workflow.is_near(agent) for workflow in self._shared.members.get(agent, ()))

    def chance(self, agent: str) -> tuple[float, float]:
        """The chance of another call, and the expected discounted reuse E[exp(-γT)]; see `expected`."""
        reach, reuse = 0.0, 0.0
        members: Collection[Workflow] = self._shared.members.get(agent, ())
        if len(members) == 1:
            (workflow,) = members
            reach, reuse = self._reuse[workflow].chances()[agent]
            return reach, min(reuse, reach)
        for workflow in sorted(members, key=lambda workflow: workflow.name):
            more, sooner = self._reuse[workflow].chances()[agent]
            reuse = max(reuse + (1 - reach) * sooner, sooner + (1 - more) * reuse)  # `expected.first_of`
            reach = 1 - (1 - reach) * (1 - more)
        return reach, min(reuse, reach)  # they may differ by rounding only

    def reuse(self, agent: str) -> float:
        """Expected discounted reuse of `agent`, 0 to 1: the P(reuse) of `orders.ExpectedTime`."""
        return self.chance(agent)[1]

    def worth(self, agent: str) -> float:
        """What it is worth to have what `agent` needs on the device, 0 to 1: its reuse, and a little of a slower one.

        What is called in some steps can be brought back in the meantime, so γ is fast; but a copy takes the link, which
        is why what comes back at all is not worth nothing. The slower one is E[exp(-γT / SLOWER)] of a sure time.
        """
        reach, reuse = self.chance(agent)
        return (reuse + COPY * reach * (reuse / reach) ** (1 / SLOWER)) / (1 + COPY) if reuse > 0 else 0.0

    def seconds(self, agent: str) -> float:
        """Expected time to execution, -ln(E[exp(-γT) | called]) / γ: a sure time that is worth the same.

        Beyond some 700 / γ, which floats cannot tell apart, a lower bound.
        """
        reach, reuse = self.chance(agent)
        return max(0.0, -math.log(max(reuse / reach, LEAST)) / self.rate) if reach > 0 else math.inf

    def _adapt(self) -> bool:
        """Lets γ follow what steps take; whether it is a new one."""
        calls, pauses = self._shared.calls, self._shared.pauses
        wanted = min(MOST_S, max(LEAST_S, OF_A_STEP * (calls.mean + pauses.mean)))
        if not calls.count or 1 / STEADY < wanted * self.rate < STEADY:
            return False
        self.rate = 1 / wanted
        self._reuse = {workflow: WorkflowReuse(workflow, self.rate) for workflow in self._reuse}
        return True

    def observe_pause(self, agent: str, seconds: float) -> None:
        """The pause after a call of `agent` took, or is said to take, so long; nothing if no workflow has it."""
        if agent in self._shared.members:
            self._shared.durations[agent].pause.observe(seconds)
            for workflow in self._shared.members[agent]:
                workflow.durations_changed()

    def changed_steps(self) -> set[str]:
        """The agents whose steps may have changed since the last call: what a tree ordered by steps must be told."""
        news = self._shared.steps_news
        if not news.workflows and not news.agents:
            return set()
        self._shared.steps_news = News()
        return news.agents.union(*(workflow.drain() for workflow in news.workflows))

    def changed_reuse(self) -> set[str]:
        """As `changed_steps` for `reuse`: all agents of the workflows that had an event, and all if γ is a new one.

        So are those that were silent for long: `orders.ExpectedTime` takes calls to have come nearer meanwhile.
        """
        news, now = self._shared.reuse_news, self._shared.clock()
        if self._follows and self._adapt():
            news.workflows.update(self._reuse)
        for workflow, told in self._told.items():
            if (now - told) * self.rate < OLD:
                break
            news.workflows.add(workflow)
        if not news.workflows and not news.agents:
            return set()
        self._shared.reuse_news = News()
        for workflow in news.workflows:
            self._told.pop(workflow, None)
            if workflow.running or workflow.marks or workflow.expected:
                self._told[workflow] = now
        return news.agents.union(*(workflow.ids for workflow in news.workflows))
