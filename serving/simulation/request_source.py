"""The sources of a simulation's requests: generated workflows, the calls of a trace, and a warm-up before either."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..request import Request, RequestOutput, StorePolicy
from ..system import System
from ..workflow.spec import WorkflowSpec
from .trace import Trace, TracedCall
from .workload import AgentCall, WorkflowClient

NO_TIMEOUT_S = 1e9  # a simulated request is to be answered, however late


@dataclass(frozen=True)
class SimulatedRequest:
    """A request to be submitted, whose answer has `output_tokens`, at most `request.max_new_tokens`."""

    request: Request
    output_tokens: int


class RequestSource(Protocol):
    """Generates requests: at the start, and whenever one has ended. Times are seconds on the system's clock."""

    @property
    def declared(self) -> Sequence[WorkflowSpec]:
        """The workflows that the server knows once `begin` has returned."""
        ...

    def begin(self, system: System) -> list[tuple[float, SimulatedRequest]]:
        """Declares the workflows, and returns the requests that follow no other, with their times of arrival."""
        ...

    def on_submit(self, simulated: SimulatedRequest) -> None:
        """Called just before a request is submitted."""

    def on_finish(self, output: RequestOutput) -> list[tuple[float, SimulatedRequest]]:
        """The requests that follow one that has ended, with their times of arrival."""
        ...


class WarmUpRequests:
    """Every agent's fixed prompt once, one after the other, each with one output token; as in KVFlow's evaluation."""

    declared: Sequence[WorkflowSpec] = ()

    def __init__(self, clients: Sequence[WorkflowClient]) -> None:
        prompts: dict[str, tuple[str, np.ndarray]] = {}
        for client in clients:
            for agent in client.agents:
                prompts.setdefault(agent, (client.client, client.fixed_prompt(agent)))
        self._remaining = iter(prompts.items())

    def begin(self, system: System) -> list[tuple[float, SimulatedRequest]]:
        return self._next(0.0)

    def on_submit(self, simulated: SimulatedRequest) -> None:
        pass

    def on_finish(self, output: RequestOutput) -> list[tuple[float, SimulatedRequest]]:
        return self._next(output.times.finished or 0.0)

    def _next(self, at: float) -> list[tuple[float, SimulatedRequest]]:
        for agent, (client, prompt) in self._remaining:
            request = Request(
                f"warm/{agent}", prompt, 1, agent=agent, fixed_tokens=len(prompt), session="warm-up", client=client,
                store_policy=StorePolicy.DISCARD,
            )  # fmt: skip
            return [(at, SimulatedRequest(request, 1))]
        return []


class ClientRequests:
    """The calls of generated workflows, whose graphs and seconds of a call, `answer_s`, are declared to the server.

    Attributes:
        prompts: all prompts in order of submission.
    """

    def __init__(self, clients: Sequence[WorkflowClient], answer_s: Callable[[WorkflowClient], float]) -> None:
        self.clients = {client.name: client for client in clients}
        self.declared = [client.spec(answer_s(client)) for client in clients]
        self.prompts: list[np.ndarray] = []
        self._number = 0

    def begin(self, system: System) -> list[tuple[float, SimulatedRequest]]:
        self._system = system
        now, first = system.tiers.clock(), []
        for spec, client in zip(self.declared, self.clients.values(), strict=True):
            system.graph.add_workflow(spec)
            first.append(self._simulated(client, client.first_call(), now))
        return first

    def on_submit(self, simulated: SimulatedRequest) -> None:
        self.prompts.append(np.asarray(simulated.request.prompt))

    def on_finish(self, output: RequestOutput) -> list[tuple[float, SimulatedRequest]]:
        request = output.request
        assert request.workflow is not None and request.agent is not None, "clients' requests name both"
        client, now = self.clients[request.workflow], output.times.finished or 0.0
        calls = client.following(request.agent)
        self._change(client, request.agent, calls)
        if client.hostile:
            for agent in client.agents:
                self._system.graph[client.name].expect(agent)
        following = [self._simulated(client, call, now) for call in calls]
        if not client.open:
            self._system.graph.remove_workflow(client.name)
        return following

    def _change(self, client: WorkflowClient, agent: str, calls: Sequence[AgentCall]) -> None:
        change = client.change(agent, calls)
        if change is not None:
            old, new, edges = change
            graph = self._system.graph[client.name]
            graph.remove_agent(old)
            graph.add_agent(new)
            for edge in edges:
                graph.add_edge(edge)

    def _simulated(self, client: WorkflowClient, call: AgentCall, now: float) -> tuple[float, SimulatedRequest]:
        self._number += 1
        request = Request(
            f"{client.name}/{self._number}", call.prompt, call.output_tokens, workflow=client.name, agent=call.agent,
            fixed_tokens=call.fixed_tokens, client=client.client, priority=1.0 if client.hostile else 0.5,
            timeout_s=NO_TIMEOUT_S,
        )  # fmt: skip
        return now + call.after_s, SimulatedRequest(request, call.output_tokens)


class TraceRequests:
    """The calls of a trace.

    Args:
        closed: a call arrives as long after the end of the one that it followed as in the trace (closed loop);
            False: at its time in the trace (open loop).
    """

    def __init__(self, trace: Trace, closed: bool = True) -> None:
        self.declared = trace.workflows
        self._following: dict[str, list[TracedCall]] = {}
        self._first: list[TracedCall] = []
        for call in trace.calls:
            if closed and call.after is not None:
                self._following.setdefault(call.after[0], []).append(call)
            else:
                self._first.append(call)

    def begin(self, system: System) -> list[tuple[float, SimulatedRequest]]:
        now = system.tiers.clock()
        for spec in self.declared:
            system.graph.add_workflow(spec)
        return [(now + call.at, _from_trace(call)) for call in self._first]

    def on_submit(self, simulated: SimulatedRequest) -> None:
        pass

    def on_finish(self, output: RequestOutput) -> list[tuple[float, SimulatedRequest]]:
        now = output.times.finished or 0.0
        following = self._following.get(output.request.id, [])
        return [(now + call.after[1], _from_trace(call)) for call in following if call.after is not None]


def _from_trace(call: TracedCall) -> SimulatedRequest:
    request = Request(
        call.id, call.prompt, call.max_new_tokens, workflow=call.workflow, agent=call.agent,
        fixed_tokens=call.fixed_tokens, session=call.session, client=call.client, priority=call.priority,
        store_policy=call.store_policy, timeout_s=NO_TIMEOUT_S,
    )  # fmt: skip
    return SimulatedRequest(request, max(1, call.num_output_tokens))
