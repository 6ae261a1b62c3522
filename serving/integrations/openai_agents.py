"""OpenAI Agents SDK: declares the step graph of an agent's handoffs, and names each call by its agent.

Usage::

    workflows = AgentWorkflows("http://127.0.0.1:8000/v1", api_key="none")
    set_default_openai_client(workflows.client(), use_for_tracing=False)
    set_default_openai_api("chat_completions")
    workflows.declare(triage, "support")  # an Agent with handoffs
    with workflows.session("ticket 17"):
        Runner.run_sync(triage, "My parcel is late.")
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..workflow.spec import AgentSpec, EdgeSpec, WorkflowSpec, repeated
from .workflow_client import AGENT_HEADER, MAX_WORKFLOW_NAME, WORKFLOW_HEADER, WorkflowClient, name_on_the_wire

logger = logging.getLogger(__name__)


class AgentWorkflows(WorkflowClient):
    """Workflows from the Agents SDK; see `WorkflowClient`.

    Names are headers in the settings of each agent, so they are sent sync, async, streamed, and from agents that are
    tools of others. `RunConfig(model_settings=ModelSettings(extra_headers=…))` replaces them.
    """

    def client(self) -> Any:
        """An `AsyncOpenAI` for `set_default_openai_client` or a model; sends the names of sessions, too."""
        from openai import AsyncOpenAI

        return AsyncOpenAI(base_url=self.base_url, api_key=self._api_key, http_client=self.http_async_client())

    def declare(self, agent: Any, name: str, *, repeats: bool = True) -> WorkflowSpec:
        """Declares the agents that `agent` reaches by handoffs and as tools, and has each send its name from now on.

        A call of an agent is followed by one of itself (if it has tools), of an agent that is handed to or used as a
        tool, or by none; a tool's last call by one of the agents that use it. All of these are equally probable, until
        the server has observed the calls. Agents of the same name are one agent.

        Args:
            repeats: runs follow one another: the end of one leads to `agent` again.
        Raises:
            ValueError: an agent belongs to another workflow: `agent.clone()` makes one that may belong to this.
        """
        reached = list(_reached(agent))
        sent = name_on_the_wire(name, MAX_WORKFLOW_NAME)
        for each in reached:
            other = (each.model_settings.extra_headers or {}).get(WORKFLOW_HEADER, sent)
            if other != sent:
                raise ValueError(
                    f"got the agent {each.name!r}, which belongs to the workflow {other!r}; accepted: agents of no "
                    "other workflow, such as agent.clone()"
                )
        spec = _step_graph(reached, name)
        spec = repeated(spec) if repeats else spec
        for each in reached:
            headers = {WORKFLOW_HEADER: sent, AGENT_HEADER: name_on_the_wire(each.name)}
            settings = each.model_settings
            each.model_settings = replace(settings, extra_headers={**(settings.extra_headers or {}), **headers})
        self.declare_spec(spec)
        return spec


def _handoffs(agent: Any) -> Iterator[tuple[str, Any]]:
    """The agents that an agent hands over to, by name; None for a handoff that does not keep its agent."""
    for handoff in agent.handoffs:
        if hasattr(handoff, "model_settings"):
            yield handoff.name, handoff
        else:
            reference = getattr(handoff, "_agent_ref", None)
            yield handoff.agent_name, reference() if reference is not None else None


def _agent_tools(agent: Any) -> Iterator[Any]:
    """The agents that an agent has as tools (`Agent.as_tool`)."""
    for tool in agent.tools:
        if (inner := getattr(tool, "_agent_instance", None)) is not None:
            yield inner


def _reached(agent: Any) -> Iterator[Any]:
    """An agent, and those that it reaches."""
    seen, new = {id(agent)}, [agent]
    while new:
        each = new.pop(0)
        yield each
        for other in (*(target for _, target in _handoffs(each) if target is not None), *_agent_tools(each)):
            if id(other) not in seen:
                seen.add(id(other))
                new.append(other)


def _step_graph(agents: list[Any], name: str) -> WorkflowSpec:
    """The workflow of agents that have been reached from the first."""
    following: dict[str, dict[str, None]] = {}  # by agent, the agents of the next call
    callers: dict[str, dict[str, None]] = {}
    for agent in agents:
        targets = following.setdefault(agent.name, {})
        tools = {tool.name: None for tool in _agent_tools(agent)}
        targets |= {target: None for target, _ in _handoffs(agent)} | tools
        if len(agent.tools) > len(tools) or getattr(agent, "mcp_servers", None):
            targets[agent.name] = None
        for tool in tools:
            callers.setdefault(tool, {})[agent.name] = None
    handed_to = {agents[0].name} | {target for agent in agents for target, _ in _handoffs(agent)}
    for target in handed_to - following.keys():
        logger.warning("the handoffs of the agent %r are unknown: its handoff does not keep its agent", target)
        following[target] = {}
    edges: list[EdgeSpec] = []
    for source, targets in following.items():
        targets |= callers.get(source, {})
        ways = len(targets) + (source in handed_to)  # or none
        edges += [EdgeSpec(source, target, 1 / ways) for target in targets]
    return WorkflowSpec(name, [AgentSpec(each) for each in following], edges, [agents[0].name])
