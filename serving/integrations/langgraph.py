"""LangGraph: declares the step graph of a compiled graph, and names each call by the node that makes it.

Usage::

    workflows = LangGraphWorkflows("http://127.0.0.1:8000/v1")
    model = ChatOpenAI(
        model="demo", base_url=workflows.base_url, api_key="none",
        http_client=workflows.http_client(), http_async_client=workflows.http_async_client(),
    )
    graph = workflows.declare(builder.compile(), "report")
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, TypeVar

from ..workflow.loaders import workflow_from_langgraph
from ..workflow.spec import repeated, without_agents
from .workflow_client import AGENT_HEADER, SESSION_HEADER, WORKFLOW_HEADER, WorkflowClient

Graph = TypeVar("Graph")
WORKFLOW_KEY = "tenure_workflow"  # in the metadata of a declared graph's runs
SUBGRAPH = ":"  # between a node and the node of its subgraph, as LangGraph draws it; no node may have it in its name


class LangGraphWorkflows(WorkflowClient):
    """Workflows from LangGraph graphs; see `WorkflowClient`.

    Calls are named wherever LangGraph passes its configuration on: in nodes, tools and subgraphs, sync and async, in
    parallel branches and `Send`, and in retries. In threads that a node starts itself they are not, nor in coroutines
    on Python 3.10, and the server then names the agent by its prompt.
    """

    def declare(
        self, graph: Graph, name: str, without: Collection[str] | None = None, *, repeats: bool = True
    ) -> Graph:
        """Declares a compiled graph, and returns it with the name of its workflow attached to its runs.

        A node of a subgraph is the agent `node:inner`.

        Args:
            without: the nodes that never call the model; those before them lead to those behind them. None: each
                `ToolNode`.
            repeats: runs of the graph follow one another: the end of one leads to the first nodes again.

        Where the ways of a `Command` or `Send` are not declared, one warning names the nodes, see
        `workflow_from_langgraph`.

        Raises:
            ValueError: not a compiled graph, or `without` has other names than those of its nodes.
        """
        subgraphs = dict(_subgraphs(graph))
        drawn: Any = graph
        if len(subgraphs) > 1:
            drawn = drawn.get_graph(xray=True)
        spec = workflow_from_langgraph(drawn, name)
        if without is None:
            without = _tool_nodes(subgraphs).intersection(agent.name for agent in spec.agents)
        spec = without_agents(spec, without)
        self.declare_spec(repeated(spec) if repeats else spec)
        # A copy; the configuration of a run is merged with its own.
        return graph.with_config(metadata={WORKFLOW_KEY: name})  # type: ignore[attr-defined]

    def running_call(self) -> dict[str, str]:
        """The workflow and the node of the run in whose context the code runs, and its `thread_id` as the session."""
        from langgraph.config import get_config

        try:
            config = get_config()
        except RuntimeError:  # outside of any run
            return {}
        metadata = config.get("metadata") or {}
        workflow, namespace = metadata.get(WORKFLOW_KEY), metadata.get("langgraph_checkpoint_ns")
        if workflow is None or not namespace:
            return {}
        nodes = [level.partition(":")[0] for level in str(namespace).split("|")]  # each with its task's id
        names = {WORKFLOW_HEADER: str(workflow), AGENT_HEADER: SUBGRAPH.join(nodes)}
        thread = (config.get("configurable") or {}).get("thread_id")
        return names if thread is None else names | {SESSION_HEADER: str(thread)}


def _subgraphs(graph: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A compiled graph and its subgraphs, by the prefix of their nodes' names."""
    yield prefix, graph
    if hasattr(graph, "get_subgraphs"):
        for node, inner in graph.get_subgraphs():
            yield from _subgraphs(inner, f"{prefix}{node}{SUBGRAPH}")


def _tool_nodes(subgraphs: dict[str, Any]) -> set[str]:
    from langgraph.prebuilt import ToolNode

    return {
        prefix + name
        for prefix, graph in subgraphs.items()
        for name, node in getattr(getattr(graph, "builder", None), "nodes", {}).items()
        if isinstance(node.runnable, ToolNode)
    }
