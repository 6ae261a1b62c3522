"""The step graph: all running workflows, steps to each agent's next call, and the expected reuse of its cache."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

from .graph_config import GraphConfig
from .reuse_model import WorkflowReuse, combine_first
from .spec import WorkflowSpec, check_name
from .workflow import ChangeLog, GraphState, Workflow, locked

MIN_CHANCE = sys.float_info.min  # lower bound of probabilities, so that their logarithms are finite


class StepGraph:
    """Workflows by name. An agent that several of them call has the minimum of its steps and the chances of all.

    Agents are strings shared by all workflows; the prefix tree tags fixed prompts with them. What clients declare is
    checked and bounded here, and trusted otherwise: it moves memory and never changes answers.

    Workflows may be added, changed and removed from any thread: these methods hold `lock`, which is the cache's in a
    system of `build_system`, so none of them falls into a scheduler's step. Values of agents are read by the
    scheduler's thread; another thread holds `lock` while it reads them.

    Args:
        clock: seconds; a simulator passes its own.
        config: limits and tuned numbers.
    Attributes:
        rate: γ in 1/s. It changes in `changed_reuse` only, which then reports all agents, in this call and the next.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, config: GraphConfig | None = None) -> None:
        self.config = config = config or GraphConfig()
        self.rate = 1 / (
            config.discount_steps * config.default_call_s if config.discount_s is None else config.discount_s
        )
        self._state = GraphState(clock, config)
        self._workflows: dict[str, Workflow] = {}
        self._reuse: dict[Workflow, WorkflowReuse] = {}
        self._reported: dict[Workflow, float] = {}  # when `changed_reuse` last reported each workflow, oldest first
        self._due: dict[Workflow, None] = {}  # to be reported by `changed_reuse` though nothing has happened in them
        self._rate_since_s, self._phase_before = 0.0, 0.0  # of the present rate: its start, and `phase` then

    @property
    def lock(self) -> Any:
        """Guards the graph with all its workflows; reentrant."""
        return self._state.lock

    def share_lock(self, lock: Any) -> None:
        """From now on `lock`, the reentrant lock of the cache that reads the values, guards the graph."""
        self._state.lock = lock

    def separate_clients(self, agent_key: Callable[[str, str], str]) -> None:
        """From now on `agent_key(agent, client)` names the agent that a client means by a name in its workflows;
        without it, agents of one name are the same agent for all clients."""
        self._state.agent_key = agent_key

    # Workflows --------------------------------------------------------------------------------------------------

    @locked
    def add_workflow(self, spec: str | WorkflowSpec, name: str | None = None, client: str = "") -> Workflow:
        """Adds a workflow, empty if only its name is given; `name` replaces that of `spec` for one more run of it.

        If a limit is reached, workflows without an event for `silence_s` are removed first.

        Args:
            client: the client that the workflow belongs to: its agents are that client's, and calls by others are not
                counted. "": it will be that of the first client that calls an agent in it.

        Raises:
            ValueError: an invalid or known name, or a limit is reached.
        """
        if isinstance(spec, str):
            spec = WorkflowSpec(spec, ())
        if client:
            check_name(client, "a client")
        name = check_name(spec.name if name is None else name, "a workflow")
        if name in self._workflows:
            raise ValueError(f"there is a workflow {name!r} already")
        self._require_room(name, spec, client)
        workflow = self._workflows[name] = Workflow(name, self._state, client)
        try:
            for agent in spec.agents:
                workflow.add_agent(agent)
        except ValueError:  # a name with that of the client is too long
            workflow.close()
            del self._workflows[name]
            raise
        for edge in spec.edges:
            workflow.add_edge(edge)
        for agent in spec.start:
            workflow.expect(agent)
        self._reuse[workflow] = WorkflowReuse(workflow, self.rate)
        return workflow

    @locked
    def replace_workflow(self, spec: WorkflowSpec, name: str | None = None, client: str = "") -> bool:
        """As `add_workflow`, but a workflow of that name is changed: agents and edges that both declarations have keep
        their calls in progress, predictions and habits, see `Workflow.change`.

        Returns:
            Whether a workflow was added.
        Raises:
            ValueError: an invalid name, the present workflow belongs to another client, or a limit is reached. Then
                nothing has changed.
        """
        name = spec.name if name is None else name
        present = self._workflows.get(name)
        if present is None:
            self.add_workflow(spec, name, client)
            return True
        if present.persistent or present.client not in ("", client):
            raise ValueError(f"the workflow {name!r} is not this client's; accepted: another name")
        self._require_room(name, spec, client, present)
        if client:
            for agent in spec.agents:
                check_name(self._state.agent_key(agent.name, client), "an agent")
        present.change(spec)
        return False

    def _require_room(self, name: str, spec: WorkflowSpec, client: str, present: Workflow | None = None) -> None:
        """ValueError unless the graph has room for `spec` instead of `present`; silent workflows are removed for it."""
        lack = self._exceeded_limit(spec, client, present)
        if lack is not None and self.expire(self.config.silence_s, keep=present):
            lack = self._exceeded_limit(spec, client, present)
        if lack is not None:
            raise ValueError(f"the workflow {name!r} does not fit: {lack}")

    def _exceeded_limit(self, spec: WorkflowSpec, client: str, present: Workflow | None) -> str | None:
        """The first limit that `spec` would exceed, instead of `present`, in words."""
        config, state = self.config, self._state
        before = (0, 0, 0) if present is None else (1, len(present.ids), _num_edges(present))
        wanted = 1, len(spec.agents), len(spec.edges)
        used = len(self._workflows), state.num_agents, state.num_edges
        own = (0, 0, 0)
        if client:
            mine = [workflow for workflow in self._workflows.values() if workflow.client == client]
            own = len(mine), sum(len(one.ids) for one in mine), sum(map(_num_edges, mine))
        for number, (kind, limit) in enumerate(
            (("workflows", config.max_workflows), ("agents", config.max_agents), ("edges", config.max_edges))
        ):
            more = wanted[number] - before[number]
            if used[number] + more > limit:
                return f"{limit} {kind} are accepted in all"
            share = max(1, int(limit * config.client_share))
            if client and own[number] + more > share:
                return f"{share} {kind} of one client are accepted"
        return None

    @locked
    def remove_workflow(self, name: str) -> None:
        """Removes a workflow that has ended, or whose client has disconnected; ValueError if none was declared."""
        workflow = self[name]
        if workflow.persistent:
            raise ValueError(f"the workflow {name!r} is learned and has no end; accepted: a declared one")
        workflow.close()
        del self._workflows[name], self._reuse[workflow]
        self._reported.pop(workflow, None)
        self._due.pop(workflow, None)

    @locked
    def expire(self, seconds: float, keep: Workflow | None = None) -> list[str]:
        """Removes the workflows without an event for `seconds`, unless running or `persistent`; returns their names.

        Args:
            keep: is not removed.
        """
        limit = self._state.clock() - seconds
        silent = [name for name, workflow in self._workflows.items() if workflow.last_event_s < limit]
        old = [name for name in silent if not (self._workflows[name].running or self._workflows[name].persistent)]
        old = [name for name in old if self._workflows[name] is not keep]
        for name in old:
            self.remove_workflow(name)
        return old

    @locked
    def clear_silent(self) -> None:
        """Clears the predictions of workflows without an event for `silence_s`, except running ones."""
        limit = self._state.clock() - self.config.silence_s
        for workflow in self._workflows.values():
            if workflow.last_event_s < limit and (workflow.pending or workflow.expected) and not workflow.running:
                workflow.clear_predictions()

    def __getitem__(self, name: str) -> Workflow:
        if name not in self._workflows:
            raise ValueError(f"there is no workflow {name!r:.60}")
        return self._workflows[name]

    def __contains__(self, name: str) -> bool:
        return name in self._workflows

    @locked
    def __iter__(self) -> Iterator[Workflow]:
        return iter(list(self._workflows.values()))

    def __len__(self) -> int:
        return len(self._workflows)

    @property
    def agents(self) -> int:
        """Number of agents over all workflows; one that is in two counts twice."""
        return self._state.num_agents

    @property
    def edges(self) -> int:
        """Number of edges over all workflows."""
        return self._state.num_edges

    # Values of agents -------------------------------------------------------------------------------------------

    def steps(self, agent: str) -> float:
        """The minimum of `Workflow.steps` over the workflows with `agent`; infinity if there is none."""
        return min((workflow.steps(agent) for workflow in self._state.members.get(agent, ())), default=math.inf)

    def next_steps(self, agent: str) -> float:
        """As `steps`, with a running agent's next call instead of the current one: the value for eviction."""
        least = math.inf
        for workflow in self._state.members.get(agent, ()):
            least = min(least, workflow.next_steps(agent))
        return least

    def is_observed_successor(self, agent: str) -> bool:
        """Whether `agent` repeatedly followed one that is running now, see `Workflow.is_observed_successor`."""
        return any(workflow.is_observed_successor(agent) for workflow in self._state.members.get(agent, ()))

    def chance(self, agent: str) -> tuple[float, float]:
        """Reach and reuse: the probability of another call, and E[exp(-γT)]; see `reuse_model`."""
        reach, reuse = 0.0, 0.0
        members: Collection[Workflow] = self._state.members.get(agent, ())
        if len(members) == 1:
            (workflow,) = members
            reach, reuse = self._chances(workflow)[agent]
            return reach, min(reuse, reach)
        for workflow in sorted(members, key=lambda workflow: workflow.name):
            reach, reuse = combine_first(reach, reuse, *self._chances(workflow)[agent])
        return reach, min(reuse, reach)  # they may differ by rounding only

    def _chances(self, workflow: Workflow) -> dict[str, tuple[float, float]]:
        reuse = self._reuse[workflow]
        if reuse.rate != self.rate:
            reuse = self._reuse[workflow] = WorkflowReuse(workflow, self.rate)
        return reuse.chances()

    def reuse(self, agent: str) -> float:
        """Expected discounted reuse E[exp(-γT)] of the cache of `agent`, 0 to 1."""
        return self.chance(agent)[1]

    def retention_value(self, agent: str) -> float:
        """Value of having the cache of `agent` on the device, 0 to 1: reuse, plus a little of slowly discounted reuse.

        A prompt needed in several steps can be reloaded in the meantime, so γ is fast; but a reload occupies the link,
        so a prompt that is ever needed again has a small value. The slow discount is E[exp(-γT / slow_discount)] of a
        certain time.
        """
        reach, reuse = self.chance(agent)
        weight, slower = self.config.reload_weight, self.config.slow_discount
        return (reuse + weight * reach * (reuse / reach) ** (1 / slower)) / (1 + weight) if reuse > 0 else 0.0

    def seconds(self, agent: str) -> float:
        """Expected seconds to the next call, -ln(E[exp(-γT) | called]) / γ: the certain time of the same value.

        A lower bound beyond about 700 / γ, where floats underflow; infinity for agents without a next call.
        """
        reach, reuse = self.chance(agent)
        return max(0.0, -math.log(max(reuse / reach, MIN_CHANCE)) / self.rate) if reach > 0 else math.inf

    @locked
    def observe_pause(self, agent: str, seconds: float) -> None:
        """A pause after a call of `agent` takes `seconds`; ignored for agents of no workflow."""
        if agent in self._state.members:
            self._state.durations[agent].pause.observe(seconds)
            for workflow in self._state.members[agent]:
                workflow.durations_changed()

    # Changes ----------------------------------------------------------------------------------------------------

    def changed_steps(self) -> set[str]:
        """The agents whose steps may have changed since the last call."""
        log = self._state.steps_changes
        if not log.workflows and not log.removed_agents:
            return set()
        self._state.steps_changes = ChangeLog()
        return log.removed_agents.union(*(workflow.drain() for workflow in log.workflows))

    @property
    def has_due(self) -> bool:
        """Whether `changed_reuse` has more to report, without any event."""
        return bool(self._due)

    def changed_reuse(self, limit: float = math.inf) -> set[str]:
        """The agents whose reuse may have changed: those of workflows with an event, and all after a change of γ.

        Active workflows without an event for `max_age` are reported again: `ExpectedTime` assumes that their calls
        have come nearer meanwhile.

        Args:
            limit: agents that are reported in one call though nothing has happened in their workflows; the others
                follow in the next calls, so that none of these takes long. A workflow is reported as a whole.
        """
        log, now, due = self._state.reuse_changes, self._state.clock(), self._due
        if self.config.discount_s is None and self._adapt_rate(now):
            due.update(dict.fromkeys(self._reuse))
        while self._reported:
            workflow, reported = next(iter(self._reported.items()))
            if (now - reported) * self.rate < self.config.max_age:
                break
            del self._reported[workflow]
            due[workflow] = None
        if not log.workflows and not log.removed_agents and not due:
            return set()
        self._state.reuse_changes = ChangeLog()
        workflows = log.workflows
        for workflow in workflows:
            due.pop(workflow, None)
        while due and limit > 0:
            workflow = next(iter(due))
            del due[workflow]
            workflows.add(workflow)
            limit -= len(workflow.ids)
        for workflow in sorted(workflows, key=lambda workflow: workflow.name):
            self._reported.pop(workflow, None)
            if workflow.running or workflow.pending or workflow.expected:
                self._reported[workflow] = now
        return log.removed_agents.union(*(workflow.ids for workflow in workflows))

    def phase(self, now: float) -> float:
        """The integral of γ over the clock up to `now` in seconds, but for a constant."""
        return self._phase_before + self.rate * (now - self._rate_since_s)

    def _adapt_rate(self, now: float) -> bool:
        """Adapts γ to the mean duration of a step; returns whether it changed."""
        config, calls, pauses = self.config, self._state.calls, self._state.pauses
        wanted = config.discount_steps * (calls.mean + pauses.mean)
        wanted = min(config.max_discount_s, max(config.min_discount_s, wanted))
        if not calls.count or 1 / config.rate_hysteresis < wanted * self.rate < config.rate_hysteresis:
            return False
        self._phase_before, self._rate_since_s = self.phase(now), now
        self.rate = 1 / wanted
        return True


def _num_edges(workflow: Workflow) -> int:
    return sum(map(len, workflow.branches.values()))
