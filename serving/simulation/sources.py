"""Who asks in a simulation: clients that were generated, the calls of a trace, or a warm-up before either."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..keep import Keep
from ..scheduling.request import Ended, Request
from ..spec import WorkflowSpec
from ..systems import System
from .clients import Call, Client
from .driver import Ask
from .traces import Trace, TracedCall


class WarmUp:
    """Every agent's fixed prompt once, with an answer of one token, one after the other; as in KVFlow's evaluation."""

    declared: Sequence[WorkflowSpec] = ()

    def __init__(self, clients: Sequence[Client]) -> None:
        prompts: dict[str, tuple[str, np.ndarray]] = {}
        for client in clients:
            for agent in client.agents:
                prompts.setdefault(agent, (client.client, client.fixed_prompt(agent)))
        self._left = iter(prompts.items())

    def begin(self, system: System) -> list[tuple[float, Ask]]:
        return self._next(0.0)

    def submitting(self, ask: Ask) -> None:
        pass

    def ended(self, ended: Ended) -> list[tuple[float, Ask]]:
        return self._next(ended.times.ended or 0.0)

    def _next(self, at: float) -> list[tuple[float, Ask]]:
        for agent, (client, prompt) in self._left:
            request = Request(
                f"warm/{agent}",
                prompt,
                1,
                agent=agent,
                fixed_tokens=len(prompt),
                session="warm-up",
                client=client,
                keep=Keep.DISCARD,
            )
            return [(at, Ask(request, 1))]
        return []


class ClientCalls:
    """The calls of generated clients, whose graphs are declared to the server.

    Args:
        answer_s: of an agent, seconds of a call that the server is told to expect.
    """

    def __init__(self, clients: Sequence[Client], answer_s: Callable[[Client], float]) -> None:
        self.clients = {client.name: client for client in clients}
        self.declared = [client.spec(answer_s(client)) for client in clients]
        self._number = 0

    def begin(self, system: System) -> list[tuple[float, Ask]]:
        self._system = system
        now, first = system.tiers.clock(), []
        for spec, client in zip(self.declared, self.clients.values(), strict=True):
            system.graph.add_workflow(spec)
            first.append(self._ask(client, client.first_call(), now))
        return first

    def submitting(self, ask: Ask) -> None:
        pass

    def ended(self, ended: Ended) -> list[tuple[float, Ask]]:
        request = ended.request
        assert request.workflow is not None and request.agent is not None, "clients' requests name both"
        client, now = self.clients[request.workflow], ended.times.ended or 0.0
        calls = client.following(request.agent)
        self._change(client, request.agent, calls)
        if client.hostile:
            for agent in client.agents:
                self._system.graph[client.name].expect(agent)
        asks = [self._ask(client, call, now) for call in calls]
        if not client.open:
            self._system.graph.remove_workflow(client.name)
        return asks

    def _change(self, client: Client, agent: str, calls: Sequence[Call]) -> None:
        change = client.change(agent, calls)
        if change is not None:
            old, new, edges = change
            graph = self._system.graph[client.name]
            graph.remove_agent(old)
            graph.add_agent(new)
            for edge in edges:
                graph.add_edge(edge)

    def _ask(self, client: Client, call: Call, now: float) -> tuple[float, Ask]:
        self._number += 1
        request = Request(
            f"{client.name}/{self._number}",
            call.prompt,
            call.output_tokens,
            workflow=client.name,
            agent=call.agent,
            fixed_tokens=call.fixed_tokens,
            client=client.client,
            priority=1.0 if client.hostile else 0.5,
            timeout_s=1e9,
        )
        return now + call.after_s, Ask(request, call.output_tokens)


class TracedCalls:
    """The calls of a trace, each as long after the one it followed as it was then.

    Args:
        closed: so; otherwise every call comes at the time at which it came then.
    """

    def __init__(self, trace: Trace, closed: bool = True) -> None:
        self.declared = trace.workflows
        self._after: dict[str, list[TracedCall]] = {}
        self._first: list[TracedCall] = []
        for call in trace.calls:
            if closed and call.after is not None:
                self._after.setdefault(call.after[0], []).append(call)
            else:
                self._first.append(call)

    def begin(self, system: System) -> list[tuple[float, Ask]]:
        now = system.tiers.clock()
        for spec in self.declared:
            system.graph.add_workflow(spec)
        return [(now + call.at, _ask_of(call)) for call in self._first]

    def submitting(self, ask: Ask) -> None:
        pass

    def ended(self, ended: Ended) -> list[tuple[float, Ask]]:
        now = ended.times.ended or 0.0
        following = self._after.get(ended.request.id, [])
        return [(now + call.after[1], _ask_of(call)) for call in following if call.after is not None]


def _ask_of(call: TracedCall) -> Ask:
    request = Request(
        call.id,
        call.prompt,
        call.max_new_tokens,
        workflow=call.workflow,
        agent=call.agent,
        fixed_tokens=call.fixed_tokens,
        session=call.session,
        client=call.client,
        priority=call.priority,
        keep=Keep(call.keep),
        timeout_s=1e9,
    )
    return Ask(request, max(1, call.produced))
